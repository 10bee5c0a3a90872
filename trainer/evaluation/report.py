"""Write the files of an evaluation, and lay out its table and its page.

The files are results.jsonl (every item), answers.jsonl (the items that were forgotten and gained), results.json (the figures),
config.yaml and report.html.
"""

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
from trainer.evaluation.changed_items import changed_items
from trainer.evaluation.config import Config
from trainer.evaluation.items import Item, ItemFile
from trainer.evaluation.score_items import Outcome, Outcomes
from trainer.report import answers, page
from trainer.report.page import Plot, Theme, plot
from trainer.versions import versions

TEMPLATE = Path(__file__).with_name("evaluation.html.jinja")
HEADER = ("role", "file or task", "metric", "items", "base", "model", "change", "forgotten", "gained", "p", "chance-adjusted",
          "log-prob/token", "KL/token", "ended", "repetition", "words")
MAX_BARS = 12  # bars of a plot; further files are in the table


def refuse_used(output: Path) -> None:
    if (output / "results.json").exists():
        raise UserError(f"output: {output} holds the results of another evaluation; choose another --output, or remove it")


def write(output: Path, config: Config, files: Sequence[ItemFile], scored: dict[str, Outcomes], tasks: dict[str, dict],
          results: dict) -> None:
    """Write the folder of an evaluation, results.json last. Raises UserError if it cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        cli.save_yaml(config, output / "config.yaml", versions=versions("torch", "transformers", "peft", "tokenizers", "lm-eval"),
                      command=shlex.join(sys.orig_argv))
        with (output / "results.jsonl").open("w", encoding="utf-8") as file:
            for record in [*item_records(files, scored), *task_records(tasks)]:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        changed = changed_items(files, scored["base"], scored["model"]) if "base" in scored else []
        answers.write(output, changed)
        header, *cells = filled_columns(results)
        page.write(output / "report.html", TEMPLATE, plots(results), results=results, name=output.resolve().name, rows=cells,
                   header=header, notes=caption(results), command=shlex.join(sys.orig_argv), answers=answers.sections(changed))
        (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: cannot write {output}: {error.strerror}; choose another --output") from None


# ---------------------------------------------------------------- records


def item_records(files: Sequence[ItemFile], scored: dict[str, Outcomes]) -> list[dict]:
    """Return one record per item, with its outcome under each model.

    Log-probs and KL are sums over the answer's tokens, in nats.
    """
    records = []
    for f, file in enumerate(files):
        outcomes_by_model = {name: outcomes.of_file(f) for name, outcomes in scored.items()}
        for i, item in enumerate(file.items):
            record = {"id": item.id, "file": file.name, "role": file.role, "metric": file.metric, **question_fields(item)}
            records.append(record | {name: _outcome_fields(outcomes[i]) for name, outcomes in outcomes_by_model.items()})
    return records


def question_fields(item: Item) -> dict:
    """Return what a record says about an item beside its name: question, answers, choices, rules."""
    question = {"question": item.prompt[-1]["content"], "answers": list(item.answers)} if item.prompt else {}
    choices = {"choices": list(item.choices), "continuation": item.continuation} if item.choices else {}
    rules = {"asked": [asdict(rule) for rule in item.rules]} if item.rules else {}
    return question | {name: value for name, value in choices.items() if value} | rules


def _outcome_fields(outcome: Outcome) -> dict:
    return {name: value for name, value in asdict(outcome).items() if value is not None}


def task_records(tasks: dict[str, dict]) -> list[dict]:
    """Return one record per document, filter and metric of the tasks of lm-evaluation-harness."""
    records: dict[tuple, dict] = {}
    for model_name, scores in tasks.items():
        for (task, filter_name, metric), values in scores.items():
            for document, value in values.items():
                record = {"id": document, "task": task, "filter": filter_name, "metric": metric}
                records.setdefault((task, filter_name, metric, document), record)[model_name] = value
    return list(records.values())


# ---------------------------------------------------------------- the table


def table_rows(results: dict) -> list[list[str]]:
    """Return the cells of the table: a row per file, per role of several files, and per task."""
    rows = []
    for role, total in results["roles"].items():
        files = [file for file in results["files"] if file["role"] == role]
        for file in files:
            rows.append(_table_row(role, file["name"], file["metric"], file))
            rows += [_table_row(role, file["name"], f"rules, {form}", figures | {"items": file["items"]})
                     for form, figures in file.get("rules", {}).items()]
        if len(files) > 1:
            rows.append(_table_row(role, f"all {len(files)} files", "", total))
    for task in results["tasks"]:
        metric = task["metric"] if task["filter"] == "none" else f"{task['metric']}, {task['filter']}"
        rows.append(_table_row(task["role"], task["task"], metric, task))
    return rows


def _table_row(role: str, name: str, metric: str, figures: dict) -> list[str]:
    model, base, change = figures["model"], figures.get("base", {}), figures.get("change", {})
    adjusted = [f"{each['chance_adjusted']:.1%}" for each in (base, model) if "chance_adjusted" in each]
    logprobs = [f"{each['logprob_per_token']:.3f}" for each in (base, model) if "logprob_per_token" in each]
    difference = f"{change['difference']:+.1%} {_interval(change['difference_interval'], '+.1%')}" if "difference" in change else ""
    kl = f"{change['kl_per_token']:.4f} {_interval(change['kl_interval'], '.4f')}" if "kl_per_token" in change else ""
    forgotten, gained = (str(change.get(name, "")) for name in ("lost", "gained"))
    return [role, name, metric, f"{figures['items']:,}", _accuracy_cell(base), _accuracy_cell(model), difference, forgotten, gained,
            f"{change['p']:.2g}" if "p" in change else "", " → ".join(adjusted), " → ".join(logprobs), kl,
            *(" → ".join(f"{each['said'][name]:{form}}" for each in (base, model) if "said" in each)
              for name, form in (("ended", ".0%"), ("repetition", ".0%"), ("words", ".0f")))]


def _accuracy_cell(figures: dict) -> str:
    if "mean" in figures:
        return f"{figures['mean']:.4g} {_interval(figures['mean_interval'], '.4g')}"
    return f"{figures['accuracy']:.1%} {_interval(figures['accuracy_interval'], '.1%')}" if "accuracy" in figures else ""


def _interval(interval: Sequence[float], form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def filled_columns(results: dict) -> list[list[str]]:
    """Return header and rows of the table, without the columns that are empty in all rows."""
    rows = table_rows(results)
    return [[cell for c, cell in enumerate(row) if any(other[c] for other in rows)] for row in (HEADER, *rows)]


def table(results: dict) -> str:
    """Return the table as aligned text, with its caption."""
    cells = filled_columns(results)
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([*lines, *caption(results)])


def caption(results: dict) -> list[str]:
    """Return the lines that explain the columns, and the warnings of the evaluation."""
    lines = [f"{results['confidence']:.0%} intervals: Wilson for accuracies, bootstrap over items otherwise; log-prob in nats per token"]
    if results["base"]:
        lines[0] += "; KL(base || model) in nats per token; p: exact McNemar test"
    if any("said" in file["model"] for file in results["files"]):
        lines.append("ended: answers that the model ended itself; repetition: share of runs of four words that occurred before in the "
                     "answer; words: of an answer, on average")
    if any("rules" in file for file in results["files"]):
        lines.append("rules: strict by prompt, unless the row says otherwise; loose forgives a first or last line, and asterisks")
    unfinished = sum(file["model"].get("unfinished", 0) for file in results["files"])
    if unfinished:
        lines.append(f"{unfinished:,} answers of the model were cut off at their longest length (generation.max_tokens)")
    return lines + results["notes"]


# ---------------------------------------------------------------- the page


def plots(results: dict) -> list[Plot]:
    """Return the plots: accuracy of base and model, items forgotten and gained, KL."""
    entries = [(file["name"], file) for file in results["files"]] + [(task["task"], task) for task in results["tasks"]]
    judged = [(name, figures) for name, figures in entries if "accuracy" in figures["model"]][:MAX_BARS]
    paired = [(name, figures) for name, figures in judged if "lost" in figures.get("change", {})]
    with_kl = [(name, figures) for name, figures in entries if "kl_per_token" in figures.get("change", {})][:MAX_BARS]
    found = []
    if judged:
        found.append(plot("accuracy", "Accuracy", f"Bars: {results['confidence']:.0%} confidence intervals (Wilson).",
                          lambda axes, theme: _accuracy(axes, theme, judged), _height(judged)))
    if paired:
        found.append(plot("transitions", "Forgotten and gained items", "Forgotten: only the base is right; gained: only the model.",
                          lambda axes, theme: _transitions(axes, theme, paired), _height(paired)))
    if with_kl:
        found.append(plot("kl", "KL to the base", "KL(base || model) over right answers and held-out texts, nats per token.",
                          lambda axes, theme: _kl(axes, theme, with_kl), _height(with_kl)))
    return found


def _height(entries: Sequence) -> float:
    return max(1.6, 0.9 + 0.42 * len(entries))


def _label_rows(axes: Axes, theme: Theme, entries: Sequence[tuple[str, dict]]) -> np.ndarray:
    """Label the rows from top to bottom, with grid lines for the values; return the rows' positions."""
    rows = np.arange(len(entries), dtype=float)
    axes.set_yticks(rows, [name if len(name) <= 22 else name[:21] + "…" for name, _ in entries], color=theme.ink)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    return rows


def _accuracy(axes: Axes, theme: Theme, entries: Sequence[tuple[str, dict]]) -> None:
    rows = _label_rows(axes, theme, entries)
    models = [name for name in ("base", "model") if all(name in figures for _, figures in entries)]
    for model, colour, offset in zip(models, (theme.series[0], theme.series[1]), (-0.13, 0.13) if len(models) > 1 else (0,)):
        values = np.array([figures[model]["accuracy"] for _, figures in entries])
        low, high = np.array([figures[model]["accuracy_interval"] for _, figures in entries]).T
        axes.errorbar(values, rows + offset, xerr=np.abs([values - low, high - values]), fmt="o", color=colour, label=model, capsize=2)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    page.legend(axes)


def _transitions(axes: Axes, theme: Theme, entries: Sequence[tuple[str, dict]]) -> None:
    rows = _label_rows(axes, theme, entries)
    for key, label, sign, colour in (("lost", "forgotten", -1, theme.series[1]),
                                     ("gained", "gained", 1, theme.series[2])):
        counts = np.array([figures["change"][key] for _, figures in entries])
        axes.barh(rows, sign * counts, height=0.5, color=colour, label=label)
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    page.legend(axes)


def _kl(axes: Axes, theme: Theme, entries: Sequence[tuple[str, dict]]) -> None:
    rows = _label_rows(axes, theme, entries)
    values = np.array([figures["change"]["kl_per_token"] for _, figures in entries])
    low, high = np.array([figures["change"]["kl_interval"] for _, figures in entries]).T
    axes.errorbar(values, rows, xerr=np.abs([values - low, high - values]), fmt="o", color=theme.series[0], capsize=2)
    axes.set_xlim(left=0)
