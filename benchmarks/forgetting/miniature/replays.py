"""Make the replay sets of the study, and count their right answers.

A set is selected from the base's pool of responses, or drawn from skills.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.forgetting.miniature.arms import SAMPLES, WORLD_SETS, Selection, selections
from benchmarks.forgetting.miniature.demo import synthesis_config
from benchmarks.forgetting.miniature.family import STUDIED
from benchmarks.forgetting.miniature.skills import GENERAL, recognise
from benchmarks.forgetting.miniature.world import training_records, write_jsonl
from synth import config as synthesis
from synth.run import synthesise


def replay_file(work: Path, base: str, name: str, seed: int) -> Path:
    """Return the path of a set; sets that are drawn from skills have one for each seed."""
    return work / base / "replay" / f"{name}{f' {seed}' if name in WORLD_SETS else ''}.jsonl"


def write_world_set(work: Path, base: str, name: str, seed: int, count: int) -> Path:
    """Write a set that is drawn from skills, and return its path."""
    return write_jsonl(training_records(WORLD_SETS[name](), count, seed=1000 + seed), replay_file(work, base, name, seed))


def make_replay_sets(work: Path, base: str, names: Sequence[str], count: int) -> list[dict]:
    """Run synthesis once up to the judges, then select each set; return the statistics of each."""
    pool = pool_config(work, base, count)
    synthesise(pool)
    statistics = []
    for name in names:
        synthesise(selection_config(pool, selections(base)[name]))
        path = replay_file(work, base, name, seed=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(pool.output) / "replay.jsonl", path)
        statistics.append({"base": base, "replay": name, **replay_statistics(path)})
    return statistics


def pool_config(work: Path, base: str, count: int) -> synthesis.Config:
    """Return the configuration of all stages of synthesis but `select`.

    All models judge all responses, except a base that never learnt to grade.
    """
    config = synthesis_config(work / base / "synth", count)
    return replace(
        config, base=synthesis.Model(path=str(STUDIED[base].folder)), judges=[] if STUDIED[base].tuning else config.responders,
        instruct=replace(config.instruct, reference_samples=0), respond=replace(config.respond, num_samples=SAMPLES),
        judge=replace(config.judge, exclude_self=False), stages=["probe", "instruct", "clean", "respond", "judge"])


def selection_config(pool: synthesis.Config, selection: Selection) -> synthesis.Config:
    """Return the configuration that selects a set from a pool."""
    judge = replace(pool.judge, exclude_self=not selection.as_in_paper, calibrate_judges=not selection.as_in_paper)
    return replace(pool, stages=["select"], select=selection.select, judge=judge)


def replay_statistics(path: Path) -> dict:
    """Return the number of rows of a set and two shares.

    `recognised` is the share of rows whose instruction some skill recognises, `right` the share of these with the right answer.
    """
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    known = [(found[1], chat[-1]["content"]) for chat in chats if (found := recognise(chat[0]["content"], GENERAL))]
    return {"rows": len(chats), "recognised": len(known) / len(chats), "right": sum(right == given for right, given in known) / len(known)}
