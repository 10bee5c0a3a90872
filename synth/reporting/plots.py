"""The plots of a pool's report, from the figures that report.json holds and samples of the instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from synth.judging import diagnostics
from synth.reporting.distribution import Sample
from trainer.report import page
from trainer.report.page import Plot, Theme, compact, duration, plot

MOST = 12  # bars or topics of one plot


def plots(found: dict[str, Any], samples: dict[str, Sample]) -> list[Plot]:
    """Those that the pool has figures for. `samples`: fresh ones, and the pool's first and last step."""
    made = [_yield(found["yield"]["left"])] if found["yield"]["left"]["planned"] else []
    if distribution := found["distribution"]:
        steps = [step for step in distribution["steps"] if "auc" in step]
        made += [_auc(steps, distribution["itself"]), _topic_distance(steps)] if steps else []
        nats = {name: sample.nats[np.isfinite(sample.nats)] for name, sample in samples.items()}
        if all(len(values) > 1 for values in nats.values()):
            made.append(_distributions("nats", "Likelihood under the base", "nats per token", nats,
                                       "Fewer nats: likelier. A pool sampled too cold lies to the left of fresh samples."))
        made.append(_distributions("lengths", "Length of instructions", "tokens", {name: sample.tokens for name, sample in samples.items()},
                                   "The longest hundredth is at the right edge."))
        made.append(_topics(distribution["topics"], list(samples)))
    if found["judges"]:
        made.append(_scores(found["judges"]["judges"]))
    if found["won"]:
        made.append(_won(found["won"]))
    if any(row["rate"] and row["bare"] for row in found["usage"]):
        made += [_rates(found["usage"]), _time(found["usage"])]
    return made


def _bars(axes: Axes, theme: Theme, names: list[str], columns: dict[str, Iterable[float]], text: Callable[[float], str]) -> None:
    """Horizontal bars in groups, each with its value; no other scale."""
    place, height = np.arange(len(names)), 0.72 / len(columns)
    for i, (label, values) in enumerate(columns.items()):
        bars = axes.barh(place + (i - (len(columns) - 1) / 2) * height, list(values), height=0.88 * height, color=theme.series[i],
                         label=label)
        axes.bar_label(bars, [text(value) for value in values], padding=4, color=theme.muted, fontsize=9)
    _names(axes, theme, names)
    axes.grid(False)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.2)
    if len(columns) > 1:  # at the right: the names of bars may leave it little room of its own
        axes.legend(loc="lower right", bbox_to_anchor=(1.02, 1.0), ncols=4, frameon=False, handlelength=1.2, columnspacing=1.4)


def _names(axes: Axes, theme: Theme, names: list[str]) -> None:
    axes.set_yticks(np.arange(len(names)), [_shorten(name) for name in names])
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _shorten(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[:most // 2 - 1]}…{name[-most // 2:]}"


def _yield(left: dict[str, int]) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        _bars(axes, theme, list(left), {"items": list(left.values())}, lambda value: f"{value:,.0f}")

    return plot("yield", "Items left", "After each stage, as far as the pool has come.", draw, height=0.6 + 0.34 * len(left))


def _auc(steps: list[dict], itself: dict) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        place = np.arange(len(steps))
        if "auc" in itself:
            axes.axvspan(0.5 - 2 * itself["auc_error"], 0.5 + 2 * itself["auc_error"], color=theme.line, alpha=0.6, linewidth=0)
        axes.axvline(0.5, color=theme.muted, linewidth=1)
        axes.errorbar([step["auc"] for step in steps], place, xerr=[2 * step["auc_error"] for step in steps], fmt="o",
                      color=theme.series[0], elinewidth=1.6, capsize=0)
        _names(axes, theme, [step["step"] for step in steps])
        axes.grid(False)
        axes.set_xlabel("AUC ± 2 standard errors")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.set_xlim(min(0.45, *(step["auc"] - 0.03 for step in steps)), max(0.6, *(step["auc"] + 0.03 for step in steps)))

    return plot("auc", "Told apart from fresh samples", "A classifier's AUC after each rule; 0.5: not at all. Grey: two standard errors "
                "of what it makes of the two halves of the fresh samples.", draw, height=1.1 + 0.34 * len(steps))


def _topic_distance(steps: list[dict]) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        columns = {"found": [step["topics"] for step in steps], "chance alone": [step["topics_chance"] for step in steps]}
        _bars(axes, theme, [step["step"] for step in steps], columns, lambda value: f"{value:.3f}")

    return plot("topic_distance", "Topic distance to fresh samples", "Total variation between the shares of topics after each rule.", draw,
                height=0.9 + 0.46 * len(steps))


def _topics(topics: list[dict], shown: list[str]) -> Plot:
    largest = topics[:MOST]

    def draw(axes: Axes, theme: Theme) -> None:
        columns = {name: [100 * topic["shares"][name] for topic in largest] for name in shown}
        _bars(axes, theme, [" ".join(topic["words"][:3]) or "–" for topic in largest], columns, lambda value: f"{value:.1f}%")

    return plot("topics", "Topics", "Shares of the largest topics, each named by the words that set it off most.", draw,
                height=0.6 + (0.13 + 0.14 * len(shown)) * len(largest))


def _distributions(name: str, title: str, label: str, shown: dict[str, np.ndarray], caption: str) -> Plot:
    everything = np.concatenate(list(shown.values()))
    end = float(np.quantile(everything, 0.99)) or 1.0
    bins = np.linspace(0, end, min(41, int(np.ceil(end)) + 1) if label == "tokens" and end < 41 else 41)

    def draw(axes: Axes, theme: Theme) -> None:
        for i, (which, values) in enumerate(shown.items()):
            heights = np.histogram(np.minimum(values, end), bins)[0] / len(values)
            axes.stairs(100 * heights, bins, color=theme.series[i], label=which, linewidth=1.6, fill=i == 0, alpha=0.45 if i == 0 else 1)
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("% of instructions")
        page.legend(axes)

    return plot(name, title, caption, draw)


def _scores(judges: dict[str, dict]) -> Plot:
    shown = dict(list(judges.items())[:4])  # as many as there are colours

    def draw(axes: Axes, theme: Theme) -> None:
        width = 0.4 / len(shown)
        for i, (name, judge) in enumerate(shown.items()):
            counts = np.array(judge["histogram"])
            middle = (diagnostics.HISTOGRAM_BINS[1:] + diagnostics.HISTOGRAM_BINS[:-1]) / 2 + (i - (len(shown) - 1) / 2) * width
            axes.bar(middle, 100 * counts / max(counts.sum(), 1), width=0.9 * width, color=theme.series[i],
                     label=_shorten(name, 40 // len(shown)))
        axes.set_xticks(range(1, 6))
        axes.set_xlabel("score, to the nearest half point")
        axes.set_ylabel("% of scores")
        page.legend(axes)

    rest = f" Of {len(judges)} judges the first {len(shown)}." if len(judges) > len(shown) else ""
    return plot("scores", "Scores", f"As the judges gave them, before they are normalised.{rest}", draw)


def _won(models: dict[str, dict]) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        columns = {label: [100 * share[key] for share in models.values()]
                   for label, key in (("candidates", "candidates"), ("items", "items"), ("tokens", "tokens"))}
        _bars(axes, theme, list(models), columns, lambda value: f"{value:.1f}%")

    return plot("won", "Share won", "Of the answers that could be chosen, of the items won, and of the tokens won.", draw,
                height=0.7 + 0.66 * len(models))


def _rates(rows: list[dict]) -> Plot:
    shown = [row for row in rows if row["rate"] and row["bare"]][:MOST]

    def draw(axes: Axes, theme: Theme) -> None:
        columns = {"tokens/s": [row["rate"] for row in shown], "engine alone": [row["bare"] for row in shown]}
        _bars(axes, theme, [_work(row) for row in shown], columns, compact)

    return plot("rates", "Speed", "Tokens written a second; of stages that only score, tokens read.", draw, height=0.7 + 0.46 * len(shown))


def _time(rows: list[dict]) -> Plot:
    shown = [row for row in rows if row["seconds"]][:MOST]

    def draw(axes: Axes, theme: Theme) -> None:
        _bars(axes, theme, [_work(row) for row in shown], {"time": [row["seconds"] for row in shown]}, duration)

    return plot("time", "Time", "Of each stage and model, loading left out.", draw, height=0.7 + 0.46 * len(shown))


def _work(row: dict) -> str:
    return f"{row['stage']}: {_shorten(row['model'], 14)}"
