"""Make the synthetic replay sets of the study: one pool, and a selection for each set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.forgetting.real_model.arms import BASE, SAMPLES, are_judged, selection
from benchmarks.forgetting.real_model.jobs import Size
from benchmarks.harness.parallel import quietly
from synth import config as synthesis
from synth.run import synthesise


def pool_config(output: Path, base: str, responders: Sequence[str], sets: Sequence[str], size: Size) -> synthesis.Config:
    """Return the configuration of all stages but `select`; judges score only where a set needs scores."""
    judged = are_judged(sets)
    return synthesis.Config(
        output=str(output), base=synthesis.Model(path=base, name=BASE, max_model_len=size.pack),
        responders=[synthesis.Model(path=path, max_model_len=size.pack) for path in responders] if judged else [],
        stages=["probe", "instruct", "clean", "respond", *(["judge"] if judged else [])], probe=synthesis.Probe(samples=32),
        instruct=synthesis.Instruct(num_instructions=size.instructions, max_tokens=256, reference_samples=0),
        respond=synthesis.Respond(num_samples=SAMPLES if judged else int("self 1x1" in sets), max_tokens=size.answer_tokens,
                                  include_greedy=judged or "greedy" in sets, score_with_base=judged),
        judge=synthesis.Judge(exclude_self=bool(responders)), select=selection(sets[0]) if sets else synthesis.Select())


def make_sets(pool: synthesis.Config, sets: Sequence[str], folder: Path) -> dict[str, int]:
    """Write each set as NAME.jsonl, and return the rows of each; an earlier sitting's pool goes on."""
    rows = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in sets:
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            with quietly(folder / "synth.log"):
                synthesise(pool)
                synthesise(replace(pool, stages=["select"], select=selection(name)))
            shutil.copy(Path(pool.output) / "replay.jsonl", path)
        rows[name] = sum(bool(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
    return rows
