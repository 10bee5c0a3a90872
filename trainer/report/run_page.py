"""Write the HTML page of a run: outcome, loss, forgetting, answers, speed, data and setup.

It leaves out what the run did not record.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.report import answers, page
from trainer.report.page import compact, duration, number, percent
from trainer.report.run_plots import plots
from trainer.report.run_records import Run, column, read_run

TEMPLATE = Path(__file__).with_name("run_page.html.jinja")


class Fact(NamedTuple):
    label: str
    value: str
    note: str = ""


class Phase(NamedTuple):
    name: str
    seconds: float
    share: float  # of the run's time


def write_report(run_folder: Path) -> None:
    """Write report.html and its plots (PNG) from a run folder.

    It has config.yaml, metrics.jsonl, data.json and answers.jsonl. Raises UserError if the folder does not exist, or if config.yaml or
    data.json is not what a run writes.
    """
    run = read_run(Path(run_folder))
    page.write(
        Path(run_folder) / "report.html", TEMPLATE, plots(run),
        run=run, outcome=outcome(run), exported=exported_state(run), facts=facts(run), cost_of_probes=cost_of_probes(run),
        phases=phases(run), model=model_table(run), answers=answers.sections(run.answers),
    )


def outcome(run: Run) -> str:
    """Say in a sentence or two how the run ended and where its loss went."""
    if not run.steps and not run.end:
        return "No step was logged."
    steps = run.end["steps"] if run.end else run.steps[-1]["step"]
    count = f"{number(steps)} {'step' if steps == 1 else 'steps'}"
    if run.end is None:
        ended = f"No end was logged after {count}: the run was killed, or is still running."
    else:
        in_time = f" in {duration(run.end['seconds'])}" if "seconds" in run.end else ""
        ended = {
            "finished": f"Finished {count}{in_time}.",
            "max_steps": f"Stopped at its limit of {count}{in_time}.",
            "early stopping": f"Stopped early after {count}{in_time}: the eval loss stopped falling.",
            "floor": f"Stopped after {count}{in_time}: the general items stayed below the floor.",
            "signal": f"Stopped by a signal after {count}{in_time}; to continue, run the same command with --resume auto.",
        }.get(run.end.get("reason"), f"Ended after {count}{in_time}: {run.end.get('reason', 'no reason given')}.")
    exported = exported_state(run)
    if exported and "holds_floor" in exported:
        rank = "best at or above the floor" if exported["holds_floor"] else "nearest to the floor: no measured state reached it"
        ended += f" The state after step {number(exported['step'])} is exported, the {rank}."
    name, records = ("Eval", run.evaluations) if len(run.evaluations) > 1 else ("Training", run.steps)
    if len(records) < 2:
        return ended
    first, last = column(records, "loss")[[0, -1]]
    verb = "fell" if last < first else "rose" if last > first else "went"
    return f"{ended} {name} loss {verb} from {number(first)} to {number(last)}."


def exported_state(run: Run) -> dict | None:
    """Return the scores of the exported state; None where the run scored nothing or has not ended."""
    if not run.end or not run.forgetting:
        return None
    wanted = run.end.get("kept", run.forgetting[-1]["step"])
    return next((record for record in run.forgetting if record["step"] == wanted), None)


def facts(run: Run) -> list[Fact]:
    """Return the headline figures that the run recorded."""
    found = []
    eval_loss, loss = column(run.evaluations, "loss"), column(run.steps, "loss")
    if np.isfinite(eval_loss).any():
        best = int(np.nanargmin(eval_loss))
        at = run.evaluations[best]["step"]
        found.append(Fact("Eval loss", number(eval_loss[best]), f"best, at step {number(at)}"))
    elif run.steps:
        found.append(Fact("Training loss", number(loss[-1]), "at the last logged step"))
    nats = column(run.steps, "kl")
    nats = nats[np.isfinite(nats)]
    if len(nats):
        found.append(Fact("KL to the base", number(nats[-1]), "nats per token, at the last logged step"))
    exported = exported_state(run) or {}
    for role in ("general", "domain"):
        if role in exported:
            base = percent(exported[f"{role}_base"])
            found.append(Fact(f"{role.capitalize()} items", percent(exported[role]), f"right; base {base}"))
    rate, supervised_rate, mfu = (_typical(run, key) for key in ("tokens_per_s", "supervised_per_s", "mfu"))
    if rate is not None:
        note = f"median; {compact(supervised_rate)} supervised" if supervised_rate is not None else "median"
        found.append(Fact("Real tokens/s", compact(rate), note))
    if mfu is not None:
        found.append(Fact("MFU", percent(mfu), "of the device's peak"))
    in_steps = max((record.get("memory_gb") or 0.0 for record in run.steps), default=0.0)
    memory = (run.end or {}).get("peak_memory_gb") or in_steps
    if memory:
        found.append(Fact("Peak memory", f"{memory:.3g} GB"))
    if run.end and run.end.get("tokens"):
        supervised = run.end.get("supervised")
        found.append(Fact("Tokens seen", compact(run.end["tokens"]),
                          f"{percent(supervised / run.end['tokens'])} supervised" if supervised else ""))
    if run.every > 1:
        found.append(Fact("Logged steps", f"1 in {run.every:,}", "is shown here, and the last"))
    if run.data.get("packing_efficiency") is not None:
        found.append(Fact("Packing", percent(run.data["packing_efficiency"]), "of pack capacity is used"))
    return found


def _typical(run: Run, key: str) -> float | None:
    """Return the median over the logged steps, which slow first steps do not move; None without records."""
    values = [record[key] for record in run.steps if record.get(key) is not None]
    return float(np.median(values)) if values else None


def phases(run: Run) -> list[Phase]:
    """Return the time by phase.

    A logged step stands for all steps since the one before; the rest of the run is evaluation and saving.
    """
    total: dict[str, float] = {}
    previous = 0
    for record in run.steps:
        for name, seconds in (record.get("seconds") or {}).items():
            total[name] = total.get(name, 0.0) + seconds * (record["step"] - previous)
        previous = record["step"]
    in_steps = sum(total.values())
    if not in_steps:
        return []
    whole = max((run.end or {}).get("seconds") or 0.0, in_steps)
    if whole > 1.005 * in_steps:
        total["evaluation, saving"] = whole - in_steps
    return [Phase(name, seconds, seconds / whole) for name, seconds in total.items()]


def cost_of_probes(run: Run) -> str:
    """Say how many tokens and seconds the probe runs took, and their share of the run's tokens."""
    probes = run.replay_search.get("probes", [])
    tokens, seconds = (sum(probe[name] for probe in probes) for name in ("tokens", "seconds"))
    of_run = f", {percent(tokens / run.end['tokens'])} of the run's" if run.end and run.end.get("tokens") else ""
    return f"{len(probes)} probe runs: {compact(tokens)} tokens{of_run}, in {duration(seconds)}."


def model_table(run: Run) -> dict[str, str]:
    model = run.data.get("model", {})
    table = {name: str(model[name]) for name in ("path", "family") if model.get(name)}
    if model.get("parameters"):
        table["parameters"] = compact(model["parameters"])
        if model.get("trainable") is not None:
            table["trainable"] = f"{compact(model['trainable'])} ({model['trainable'] / model['parameters']:.2%})"
    return table
