"""Draw the plots of the report from the figures in report.json and samples of the instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from synth.judging.diagnostics import HISTOGRAM_BINS
from synth.reporting.distribution import InstructionSample
from trainer.report import page
from trainer.report.page import Plot, Theme, compact, duration, plot

MAX_BARS = 12  # of one plot


def plots(figures: dict[str, Any], samples: dict[str, InstructionSample]) -> list[Plot]:
    """Draw the plots for which the pool has figures.

    `samples` are the reference, and the pool's first and last step.
    """
    drawn = [_plot_yield(figures["yield"]["left"])] if figures["yield"]["left"]["planned"] else []
    if distribution := figures["distribution"]:
        drawn += _plot_distribution(distribution, samples)
    if figures["judges"]:
        drawn.append(_plot_scores(figures["judges"]["judges"]))
    if figures["selected"]:
        drawn.append(_plot_selected(figures["selected"]))
    if any(row["tokens_per_second"] and row["engine_tokens_per_second"] for row in figures["usage"]):
        drawn += [_plot_speed(figures["usage"]), _plot_time(figures["usage"])]
    return drawn


def _plot_distribution(distribution: dict[str, Any], samples: dict[str, InstructionSample]) -> list[Plot]:
    steps = [step for step in distribution["steps"] if "auc" in step]
    drawn = [_plot_auc(steps, distribution["baseline"]), _plot_topic_distance(steps)] if steps else []
    nats = {name: sample.nats[np.isfinite(sample.nats)] for name, sample in samples.items()}
    if all(len(values) > 1 for values in nats.values()):
        drawn.append(_plot_histograms("nats", "Likelihood under the base", "nats per token", nats,
                                      "Negative log-probability: fewer nats are likelier. A pool that was sampled at too low a temperature "
                                      "lies to the left of the reference."))
    lengths = {name: sample.tokens for name, sample in samples.items()}
    drawn.append(_plot_histograms("lengths", "Length of instructions", "tokens", lengths, "The longest 1% are counted in the last bin."))
    drawn.append(_plot_topics(distribution["topics"], list(samples)))
    return drawn


def _bars(axes: Axes, theme: Theme, names: list[str], columns: dict[str, Iterable[float]], text: Callable[[float], str]) -> None:
    """Draw groups of horizontal bars, each with its value instead of an axis."""
    place, height = np.arange(len(names)), 0.72 / len(columns)
    for i, (label, values) in enumerate(columns.items()):
        bars = axes.barh(place + (i - (len(columns) - 1) / 2) * height, list(values), height=0.88 * height, color=theme.series[i],
                         label=label)
        axes.bar_label(bars, [text(value) for value in values], padding=4, color=theme.muted, fontsize=9)
    _name_rows(axes, theme, names)
    axes.grid(False)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.2)
    if len(columns) > 1:  # right-aligned, because long names of bars leave the axes little width
        axes.legend(loc="lower right", bbox_to_anchor=(1.02, 1.0), ncols=4, frameon=False, handlelength=1.2, columnspacing=1.4)


def _name_rows(axes: Axes, theme: Theme, names: list[str]) -> None:
    axes.set_yticks(np.arange(len(names)), [_shorten(name) for name in names])
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _shorten(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[:length // 2 - 1]}…{name[-length // 2:]}"


def _plot_yield(left: dict[str, int]) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        _bars(axes, theme, list(left), {"items": list(left.values())}, lambda value: f"{value:,.0f}")

    return plot("yield", "Items left after each stage", "As far as the pool has come.", draw, height=0.6 + 0.34 * len(left))


def _plot_auc(steps: list[dict], baseline: dict) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        place = np.arange(len(steps))
        if "auc" in baseline:
            axes.axvspan(0.5 - 2 * baseline["auc_error"], 0.5 + 2 * baseline["auc_error"], color=theme.line, alpha=0.6, linewidth=0)
        axes.axvline(0.5, color=theme.muted, linewidth=1)
        axes.errorbar([step["auc"] for step in steps], place, xerr=[2 * step["auc_error"] for step in steps], fmt="o",
                      color=theme.series[0], elinewidth=1.6, capsize=0)
        _name_rows(axes, theme, [step["step"] for step in steps])
        axes.grid(False)
        axes.set_xlabel("AUC ± 2 standard errors")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.set_xlim(min(0.45, *(step["auc"] - 0.03 for step in steps)), max(0.6, *(step["auc"] + 0.03 for step in steps)))

    return plot("auc", "Can a classifier tell the pool from the reference?", "AUC after each rule; 0.5: no better than chance. Grey: two "
                "standard errors of the AUC between two halves of the reference.", draw, height=1.1 + 0.34 * len(steps))


def _plot_topic_distance(steps: list[dict]) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        columns = {"pool": [step["topics"] for step in steps], "by chance": [step["topics_chance"] for step in steps]}
        _bars(axes, theme, [step["step"] for step in steps], columns, lambda value: f"{value:.3f}")

    return plot("topic_distance", "Topic distance to the reference", "Total variation between the topics' shares, after each rule.", draw,
                height=0.9 + 0.46 * len(steps))


def _plot_topics(topics: list[dict], samples: list[str]) -> Plot:
    largest = topics[:MAX_BARS]

    def draw(axes: Axes, theme: Theme) -> None:
        columns = {name: [100 * topic["shares"][name] for topic in largest] for name in samples}
        _bars(axes, theme, [" ".join(topic["words"][:3]) or "–" for topic in largest], columns, lambda value: f"{value:.1f}%")

    return plot("topics", "Topics", "Shares of the largest topics, each named by its most characteristic words.", draw,
                height=0.6 + (0.13 + 0.14 * len(samples)) * len(largest))


def _plot_histograms(name: str, title: str, label: str, samples: dict[str, np.ndarray], caption: str) -> Plot:
    end = float(np.quantile(np.concatenate(list(samples.values())), 0.99)) or 1.0
    bins = np.linspace(0, end, min(41, int(np.ceil(end)) + 1) if label == "tokens" and end < 41 else 41)

    def draw(axes: Axes, theme: Theme) -> None:
        for i, (sample, values) in enumerate(samples.items()):
            heights = np.histogram(np.minimum(values, end), bins)[0] / len(values)
            axes.stairs(100 * heights, bins, color=theme.series[i], label=sample, linewidth=1.6, fill=i == 0, alpha=0.45 if i == 0 else 1)
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("% of instructions")
        page.legend(axes)

    return plot(name, title, caption, draw)


def _plot_scores(judges: dict[str, dict]) -> Plot:
    shown = dict(list(judges.items())[:4])  # as many as there are colours

    def draw(axes: Axes, theme: Theme) -> None:
        width = 0.4 / len(shown)
        for i, (name, judge) in enumerate(shown.items()):
            counts = np.array(judge["histogram"])
            middle = (HISTOGRAM_BINS[1:] + HISTOGRAM_BINS[:-1]) / 2 + (i - (len(shown) - 1) / 2) * width
            axes.bar(middle, 100 * counts / max(counts.sum(), 1), width=0.9 * width, color=theme.series[i],
                     label=_shorten(name, 40 // len(shown)))
        axes.set_xticks(range(1, 6))
        axes.set_xlabel("score, to the nearest half point")
        axes.set_ylabel("% of scores")
        page.legend(axes)

    rest = f" The first {len(shown)} of {len(judges)} judges." if len(judges) > len(shown) else ""
    return plot("scores", "Scores of each judge", f"Before calibration.{rest}", draw)


def _plot_selected(models: dict[str, dict]) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        columns = {label: [100 * share[key] for share in models.values()]
                   for label, key in (("candidates", "candidates"), ("items", "items"), ("tokens", "tokens"))}
        _bars(axes, theme, list(models), columns, lambda value: f"{value:.1f}%")

    return plot("selected", "Whose responses were selected?", "Each model's share of candidates, selected items and selected tokens.", draw,
                height=0.7 + 0.66 * len(models))


def _plot_speed(rows: list[dict]) -> Plot:
    shown = [row for row in rows if row["tokens_per_second"] and row["engine_tokens_per_second"]][:MAX_BARS]

    def draw(axes: Axes, theme: Theme) -> None:
        columns = {"tokens/s": [row["tokens_per_second"] for row in shown],
                   "while the engine computes": [row["engine_tokens_per_second"] for row in shown]}
        _bars(axes, theme, [_work_name(row) for row in shown], columns, compact)

    return plot("speed", "Throughput", "Generated tokens per second; prompt tokens per second for work that only scores.", draw,
                height=0.7 + 0.46 * len(shown))


def _plot_time(rows: list[dict]) -> Plot:
    shown = [row for row in rows if row["seconds"]][:MAX_BARS]

    def draw(axes: Axes, theme: Theme) -> None:
        _bars(axes, theme, [_work_name(row) for row in shown], {"time": [row["seconds"] for row in shown]}, duration)

    return plot("time", "Time", "By stage and model, without loading the model.", draw, height=0.7 + 0.46 * len(shown))


def _work_name(row: dict) -> str:
    return f"{row['stage']}: {_shorten(row['model'], 14)}"
