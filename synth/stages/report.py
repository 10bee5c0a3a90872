"""The page about a pool: what each stage left, how near the instructions are to the base's own, what the judges are worth, who won, how
fast. What is not there yet is left out. Equal pools give equal pages, but for time and cost.
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
from synth.pool.run import SynthesisRun
from synth.reporting import funnel
from synth.reporting.distribution import Sample, Yardstick
from synth.reporting.funnel import Step
from synth.reporting.manifest import shares
from synth.reporting.plots import plots
from trainer.errors import UserError
from trainer.report import page
from trainer.report.page import Plot, compact, number, percent

TEMPLATE = Path(__file__).parents[1] / "reporting" / "report.html.jinja"
EMBEDDED = 256  # tokens of a text that its embedding is the mean of
SURE = 4.0  # standard errors
# Beyond these a pool is flagged. On the miniature, T 1 with top_p 0.98 gives .51 and -4%, T 0.7 .68 and -21%, and no duplicates .55.
APART, COLDER = 0.53, 0.1


class Fact(NamedTuple):
    label: str
    value: str
    note: str = ""


class Compared(NamedTuple):
    """The pool's steps beside fresh samples."""

    fresh: Sample
    steps: list[Step]
    figures: dict[str, Any]

    @property
    def samples(self) -> dict[str, Sample]:
        """Fresh ones, and the pool's first and last step."""
        return {"fresh": self.fresh} | {step.name: step.sample for step in (self.steps[0], self.steps[-1])}


def report(run: SynthesisRun) -> None:
    """Write report.html, plots/*.png and report.json from what the pool holds. UserError where the folder cannot be written."""
    judge_scores = diagnostics.read_scores(run.pool)
    compared = compare(run)
    found: dict[str, Any] = {
        "done": [stage for stage in STAGES if stage != "report" and run.done(stage)],
        "yield": funnel.yields(run.pool),
        "distribution": compared.figures if compared else None,
        "judges": diagnostics.diagnose(judge_scores) if judge_scores else None,
        "won": won(run),
        "replay": _manifest(run.folder / "manifest.json"),
        "usage": usage(run),
    }
    found["flags"] = [*flags(compared), *(flag["text"] for flag in (found["judges"] or {}).get("warnings", []))]
    write(run, found, plots(found, compared.samples if compared else {}))
    for line in [*lines(found), *(f"warning: {flag}" for flag in found["flags"])]:
        run.say(f"report: {line}")
    run.say(f"report: wrote {run.folder / 'report.html'}")
    run.finish("report")


def write(run: SynthesisRun, found: dict[str, Any], drawn: list[Plot]) -> None:
    path, beside = run.folder / "report.html", run.folder / "plots"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        for old in beside.glob("*.png"):
            old.unlink()
        page.write(path, TEMPLATE, drawn, name=run.folder.resolve().name, base=run.base.path, seed=run.config.seed, found=found,
                   most=run.config.report.sample, outcome=outcome(found), facts=facts(found))
        for image in drawn:
            path.with_name(f"{image.name}.png").replace(beside / f"{image.name}.png")
        (run.folder / "report.json").write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report in {run.folder}: {error.strerror or error}; the pool is whole: free space or rights, and "
                        "run again: --stages '[report]'") from None


# ---------------------------------------------------------------- figures


def compare(run: SynthesisRun) -> Compared | None:
    """Every step of the pool beside fresh samples; None where there are none of either."""
    fresh, steps = funnel.fresh(run), funnel.steps(run)
    if len(fresh) < 2 or not steps[0].items:
        return None
    texts = dict.fromkeys(itertools.chain(fresh.texts, *(step.sample.texts for step in steps)))
    vectors = embeddings(run, list(texts)) if run.config.report.embeddings else None
    yardstick = Yardstick(fresh, [step.sample for step in steps], run.config.report.topics, vectors, run.config.seed)
    measured = [{"step": step.name, "items": step.items, **yardstick.compare(step.sample)} for step in steps]
    topics = [topic | {"shares": {}} for topic in yardstick.topics.described()]
    for name, sample in (("fresh", fresh), *((step.name, step.sample) for step in steps)):
        for topic, share in zip(topics, yardstick.shares(sample), strict=True):
            topic["shares"][name] = float(share)
    return Compared(fresh, steps, {
        "vectors": "TF-IDF and SVD" if vectors is None else "embeddings of the base", "fresh": len(fresh),
        "fresh_tokens": float(fresh.tokens.mean()), "fresh_characters": float(np.mean([len(text) for text in fresh.texts])),
        "itself": yardstick.itself(), "steps": measured, "topics": topics})


def embeddings(run: SynthesisRun, texts: list[str]) -> dict[str, np.ndarray] | None:
    """The base's own, of texts where it writes them: in a user's first turn. None, and said so, where it cannot be had."""
    try:
        format = run.format(run.base)
        opening = format.pre_query(()).token_ids
        words = (format.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:EMBEDDED] for text in texts)
        requests = (EmbeddingRequest((i,), (*opening, *ids)) for i, ids in enumerate(words))
        with run.at_work("report", dataclasses.replace(run.base, engine="transformers"), record=False) as worker:
            found = list(worker.engine.embed(requests))
    except UserError as error:
        run.say(f"report: no embeddings of the base ({error}): TF-IDF and SVD in their place")
        return None
    if failed := next((result for result in found if isinstance(result, Failure)), None):
        run.say(f"report: no embeddings of the base ({failed.reason}): TF-IDF and SVD in their place")
        return None
    return {texts[result.key[0]]: np.array(result.vector) for result in found}


def won(run: SynthesisRun) -> dict[str, dict[str, float]]:
    """By model: its share of the usable answers to the items that were selected, and of the chosen ones by items and by tokens."""
    chosen = shares(run)
    if not chosen:
        return {}
    counts = dict(run.pool.select("SELECT model, count(*) FROM responses WHERE reason IS NULL AND item IN (SELECT item FROM selection) "
                                  "GROUP BY model ORDER BY model"))
    greedy = dict(run.pool.select("SELECT model, count(*) FROM selection WHERE sample = -1 GROUP BY model"))
    items = run.pool.select("SELECT count(*) FROM selection")[0][0]
    return {model: {"candidates": count / sum(counts.values()), "items": chosen.get(model, {}).get("rows", 0.0),
                    "tokens": chosen.get(model, {}).get("tokens", 0.0), "greedy": greedy.get(model, 0) / items}
            for model, count in counts.items()}


def _manifest(path: Path) -> dict[str, Any] | None:
    """What the manifest says of the replay set, where there is one."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("replay", "deterministic", "shares", "incomplete")}
    except (json.JSONDecodeError, KeyError, OSError) as error:
        raise UserError(f"report: expected the manifest that select writes, found another file at {path} ({error}); "
                        "write it anew: --stages '[select]'") from None


def usage(run: SynthesisRun) -> list[dict[str, Any]]:
    """By stage and model: what was asked and written, in what time, and at what rate while the engine itself was at work."""
    rows = [dict(zip(("stage", "model", "requests", "prompt_tokens", "tokens", "seconds", "busy", "cost"), row))
            for row in run.pool.select("SELECT * FROM usage ORDER BY stage, model")]
    for row in rows:
        written = row["tokens"] > row["requests"]  # what only scores or reads prompts writes next to nothing
        row["counted"] = "written" if written else "read"
        count = row["tokens"] if written else row["prompt_tokens"]
        row["rate"] = count / row["seconds"] if row["seconds"] else None
        row["bare"] = count / row["busy"] if row["busy"] else None
        row["busy_share"] = row["busy"] / row["seconds"] if row["seconds"] else None
    return sorted(rows, key=lambda row: (STAGES.index(row["stage"]) if row["stage"] in STAGES else len(STAGES), row["model"]))


# ---------------------------------------------------------------- in words


def flags(compared: Compared | None) -> list[str]:
    """What should keep a reader from taking the pool for the base's own distribution."""
    if not compared or "auc" not in (last := compared.figures["steps"][-1]):
        return []
    found, step = [], last["step"]
    who = f"{step} instructions" if step in ("sampled", "selected") else "instructions that are left"
    if last["auc"] > APART and last["auc"] - 0.5 > SURE * last["auc_error"]:
        found.append(f"A classifier tells the {who} from fresh ones: AUC {last['auc']:.3f} ± "
                     f"{last['auc_error']:.3f}, where 0.5 is no better than chance. {_culprit(compared.figures['steps'])}")
    lacking = last["repeated_fresh"] - last["repeated"]
    if lacking > SURE * last["repeated_error"] and last["repeated"] < last["repeated_fresh"] / 2:
        found.append(f"Duplicates are missing: {percent(last['repeated'])} of the {who} occur more than once, "
                     f"{percent(last['repeated_fresh'])} of as many fresh ones. What the base asks often is part of its distribution.")
    if "nats" in last and abs(last["nats_difference"]) > SURE * last["nats_error"]:
        change = last["nats_difference"] / (last["nats"] - last["nats_difference"])
        if abs(change) > COLDER:
            found.append(f"The {who} are {'likelier' if change < 0 else 'less likely'} than fresh ones: "
                         f"{percent(abs(change))} {'fewer' if change < 0 else 'more'} nats per token; a temperature "
                         f"{'below' if change < 0 else 'above'} 1 does that.")
    return found


def _culprit(steps: list[dict]) -> str:
    """The step with the greatest rise of the AUC."""
    told = [step for step in steps if "auc" in step]
    rises = {step["step"]: step["auc"] - before["auc"] for before, step in itertools.pairwise(told)}
    name = max(rises, key=rises.get, default=None)
    if name is None or rises[name] < told[0]["auc"] - 0.5:
        return f"It was {told[0]['auc']:.3f} before any rule: look at temperature, top_p and system prompts."
    return f"It rose most, by {rises[name]:.3f}, at the step: {name}."


def outcome(found: dict[str, Any]) -> str:
    left = found["yield"]["left"]
    if not left["planned"]:
        return "Nothing has been planned yet."
    last = list(left)[-1]
    said = {"planned": "are planned, none is sampled yet", "sampled": "were sampled", "clean": "are left after cleaning",
            "answered": "are answered", "judged": "are judged", "selected": "are in the replay set"}[last]
    sentence = f"Of {number(left['planned'])} instructions {number(left[last])} {said}."
    steps = (found["distribution"] or {}).get("steps", [])
    if steps and "auc" in steps[-1]:
        auc, error = steps[-1]["auc"], steps[-1]["auc_error"]
        near = "A classifier cannot tell them" if auc - 0.5 < 2 * error else f"A classifier with an AUC of {auc:.3f} tells them"
        sentence += f" {near} from what the base asks by itself."
    if found["flags"]:
        sentence += f" {len(found['flags'])} {'warning' if len(found['flags']) == 1 else 'warnings'} below."
    return sentence


def facts(found: dict[str, Any]) -> list[Fact]:
    """The figures worth a glance; those that the pool does not have are left out."""
    left, told = found["yield"]["left"], []
    if left["planned"]:
        last = list(left)[-1]
        told.append(Fact("Yield", percent(left[last] / left["planned"]), f"{last}, of what was planned"))
    if found["distribution"] and "auc" in (last := found["distribution"]["steps"][-1]):
        told.append(Fact("AUC", f"{last['auc']:.3f}", f"± {last['auc_error']:.3f}; 0.5: not told apart"))
        told.append(Fact("Topic distance", f"{last['topics']:.3f}", f"chance alone: {last['topics_chance']:.3f}"))
    if found["judges"] and found["judges"]["alpha_normalised"] is not None and len(found["judges"]["judges"]) > 1:
        told.append(Fact("Agreement", f"{found['judges']['alpha_normalised']:.2f}", "Krippendorff's α, normalised"))
    if tokens := sum(row["tokens"] for row in found["usage"]):
        told.append(Fact("Tokens written", compact(tokens), page.duration(sum(row["seconds"] for row in found["usage"]))))
    if cost := sum(row["cost"] for row in found["usage"]):
        told.append(Fact("Cost", f"{cost:,.2f}", "by the servers' prices"))
    return told


def lines(found: dict[str, Any]) -> list[str]:
    """What is worth printing."""
    told = [", ".join(f"{number(count)} {name}" for name, count in found["yield"]["left"].items())]
    if found["distribution"] and "auc" in (last := found["distribution"]["steps"][-1]):
        itself = found["distribution"]["itself"]
        beside = f"; two halves of fresh samples: {itself['auc']:.3f}" if "auc" in itself else ""
        told.append(f"{last['step']} against fresh instructions: AUC {last['auc']:.3f} ± {last['auc_error']:.3f}, MMD² {last['mmd2']:.2g} "
                    f"(p {last['mmd_p']:.3f}), topic distance {last['topics']:.3f} (chance {last['topics_chance']:.3f}){beside}")
    if found["won"]:
        told.append("won: " + ", ".join(f"{model} {percent(share['items'])} of items, {percent(share['tokens'])} of tokens"
                                        for model, share in found["won"].items()))
    return told
