"""Kill training and synthesis at random moments; resumed to the end, nothing may differ by a bit."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from random import Random

import yaml

from tests.campaign.forked import Fork
from tests.campaign.material import Material, without_report
from tests.campaign.oracle import Outcome, Verdict, judge

KILLS = 5  # of one run, at most


def attack_training(dice: Random, folder: Path, material: Material) -> Verdict:
    """Kill a run some times, resume it, and compare its adapter and its record with the undisturbed run's."""
    assert material.undisturbed
    return killed(dice, folder, "trainer.run", material.long_options("--resume", "auto"), without_report, material.seconds["undisturbed"],
                  lambda: material.unlike_undisturbed(folder))


def attack_synthesis(dice: Random, folder: Path, material: Material) -> Verdict:
    """Kill a run some times, call it again, and compare its pool with the undisturbed run's."""
    (folder / "synth.yaml").write_text(yaml.safe_dump(Material.WHOLE_POOL | {"output": str(folder / "out")}))
    whole = material.whole_pool
    return killed(dice, folder, "synth.run", ["--config", folder / "synth.yaml"], Material.play_slowly, material.seconds["whole"],
                  lambda: unlike(folder / "out", whole))


def killed(dice: Random, folder: Path, module: str, arguments, prepare, seconds: float, difference) -> Verdict:
    """Start a command and kill it at random moments, at most KILLS times; then let it end."""
    kills = 0
    for _ in range(KILLS):
        process = Fork(module, arguments, folder, prepare)
        if process.wait(dice.uniform(0.05, 0.6) * seconds):
            break
        process.kill()
        process.finish()
        kills += 1
    else:
        process = Fork(module, arguments, folder, prepare)
    ended = process.finish()
    verdict = judge(ended, None if ended.status else difference())
    if verdict.outcome == Outcome.REFUSED:
        return Verdict(Outcome.SILENT, f"cannot go on after a kill: {verdict.detail}", kills)
    return verdict._replace(kills=kills)


def rows_of(path: Path) -> dict[str, list]:
    """Return the rows of all tables of a pool that do not depend on time."""
    with contextlib.closing(sqlite3.connect(path)) as pool:
        tables = [name for name, in pool.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'usage' ORDER BY name")]
        return {name: sorted(pool.execute(f"SELECT * FROM {name}"), key=repr) for name in tables}


def unlike(found: Path, expected: Path) -> str | None:
    """Return the first table or file in which a finished synthesis differs from another."""
    ours, theirs = rows_of(found / "pool.sqlite"), rows_of(expected / "pool.sqlite")
    for table in theirs:
        if ours.get(table) != theirs[table]:
            return f"the table {table} differs: {len(ours.get(table, []))} rows of {len(theirs[table])}"
    for name in ("replay.jsonl", "pairs.jsonl"):
        if (found / name).read_bytes() != (expected / name).read_bytes():
            return f"{name} differs"
    left = [path.name for path in found.iterdir() if path.name.endswith(".partial")]
    return f"left behind: {left[0]}" if left else None
