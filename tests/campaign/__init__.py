"""Attack the commands with inputs drawn at random, and judge how they end.

A kind of attack is a file with a function `attack(dice, folder, material) -> Verdict`. `python -m tests.campaign` runs many cases,
test_campaign.py some of each kind.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.campaign import chat_templates, configurations, damage, kills, model_folders, rows, servers
from tests.campaign.oracle import Verdict

KINDS: dict[str, Callable[..., Verdict]] = {
    "configurations": configurations.attack, "rows": rows.attack, "model folders": model_folders.attack,
    "chat templates": chat_templates.attack, "servers": servers.attack, "damaged files": damage.attack,
    "kills of training": kills.attack_training, "kills of synthesis": kills.attack_synthesis,
}
ROUND = ("configurations", "rows", "model folders", "configurations", "rows", "chat templates", "model folders", "servers",
         "configurations",
         "rows", "damaged files", "chat templates", "kills of training", "kills of synthesis")  # in which the kinds take turns
