"""Stage `report`: write an HTML report about the pool.

It shows what each stage left, how near the instructions are to the base's own distribution, how far the judges can be trusted, whose
responses were selected, and how fast the stages ran. Parts that the pool does not have yet are left out. Equal pools give equal reports,
except for time and cost.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from synth.config import STAGES
from synth.engines.interface import EmbeddingRequest, Failure
from synth.judging import diagnostics
from synth.pool.synthesis_run import SynthesisRun
from synth.reporting import funnel, report_page
from synth.reporting.distribution import InstructionSample, ReferenceComparison
from synth.reporting.funnel import FunnelStep
from synth.reporting.manifest import shares
from synth.reporting.plots import plots
from trainer.errors import UserError

EMBEDDED_TOKENS = 256  # of a text, at most

CANDIDATES_BY_MODEL = """
    SELECT model, count(*) FROM responses WHERE reason IS NULL AND item IN (SELECT item FROM selection) GROUP BY model ORDER BY model"""
GREEDY_BY_MODEL = "SELECT model, count(*) FROM selection WHERE sample = -1 GROUP BY model"
USAGE_COLUMNS = ("stage", "model", "requests", "prompt_tokens", "tokens", "seconds", "busy", "cost")
USAGE = f"SELECT {', '.join(USAGE_COLUMNS)} FROM usage ORDER BY stage, model"


class PoolComparison(NamedTuple):
    """The pool's steps, compared with the reference samples."""

    reference: InstructionSample
    steps: list[FunnelStep]
    figures: dict[str, Any]

    @property
    def plotted_samples(self) -> dict[str, InstructionSample]:
        """Return the reference, and the pool's first and last step."""
        return {"reference": self.reference} | {step.name: step.sample for step in (self.steps[0], self.steps[-1])}


def report(run: SynthesisRun) -> None:
    """Write report.html, plots/*.png and report.json. Raises UserError where the folder cannot be written."""
    judge_scores = diagnostics.read_scores(run.pool)
    comparison = compare_with_reference(run)
    figures: dict[str, Any] = {
        "done": [stage for stage in STAGES if stage != "report" and run.done(stage)],
        "yield": funnel.pool_yield(run.pool),
        "distribution": comparison.figures if comparison else None,
        "judges": diagnostics.diagnose(judge_scores) if judge_scores else None,
        "selected": selected_by_model(run),
        "replay": read_manifest(run.folder / "manifest.json"),
        "usage": usage_rows(run),
    }
    judge_warnings = [warning["text"] for warning in figures["judges"]["warnings"]] if figures["judges"] else []
    figures["warnings"] = [*report_page.distribution_warnings(figures["distribution"]), *judge_warnings]
    report_page.write(run, figures, plots(figures, comparison.plotted_samples if comparison else {}))
    for line in [*report_page.summary_lines(figures), *(f"warning: {warning}" for warning in figures["warnings"])]:
        run.say(f"report: {line}")
    run.say(f"report: wrote {run.folder / 'report.html'}")
    run.finish("report")


def compare_with_reference(run: SynthesisRun) -> PoolComparison | None:
    """Compare every step of the pool with the reference samples; None where either is missing."""
    reference, steps = funnel.reference_sample(run), funnel.funnel_steps(run)
    if len(reference) < 2 or not steps[0].items:
        return None
    texts = dict.fromkeys(itertools.chain(reference.texts, *(step.sample.texts for step in steps)))
    vectors = embed_with_base(run, list(texts)) if run.config.report.embeddings else None
    comparison = ReferenceComparison(reference, [step.sample for step in steps], run.config.report.topics, vectors, run.config.seed)
    topics = [topic | {"shares": {}} for topic in comparison.topics.describe()]
    for name, sample in (("reference", reference), *((step.name, step.sample) for step in steps)):
        for topic, share in zip(topics, comparison.topic_shares(sample), strict=True):
            topic["shares"][name] = float(share)
    return PoolComparison(reference, steps, {
        "vectors": "TF-IDF and SVD" if vectors is None else "embeddings of the base",
        "reference": len(reference),
        "reference_tokens": float(reference.tokens.mean()),
        "reference_characters": float(np.mean([len(text) for text in reference.texts])),
        "baseline": comparison.baseline(),
        "steps": [{"step": step.name, "items": step.items, **comparison.compare(step.sample)} for step in steps],
        "topics": topics,
    })


def embed_with_base(run: SynthesisRun, texts: list[str]) -> dict[str, np.ndarray] | None:
    """Embed texts with the base, in the place of a first user turn.

    Returns None where that fails, with a line on the console.
    """
    try:
        format = run.format(run.base)
        prefix = format.user_prompt(()).token_ids
        token_ids = (format.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:EMBEDDED_TOKENS] for text in texts)
        requests = (EmbeddingRequest((i,), (*prefix, *ids)) for i, ids in enumerate(token_ids))
        with run.use_engine("report", dataclasses.replace(run.base, engine="transformers"), record=False) as writer:
            results = list(writer.engine.embed(requests))
    except UserError as error:
        failure = error
    else:
        failure = next((result.reason for result in results if isinstance(result, Failure)), None)
    if failure:
        run.say(f"report: cannot embed texts with the base, using TF-IDF and SVD instead: {failure}")
        return None
    return {texts[result.key[0]]: np.array(result.vector) for result in results}


def selected_by_model(run: SynthesisRun) -> dict[str, dict[str, float]]:
    """Return each model's share of the candidates, and of the chosen responses by items and tokens."""
    chosen = shares(run)
    if not chosen:
        return {}
    candidates, greedy = dict(run.pool.select(CANDIDATES_BY_MODEL)), dict(run.pool.select(GREEDY_BY_MODEL))
    (items,), = run.pool.select("SELECT count(*) FROM selection")
    return {model: {"candidates": count / sum(candidates.values()), "items": chosen.get(model, {}).get("rows", 0.0),
                    "tokens": chosen.get(model, {}).get("tokens", 0.0), "greedy": greedy.get(model, 0) / items}
            for model, count in candidates.items()}


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read the parts of the manifest that the report shows; None where there is no manifest."""
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {key: manifest[key] for key in ("replay", "deterministic", "shares", "incomplete")}
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"report: expected the manifest of stage select in {path}, got another file ({error}); "
                        "write it again: --stages '[select]'") from None


def usage_rows(run: SynthesisRun) -> list[dict[str, Any]]:
    """Return requests, tokens, time and rates by stage and model.

    The engine's rate counts only the time in which the engine computes.
    """
    rows = [dict(zip(USAGE_COLUMNS, row)) for row in run.pool.select(USAGE)]
    for row in rows:
        generates = row["tokens"] > row["requests"]  # judging by digits and likelihoods generate next to nothing
        tokens = row["tokens"] if generates else row["prompt_tokens"]
        row["counted_tokens"] = "generated" if generates else "prompt"
        row["tokens_per_second"] = tokens / row["seconds"] if row["seconds"] else None
        row["engine_tokens_per_second"] = tokens / row["busy"] if row["busy"] else None
        row["busy_share"] = row["busy"] / row["seconds"] if row["seconds"] else None
    return sorted(rows, key=lambda row: (STAGES.index(row["stage"]) if row["stage"] in STAGES else len(STAGES), row["model"]))
