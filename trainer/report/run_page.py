"""Write the HTML page of a run: outcome, loss, forgetting, speed, data and setup.

It leaves out what the run did not record.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.errors import UserError
from trainer.report import page
from trainer.report.page import Plot, Theme, compact, duration, number, percent, plot

TEMPLATE = Path(__file__).with_name("run_page.html.jinja")
MOST_SOURCES = 10  # bars in the mixture plot; the rest are shown as one


@dataclass
class Run:
    """Contents of a run folder. Absent files and entries are empty."""

    name: str
    steps: list[dict] = field(default_factory=list)  # by step, one each
    evaluations: list[dict] = field(default_factory=list)
    forgetting: list[dict] = field(default_factory=list)  # scores of general and domain items
    end: dict | None = None  # None: the run was killed, or is still running
    unreadable: int = 0  # lines of metrics.jsonl, torn by a kill
    data: dict = field(default_factory=dict)
    replay_search: dict = field(default_factory=dict)  # its probes and choice, if any (trainer/retention/replay_search.py)
    config_text: str = ""
    versions: dict = field(default_factory=dict)
    command: str = ""

    @property
    def sources(self) -> list[dict]:
        return self.data.get("sources", [])

    @property
    def backends(self) -> dict:
        return self.data.get("backends", {})


class Fact(NamedTuple):
    label: str
    value: str
    note: str = ""


class Phase(NamedTuple):
    name: str
    seconds: float
    share: float  # of the run's time


def write_report(run_folder: Path) -> None:
    """Write report.html and its plots (PNG) from a run folder's config.yaml, metrics.jsonl and data.json.

    Raises UserError if the folder does not exist, or if config.yaml or data.json is not what a run writes.
    """
    run = read_run(Path(run_folder))
    page.write(
        Path(run_folder) / "report.html", TEMPLATE, plots(run),
        run=run, outcome=outcome(run), exported=exported_state(run), facts=facts(run), cost_of_probes=cost_of_probes(run),
        phases=phases(run), model=model_table(run),
    )


# --- Reading


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if there is none, or one of its files is malformed."""
    if not folder.is_dir():
        raise UserError(f"report: expected a run folder, found none at {folder}")
    config = _read_mapping(folder / "config.yaml", yaml.safe_load, yaml.YAMLError)
    data = _read_mapping(folder / "data.json", json.loads, json.JSONDecodeError)
    for source in data.get("sources", []):
        samples, seen = source.get("samples"), source.get("epoch_samples")
        source["passes"] = seen / samples if samples and seen is not None else None
    run = Run(folder.resolve().name, data=data,
              replay_search=_read_mapping(folder / "replay_search.json", json.loads, json.JSONDecodeError))
    run.versions, command = config.pop("versions", None) or {}, config.pop("command", "")
    run.command = command if isinstance(command, str) else " ".join(map(str, command))
    run.config_text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""
    _read_metrics(folder / "metrics.jsonl", run)
    return run


def _read_mapping(path: Path, parse, parse_error: type[Exception]) -> dict:
    if not path.exists():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except parse_error as error:
        raise UserError(f"report: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"report: expected a mapping in {path}, found {type(content).__name__}")
    return content


def _read_metrics(path: Path, run: Run) -> None:
    """Fill in steps, evaluations and end.

    A resumed run logs some steps again, so a line drops earlier lines of its own and later steps.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    logged = {"step": run.steps, "eval": run.evaluations, "forgetting": run.forgetting}
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            run.unreadable += 1
            continue
        run.end = record if record["kind"] == "end" else None
        if record["kind"] not in logged:
            continue
        for kind, records in logged.items():
            while records and records[-1]["step"] >= record["step"] + (kind != record["kind"]):
                records.pop()
        logged[record["kind"]].append(record)


def _column(records: list[dict], key: str) -> np.ndarray:
    return np.array([math.nan if record.get(key) is None else record[key] for record in records], dtype=float)


# --- Text


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
    first, last = _column(records, "loss")[[0, -1]]
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
    eval_loss, loss = _column(run.evaluations, "loss"), _column(run.steps, "loss")
    if np.isfinite(eval_loss).any():
        best = int(np.nanargmin(eval_loss))
        at = run.evaluations[best]["step"]
        found.append(Fact("Eval loss", number(eval_loss[best]), f"best, at step {number(at)}"))
    elif run.steps:
        found.append(Fact("Training loss", number(loss[-1]), "at the last logged step"))
    nats = _column(run.steps, "kl")
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


# --- Plots


def plots(run: Run) -> list[Plot]:
    """Draw the plots that the run has figures for."""
    made = []
    if run.steps:
        made += [loss_plot(run), learning_rate_plot(run), throughput_plot(run)]
        made += [kl_plot(run)] if np.isfinite(_column(run.steps, "kl")).any() else []
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
    step, loss = _column(run.steps, "step"), _column(run.steps, "loss")
    window = max(len(loss) // 25, 1)

    def draw(axes: Axes, theme: Theme) -> None:
        if window > 1:
            axes.plot(step, loss, color=theme.series[0], alpha=0.3, linewidth=1)
            smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
            axes.plot(step[window // 2 :][: len(smooth)], smooth, color=theme.series[0], label="training")
        else:
            axes.plot(step, loss, marker=_marker(loss), color=theme.series[0], label="training")
        if run.evaluations:
            axes.plot(_column(run.evaluations, "step"), _column(run.evaluations, "loss"), marker="o",
                      color=theme.series[1], label="eval")
        axes.set_ylabel("loss per supervised token")
        _step_axis(axes)
        page.legend(axes)

    return plot("loss", "Loss", f"Bold: mean over {window} log lines." if window > 1 else "", draw)


def kl_plot(run: Run) -> Plot:
    step, nats = _column(run.steps, "step"), _column(run.steps, "kl")

    def draw(axes: Axes, theme: Theme) -> None:
        axes.plot(step, nats, marker=_marker(nats), color=theme.series[0])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("nats per token")
        _step_axis(axes)

    return plot("kl", "KL to the base", "Part of the objective, shown without its weight.", draw)


def accuracy_plot(run: Run) -> Plot:
    step, floor = _column(run.forgetting, "step"), run.forgetting[0].get("floor")

    def draw(axes: Axes, theme: Theme) -> None:
        for i, role in enumerate(("general", "domain")):
            share = 100 * _column(run.forgetting, role)
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
    step = _column(run.forgetting, "step")

    def draw(axes: Axes, theme: Theme) -> None:
        for i, role in enumerate(("general", "domain")):
            nats = _column(run.forgetting, f"{role}_kl")
            if np.isfinite(nats).any():
                axes.plot(step, nats, marker=_marker(nats), color=theme.series[i], label=role)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("nats per answer token")
        _step_axis(axes)
        page.legend(axes)

    return plot("forgetting_kl", "KL(base || model)", "Over the tokens of the items' right answers.", draw)


def learning_rate_plot(run: Run) -> Plot:
    step, rate = _column(run.steps, "step"), _column(run.steps, "lr")

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
    step = _column(run.steps, "step")

    def draw(axes: Axes, theme: Theme) -> None:
        for i, (key, label) in enumerate((("tokens_per_s", "real tokens"), ("supervised_per_s", "supervised tokens"))):
            values = _column(run.steps, key)
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
            share = 100 * _column(shown, key)
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
