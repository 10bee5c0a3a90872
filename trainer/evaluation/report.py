"""What an evaluation leaves: results.jsonl (every item), results.json (the figures), config.yaml, and report.html; and a table to print."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from trainer import cli
from trainer.errors import UserError
from trainer.evaluation.config import Config
from trainer.evaluation.items import Item, ItemFile
from trainer.evaluation.score_items import Outcome, Outcomes
from trainer.report import page
from trainer.report.page import Plot, Theme, plot
from trainer.versions import versions

TEMPLATE = Path(__file__).with_name("evaluation.html.jinja")
HEADER = ("role", "items", "metric", "n", "base", "model", "change", "lost", "gained", "p", "adjusted", "log-prob/token", "KL/token")
SHOWN = 12  # bars of a plot; further files are in the table


def refuse_used(output: Path) -> None:
    if (output / "results.json").exists():
        raise UserError(f"output: {output} holds the results of another evaluation; choose another --output, or remove it")


def write(output: Path, config: Config, files: Sequence[ItemFile], scored: dict[str, Outcomes], tasks: dict[str, dict],
          results: dict) -> None:
    """The folder and all that is in it; results.json comes last. UserError where it cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        cli.save_yaml(config, output / "config.yaml", versions=versions("torch", "transformers", "peft", "tokenizers", "lm-eval"),
                      command=shlex.join(sys.orig_argv))
        with (output / "results.jsonl").open("w", encoding="utf-8") as file:
            for record in [*records(files, scored), *task_records(tasks)]:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        header, *cells = shown(results)
        page.write(output / "report.html", TEMPLATE, plots(results), results=results, name=output.resolve().name, rows=cells,
                   header=header, notes=caption(results), command=shlex.join(sys.orig_argv))
        (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: cannot write {output}: {error.strerror}; choose another --output") from None


# ---------------------------------------------------------------- every item


def records(files: Sequence[ItemFile], scored: dict[str, Outcomes]) -> list[dict]:
    """One record per item: what it is, and what each model made of it. Log-probs and KL are sums over the answer's tokens, in nats."""
    found = []
    for f, file in enumerate(files):
        sides = {name: outcomes.of(f) for name, outcomes in scored.items()}
        for i, item in enumerate(file.items):
            about = {"id": item.id, "file": file.name, "role": file.role, "metric": file.metric, **_asked(item)}
            found.append(about | {name: _made(outcomes[i]) for name, outcomes in sides.items()})
    return found


def _asked(item: Item) -> dict:
    if not item.prompt:
        return {}
    choices = {"choices": list(item.choices)} if item.choices else {}
    return {"question": item.prompt[-1]["content"], "answers": list(item.answers), **choices}


def _made(outcome: Outcome) -> dict:
    return {name: value for name, value in asdict(outcome).items() if value is not None}


def task_records(tasks: dict[str, dict]) -> list[dict]:
    """One record per document, filter and metric of a task of lm-evaluation-harness."""
    found: dict[tuple, dict] = {}
    for side, scores in tasks.items():
        for (task, filter_name, metric), values in scores.items():
            for document, value in values.items():
                about = {"id": document, "task": task, "filter": filter_name, "metric": metric}
                found.setdefault((task, filter_name, metric, document), about)[side] = value
    return list(found.values())


# ---------------------------------------------------------------- the table


def rows(results: dict) -> list[list[str]]:
    """The table's cells: a row for each file, for each role of several files, and for each task."""
    found = []
    for role, total in results["roles"].items():
        own = [file for file in results["files"] if file["role"] == role]
        found += [_row(role, file["name"], file["metric"], file) for file in own]
        if len(own) > 1:
            found.append(_row(role, f"all {len(own)} files", "", total))
    for task in results["tasks"]:
        metric = task["metric"] if task["filter"] == "none" else f"{task['metric']}, {task['filter']}"
        found.append(_row(task["role"], task["task"], metric, task))
    return found


def _row(role: str, name: str, metric: str, figures: dict) -> list[str]:
    model, base, change = figures["model"], figures.get("base", {}), figures.get("change", {})
    adjusted = [f"{side['chance_adjusted']:.1%}" for side in (base, model) if "chance_adjusted" in side]
    logprobs = [f"{side['logprob_per_token']:.3f}" for side in (base, model) if "logprob_per_token" in side]
    moved = f"{change['difference']:+.1%} {_interval(change['difference_interval'], '+.1%')}" if "difference" in change else ""
    kl = f"{change['kl_per_token']:.4f} {_interval(change['kl_interval'], '.4f')}" if "kl_per_token" in change else ""
    lost, gained = (str(change.get(name, "")) for name in ("lost", "gained"))
    return [role, name, metric, f"{figures['items']:,}", _share(base), _share(model), moved, lost, gained,
            f"{change['p']:.2g}" if "p" in change else "", " → ".join(adjusted), " → ".join(logprobs), kl]


def _share(side: dict) -> str:
    if "mean" in side:
        return f"{side['mean']:.4g} {_interval(side['mean_interval'], '.4g')}"
    return f"{side['accuracy']:.1%} {_interval(side['accuracy_interval'], '.1%')}" if "accuracy" in side else ""


def _interval(interval: Sequence[float], form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def shown(results: dict) -> list[list[str]]:
    """Header and rows, without the columns that no row fills."""
    found = rows(results)
    return [[cell for c, cell in enumerate(row) if any(other[c] for other in found)] for row in (HEADER, *found)]


def table(results: dict) -> str:
    """The figures as aligned text, with what the columns mean and what a reader has to know."""
    cells = shown(results)
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([*lines, *caption(results)])


def caption(results: dict) -> list[str]:
    """What the columns mean, and what a reader has to know."""
    sure = f"intervals of {results['confidence']:.0%}: Wilson for shares, bootstrap over items for the rest"
    lines = [f"{sure}; log-probs and KL in nats per token"]
    if results["base"]:
        lines[0] += ", KL(base || model); p: exact McNemar"
    unfinished = sum(file["model"].get("unfinished", 0) for file in results["files"])
    if unfinished:
        lines.append(f"{unfinished:,} answers of the model were cut off at generation.max_tokens")
    return lines + results["notes"]


# ---------------------------------------------------------------- the page


def plots(results: dict) -> list[Plot]:
    """Accuracy of base and model with intervals; items lost and gained; KL."""
    entries = [(file["name"], file) for file in results["files"]] + [(task["task"], task) for task in results["tasks"]]
    judged = [(name, figures) for name, figures in entries if "accuracy" in figures["model"]][:SHOWN]
    moved = [(name, figures) for name, figures in judged if "lost" in figures.get("change", {})]
    apart = [(name, figures) for name, figures in entries if "kl_per_token" in figures.get("change", {})][:SHOWN]
    drawn = []
    if judged:
        drawn.append(plot("accuracy", "Accuracy", f"With intervals of {results['confidence']:.0%} (Wilson).",
                          lambda axes, theme: _accuracy(axes, theme, judged), _height(judged)))
    if moved:
        drawn.append(plot("transitions", "Items that changed", "Left: right under the base, wrong now; right: the reverse.",
                          lambda axes, theme: _transitions(axes, theme, moved), _height(moved)))
    if apart:
        drawn.append(plot("kl", "Distance from the base", "KL(base || model) over the given answers' tokens, nats per token.",
                          lambda axes, theme: _distance(axes, theme, apart), _height(apart)))
    return drawn


def _height(entries: Sequence) -> float:
    return max(1.6, 0.9 + 0.42 * len(entries))


def _names(axes: Axes, theme: Theme, entries: Sequence[tuple[str, dict]]) -> np.ndarray:
    """Rows from top to bottom, each bearing its name; the grid is along the values."""
    places = np.arange(len(entries), dtype=float)
    axes.set_yticks(places, [name if len(name) <= 22 else name[:21] + "…" for name, _ in entries], color=theme.ink)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    return places


def _accuracy(axes: Axes, theme: Theme, entries: Sequence[tuple[str, dict]]) -> None:
    places = _names(axes, theme, entries)
    sides = [side for side in ("base", "model") if all(side in figures for _, figures in entries)]
    for side, colour, offset in zip(sides, (theme.series[0], theme.series[1]), (-0.13, 0.13) if len(sides) > 1 else (0,)):
        values = np.array([figures[side]["accuracy"] for _, figures in entries])
        low, high = np.array([figures[side]["accuracy_interval"] for _, figures in entries]).T
        axes.errorbar(values, places + offset, xerr=np.abs([values - low, high - values]), fmt="o", color=colour, label=side, capsize=2)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    page.legend(axes)


def _transitions(axes: Axes, theme: Theme, entries: Sequence[tuple[str, dict]]) -> None:
    places = _names(axes, theme, entries)
    for name, sign, colour in (("lost", -1, theme.series[1]), ("gained", 1, theme.series[2])):
        counts = np.array([figures["change"][name] for _, figures in entries])
        axes.barh(places, sign * counts, height=0.5, color=colour, label=name)
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    page.legend(axes)


def _distance(axes: Axes, theme: Theme, entries: Sequence[tuple[str, dict]]) -> None:
    places = _names(axes, theme, entries)
    values = np.array([figures["change"]["kl_per_token"] for _, figures in entries])
    low, high = np.array([figures["change"]["kl_interval"] for _, figures in entries]).T
    axes.errorbar(values, places, xerr=np.abs([values - low, high - values]), fmt="o", color=theme.series[0], capsize=2)
    axes.set_xlim(left=0)
