"""Attack with damaged files of a run: checkpoints, caches, metrics, configurations, pools, results.

A resumed run has to end as the undisturbed one, bit for bit, or to refuse in one line. SQLite keeps no checksums: a changed letter of an
answer in a pool cannot be seen, so of pools only the end in one line is checked.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import yaml

from tests.campaign.forked import complete
from tests.campaign.material import Material, without_report
from tests.campaign.odd_values import damaged, json_text, mutated
from tests.campaign.oracle import Verdict, judge


def attack(dice: Random, folder: Path, material: Material) -> Verdict:
    """Damage a file of an interrupted run or of a finished pool, and go on with the same command."""
    if dice.random() < 0.25:
        return attack_pool(dice, folder, material)
    shutil.copytree(material.interrupted, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stdout", "stderr"))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    kinds = {path.relative_to(folder).parts[:2] for path in files}
    kind = dice.choice(sorted(kinds))  # checkpoints as often as metrics.jsonl, although they are more files
    path = dice.choice([path for path in files if path.relative_to(folder).parts[:2] == kind])
    harm(dice, path)
    ended = complete("trainer.run", material.long_options("--resume", "auto"), folder, without_report)
    return judge(ended, material.unlike_undisturbed(folder))


def attack_pool(dice: Random, folder: Path, material: Material) -> Verdict:
    """Damage a finished pool's file or one of those beside it, and choose answers and report anew."""
    out = shutil.copytree(material.judged_pool, folder / "out")
    path = dice.choice([out / "pool.sqlite"] * 3 + sorted(path for path in out.iterdir() if path.is_file()))
    harm(dice, path)
    stages = ["select", "report"] if dice.random() < 0.2 else ["select"]
    (folder / "synth.yaml").write_text(yaml.safe_dump(Material.POOL | {"output": str(out), "stages": stages,
        "report": {"embeddings": False}}))
    return judge(complete("synth.run", ["--config", folder / "synth.yaml"], folder, Material.play_base))


def harm(dice: Random, path: Path) -> None:
    """Damage a file, or change the JSON in it."""
    content = path.read_bytes()
    if path.suffix == ".jsonl" and dice.random() < 0.5:
        lines = content.splitlines(keepends=True)
        at = dice.randrange(len(lines))
        lines[at] = dice.choice((b"5\n", b"null\n", b"{}\n", b"[" * 10_000 + b"\n", b"9" * 10**6 + b"\n", b"\xff\xfe\n",
                                 b"\0" * 80 + b"\n", damaged(dice, lines[at])))
        content = b"".join(lines)
    elif path.suffix == ".json" and dice.random() < 0.5:
        content = json_text(mutated(dice, json.loads(content)))
    elif dice.random() < 0.06:
        path.unlink()
        return
    else:
        content = damaged(dice, content)
    path.write_bytes(content)
