"""Write the report's files, and put its figures into sentences and headline facts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from synth.judging.within_item import SIGMAS
from synth.pool.synthesis_run import SynthesisRun
from trainer.errors import UserError
from trainer.report import page
from trainer.report.page import Plot, compact, number, percent

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MAX_AUC = 0.53  # against reference samples; above it a pool has a warning
MAX_NATS_CHANGE = 0.1  # relative change of nats per token beyond which a pool has a warning


class HeadlineFact(NamedTuple):
    """A figure at the head of the page."""

    label: str
    value: str
    note: str = ""


def write(run: SynthesisRun, figures: dict[str, Any], drawn: list[Plot]) -> None:
    """Write report.html, plots/*.png and report.json. Raises UserError where the folder cannot be written."""
    path, plot_folder = run.folder / "report.html", run.folder / "plots"
    try:
        plot_folder.mkdir(parents=True, exist_ok=True)
        for old in plot_folder.glob("*.png"):
            old.unlink()
        page.write(path, TEMPLATE, drawn, name=run.folder.resolve().name, base=run.base.path, seed=run.config.seed, figures=figures,
                   max_sample=run.config.report.sample, outcome=outcome(figures), facts=headline_facts(figures))
        for image in drawn:
            path.with_name(f"{image.name}.png").replace(plot_folder / f"{image.name}.png")
        text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False)
        (run.folder / "report.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report in {run.folder}: {error.strerror or error}; the pool is complete: free disk space or "
                        "change permissions, and run again: --stages '[report]'") from None


def distribution_warnings(distribution: dict[str, Any] | None) -> list[str]:
    """Return reasons not to take the pool for a sample of the base's own distribution."""
    if not distribution or "auc" not in (last := distribution["steps"][-1]):
        return []
    instructions = f"{last['step']} instructions" if last["step"] in ("sampled", "selected") else "instructions that are left"
    warnings = []
    if last["auc"] > MAX_AUC and last["auc"] - 0.5 > SIGMAS * last["auc_error"]:
        warnings.append(f"A classifier can tell the {instructions} from reference samples: AUC {last['auc']:.3f} ± {last['auc_error']:.3f} "
                        f"(0.5 is chance). {_cause_of_difference(distribution['steps'])}")
    lacking = last["repeated_reference"] - last["repeated"]
    if lacking > SIGMAS * last["repeated_error"] and last["repeated"] < last["repeated_reference"] / 2:
        warnings.append(f"Duplicates are missing: {percent(last['repeated'])} of the {instructions} occur more than once, against "
                        f"{percent(last['repeated_reference'])} of as many reference samples. Frequent instructions are part of the base's "
                        "distribution.")
    if "nats" in last and abs(last["nats_difference"]) > SIGMAS * last["nats_error"]:
        change = last["nats_difference"] / (last["nats"] - last["nats_difference"])
        if abs(change) > MAX_NATS_CHANGE:
            likelier = change < 0
            warnings.append(f"The {instructions} are {'more' if likelier else 'less'} likely under the base than reference samples: "
                            f"{percent(abs(change))} {'fewer' if likelier else 'more'} nats per token. A temperature "
                            f"{'below' if likelier else 'above'} 1 has this effect.")
    return warnings


def _cause_of_difference(steps: list[dict]) -> str:
    """Name the step that raised the AUC most."""
    compared = [step for step in steps if "auc" in step]
    rises = {step["step"]: step["auc"] - before["auc"] for before, step in itertools.pairwise(compared)}
    name = max(rises, key=rises.get, default=None)
    if name is None or rises[name] < compared[0]["auc"] - 0.5:
        return f"It was {compared[0]['auc']:.3f} before any rule: check temperature, top_p and system prompts."
    return f"It rose most, by {rises[name]:.3f}, at the step: {name}."


def outcome(figures: dict[str, Any]) -> str:
    """Return the sentences at the head of the page.

    They say how far the pool is, how near it is to the base's distribution, and whether there are warnings.
    """
    left = figures["yield"]["left"]
    if not left["planned"]:
        return "No instructions have been planned yet."
    last = list(left)[-1]
    state = {"planned": "are planned; none is sampled yet", "sampled": "were sampled", "clean": "are left after cleaning",
             "answered": "have responses", "judged": "are judged", "selected": "are in the replay set"}[last]
    sentence = f"Of {number(left['planned'])} instructions {number(left[last])} {state}."
    steps = (figures["distribution"] or {}).get("steps", [])
    if steps and "auc" in steps[-1]:
        auc, error = steps[-1]["auc"], steps[-1]["auc_error"]
        verdict = "A classifier cannot tell them" if auc - 0.5 < 2 * error else f"A classifier with an AUC of {auc:.3f} can tell them"
        sentence += f" {verdict} from the base's own instructions."
    if figures["warnings"]:
        sentence += f" {len(figures['warnings'])} {'warning' if len(figures['warnings']) == 1 else 'warnings'} below."
    return sentence


def headline_facts(figures: dict[str, Any]) -> list[HeadlineFact]:
    """Return the most important figures, without those that the pool does not have."""
    left, judges, usage, facts = figures["yield"]["left"], figures["judges"], figures["usage"], []
    if left["planned"]:
        last = list(left)[-1]
        facts.append(HeadlineFact("Yield", percent(left[last] / left["planned"]), f"{last}, of planned items"))
    if figures["distribution"] and "auc" in (last := figures["distribution"]["steps"][-1]):
        facts.append(HeadlineFact("AUC", f"{last['auc']:.3f}", f"± {last['auc_error']:.3f}; 0.5: like the base's own"))
        facts.append(HeadlineFact("Topic distance", f"{last['topics']:.3f}", f"by chance: {last['topics_chance']:.3f}"))
    if judges and judges["alpha_normalised"] is not None and len(judges["judges"]) > 1:
        facts.append(HeadlineFact("Judge agreement", f"{judges['alpha_normalised']:.2f}", "Krippendorff's α of z-scores"))
    if tokens := sum(row["tokens"] for row in usage):
        facts.append(HeadlineFact("Tokens generated", compact(tokens), page.duration(sum(row["seconds"] for row in usage))))
    if cost := sum(row["cost"] for row in usage):
        facts.append(HeadlineFact("Cost", f"{cost:,.2f}", "by the servers' prices"))
    return facts


def summary_lines(figures: dict[str, Any]) -> list[str]:
    """Return the lines for the console."""
    lines = ["items: " + ", ".join(f"{number(count)} {name}" for name, count in figures["yield"]["left"].items())]
    if figures["distribution"] and "auc" in (last := figures["distribution"]["steps"][-1]):
        baseline = figures["distribution"]["baseline"]
        halves = f"; AUC of two halves of the reference: {baseline['auc']:.3f}" if "auc" in baseline else ""
        lines.append(f"{last['step']} instructions against reference samples: AUC {last['auc']:.3f} ± {last['auc_error']:.3f}, "
                     f"MMD² {last['mmd2']:.2g} (p {last['mmd_p']:.3f}), topic distance {last['topics']:.3f} "
                     f"(by chance {last['topics_chance']:.3f}){halves}")
    if figures["selected"]:
        lines.append("selected responses: " + "; ".join(f"{model} {percent(share['items'])} of items, {percent(share['tokens'])} of tokens"
                                                        for model, share in figures["selected"].items()))
    return lines
