"""Define the arms of the study on a real model: what is mixed with the domain, and how it is trained.

All arms of a seed take equally many steps of equally many tokens. Sets of replay rows are selected from one pool of the base's own
instructions, so that they differ in the answers alone; `public` has chats that people wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.forgetting import job
from synth.config import Select

BASE = "base"  # name of the base in the pool
PUBLIC = "public"  # name of the replay set that is not synthetic
SAMPLES = 3  # responses of each model to each instruction, where a set needs more than one
KL_WEIGHT = 0.5


@dataclass(frozen=True)
class Arm(job.Arm):
    """One way to fine-tune: a row of the table."""

    ratio: float = 0.5  # share of the tokens that is replay, where there is any
    rank: int = 16
    mlp_only: bool = False  # adapters on the MLP alone


ARMS = (
    Arm("domain only"),
    Arm("domain only, LR/10", lr_factor=0.1),
    Arm("domain only, rank 4", rank=4),
    Arm("domain only, MLP alone", mlp_only=True),
    Arm("domain only + KL", kl=True),
    Arm("public chats", PUBLIC),
    Arm("self, greedy", "greedy"),
    Arm("self 1x1", "self 1x1"),
    Arm("best of all (the paper)", "paper"),
    Arm("plus", "plus"),
    Arm("plus + KL", "plus", kl=True),
    Arm("plus, 20% replay", "plus", ratio=0.2),
    Arm("plus, 83% replay", "plus", ratio=0.83),
)
QUICK = tuple(Arm(name, replay, kl=kl) for name, replay, kl in (
    ("domain only", None, False), ("self 1x1", "self 1x1", False), ("self 1x1 + KL", "self 1x1", True), ("domain only + KL", None, True),
    ("self, greedy", "greedy", False), ("public chats", PUBLIC, False)))


def selection(name: str) -> Select:
    """Return how a synthetic set is selected from the pool."""
    return {
        "greedy": Select(rule="first", candidates=[f"{BASE}:greedy"]),
        "self 1x1": Select(rule="first", candidates=[f"{BASE}:0"]),
        "paper": Select(rule="best"),
        "plus": Select()}[name]


def synthetic_sets(arms: Sequence[Arm]) -> list[str]:
    """Return the names of the sets that the arms take from the pool."""
    return list(dict.fromkeys(arm.replay for arm in arms if arm.replay not in (None, PUBLIC)))


def are_judged(sets: Sequence[str]) -> bool:
    """Return whether a set is chosen by judges."""
    return bool({"paper", "plus"} & set(sets))
