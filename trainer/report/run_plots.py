"""Draw the plots of a run's page."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.report import page
from trainer.report.page import Plot, Theme, number, percent, plot
from trainer.report.run_records import Run, column

MOST_SOURCES = 10  # bars in the mixture plot; the rest are shown as one


def plots(run: Run) -> list[Plot]:
    """Draw the plots that the run has figures for."""
    made = []
    if run.steps:
        made += [loss_plot(run), learning_rate_plot(run), throughput_plot(run)]
        made += [kl_plot(run)] if np.isfinite(column(run.steps, "kl")).any() else []
    if run.forgetting:
        made += [draw(run) for draw, keys in ((accuracy_plot, ("general", "domain")), (item_kl_plot, ("general_kl", "domain_kl")))
                 if any(key in record for record in run.forgetting for key in keys)]
    if run.data.get("lengths"):
        made.append(lengths_plot(np.array(run.data["lengths"])))
    if run.data.get("pack_fill") and run.data.get("tokens_per_pack"):
        made.append(pack_fill_plot(np.array(run.data["pack_fill"]) / run.data["tokens_per_pack"]))
    shares = [source.get(key) for source in run.sources for key in ("share_samples", "share_tokens")]
    if len(run.sources) > 1 and None not in shares:
        made.append(mixture_plot(run.sources))
    return made


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    page.compact_axis(axes.xaxis)


def _marker(values: np.ndarray) -> str:
    """Mark the points of a line that has only a few."""
    return "o" if np.isfinite(values).sum() < 8 else ""


def loss_plot(run: Run) -> Plot:
    step, loss = column(run.steps, "step"), column(run.steps, "loss")
    window = max(len(loss) // 25, 1)

    def draw(axes: Axes, theme: Theme) -> None:
        if window > 1:
            axes.plot(step, loss, color=theme.series[0], alpha=0.3, linewidth=1)
            smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
            axes.plot(step[window // 2 :][: len(smooth)], smooth, color=theme.series[0], label="training")
        else:
            axes.plot(step, loss, marker=_marker(loss), color=theme.series[0], label="training")
        if run.evaluations:
            axes.plot(column(run.evaluations, "step"), column(run.evaluations, "loss"), marker="o",
                      color=theme.series[1], label="eval")
        axes.set_ylabel("loss per supervised token")
        _step_axis(axes)
        page.legend(axes)

    return plot("loss", "Loss", f"Bold: mean over {window} log lines." if window > 1 else "", draw)


def kl_plot(run: Run) -> Plot:
    step, nats = column(run.steps, "step"), column(run.steps, "kl")

    def draw(axes: Axes, theme: Theme) -> None:
        axes.plot(step, nats, marker=_marker(nats), color=theme.series[0])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("nats per token")
        _step_axis(axes)

    return plot("kl", "KL to the base", "Part of the objective, shown without its weight.", draw)


def accuracy_plot(run: Run) -> Plot:
    step, floor = column(run.forgetting, "step"), run.forgetting[0].get("floor")

    def draw(axes: Axes, theme: Theme) -> None:
        for i, role in enumerate(("general", "domain")):
            share = 100 * column(run.forgetting, role)
            if np.isfinite(share).any():
                ends = 100 * np.array([record[f"{role}_interval"] for record in run.forgetting])
                axes.fill_between(step, *ends.T, color=theme.series[i], alpha=0.15, linewidth=0)
                axes.plot(step, share, marker=_marker(share), color=theme.series[i], label=role)
        if floor is not None:
            lowest = 100 * floor * run.forgetting[0]["general_base"]
            axes.axhline(lowest, color=theme.series[0], linestyle="--", linewidth=1.2, label="floor")
        axes.set_ylim(-2, 102)
        axes.set_ylabel("accuracy, %")
        _step_axis(axes)
        page.legend(axes)

    return plot("forgetting", "General and domain accuracy", "Bands: confidence intervals." + (
        f" The floor is {percent(floor)} of the base's general accuracy." if floor is not None else ""), draw)


def item_kl_plot(run: Run) -> Plot:
    step = column(run.forgetting, "step")

    def draw(axes: Axes, theme: Theme) -> None:
        for i, role in enumerate(("general", "domain")):
            nats = column(run.forgetting, f"{role}_kl")
            if np.isfinite(nats).any():
                axes.plot(step, nats, marker=_marker(nats), color=theme.series[i], label=role)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("nats per answer token")
        _step_axis(axes)
        page.legend(axes)

    return plot("forgetting_kl", "KL(base || model)", "Over the tokens of the items' right answers.", draw)


def learning_rate_plot(run: Run) -> Plot:
    step, rate = column(run.steps, "step"), column(run.steps, "lr")

    def draw(axes: Axes, theme: Theme) -> None:
        axes.plot(step, rate, marker=_marker(rate), color=theme.series[0])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("learning rate")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
        _step_axis(axes)

    highest = np.nanmax(rate) if np.isfinite(rate).any() else math.nan
    return plot("learning_rate", "Learning rate", f"Highest: {scientific(highest)}.", draw)


def scientific(value: float) -> str:
    """Format a number as 0, 2e-4 or 1.5e-5."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value and exponent else f"{value:g}"


def throughput_plot(run: Run) -> Plot:
    step = column(run.steps, "step")

    def draw(axes: Axes, theme: Theme) -> None:
        for i, (key, label) in enumerate((("tokens_per_s", "real tokens"), ("supervised_per_s", "supervised tokens"))):
            values = column(run.steps, key)
            axes.plot(step, values, marker=_marker(values), color=theme.series[i], label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        page.compact_axis(axes.yaxis)
        _step_axis(axes)
        page.legend(axes)

    return plot("throughput", "Throughput", "Padding is not counted; only supervised tokens have a loss.", draw)


def lengths_plot(lengths: np.ndarray) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        axes.hist(lengths, bins=np.linspace(0, lengths.max() + 1, 41), color=theme.series[0], rwidth=0.9)
        axes.set_xlim(0, lengths.max() + 1)
        axes.set_xlabel("tokens in a sample")
        axes.set_ylabel("samples")
        page.compact_axis(axes.xaxis)
        page.compact_axis(axes.yaxis)

    caption = (f"{number(len(lengths))} samples: median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}, "
               f"longest {number(int(lengths.max()))} tokens.")
    return plot("lengths", "Sample lengths", caption, draw)


def pack_fill_plot(fill: np.ndarray) -> Plot:
    def draw(axes: Axes, theme: Theme) -> None:
        axes.hist(100 * fill, bins=np.linspace(0, 100, 41), color=theme.series[0], rwidth=0.9, log=True)
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0.7)
        axes.set_xlabel("filled, % of capacity")
        axes.set_ylabel("packs (log scale)")
        page.compact_axis(axes.yaxis)
        axes.minorticks_off()

    caption = (f"{number(len(fill))} packs in the first epoch: {percent(float(fill.mean()))} full, "
               f"the emptiest {percent(float(fill.min()))}.")
    return plot("pack_fill", "Pack fill", caption, draw)


def mixture_plot(sources: list[dict]) -> Plot:
    shown = sorted(sources, key=lambda source: -source["share_tokens"])
    if len(shown) > MOST_SOURCES:
        rest = shown[MOST_SOURCES - 1 :]
        others = {key: sum(source[key] for source in rest) for key in ("share_samples", "share_tokens")}
        shown = [*shown[: MOST_SOURCES - 1], {"name": f"{len(rest)} others", "role": "", **others}]

    def draw(axes: Axes, theme: Theme) -> None:
        place = np.arange(len(shown))
        for i, (key, label) in enumerate((("share_samples", "samples"), ("share_tokens", "tokens"))):
            share = 100 * column(shown, key)
            bars = axes.barh(place + (i - 0.5) * 0.36, share, height=0.32, color=theme.series[i], label=label)
            axes.bar_label(bars, [f"{value:.1f}%" for value in share], padding=4, color=theme.muted, fontsize=9)
        axes.set_yticks(place, [_shorten(source["name"]) for source in shown])
        axes.tick_params(axis="y", labelcolor=theme.ink)
        axes.invert_yaxis()
        axes.grid(False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.16)
        page.legend(axes)

    replay = [source for source in sources if source.get("role") == "replay"]
    samples, tokens = (percent(sum(source[key] for source in replay)) for key in ("share_samples", "share_tokens"))
    caption = f"Replay is {samples} of the samples and {tokens} of the tokens." if replay else "No replay."
    return plot("mixture", "Mixture", caption, draw, height=0.9 + 0.46 * len(shown))


def _shorten(name: str) -> str:
    """Shorten a name to 20 characters, keeping its end, where numbered names differ."""
    return name if len(name) <= 20 else f"{name[:9]}…{name[-10:]}"
