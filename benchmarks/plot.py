"""Tables and pictures from records alone: `python -m benchmarks.plot` renews the README's tables and the pictures beside the records.

A table goes between two markers in README.md, here or in kernels/, `<!-- benchmark: SUITE -->` (predictions of all models: `SUITE in full`)
and `<!-- end of benchmark -->`. With `--check` nothing is written: the exit status is 1 where a page and the newest records disagree.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

from benchmarks.forgetting import floor
from benchmarks.forgetting.miniature import display
from benchmarks.harness.record import RESULTS, newest, origin
from benchmarks.speed import kernel_predictions, kernels, options
from trainer.errors import UserError

ROOT = RESULTS.parents[1]
PAGES = (ROOT / "README.md", ROOT / "kernels" / "README.md", ROOT / "benchmarks" / "README.md")
BLOCK = re.compile(r"(<!-- benchmark: ([\w-]+)( in full)? -->\n)(.*?)(<!-- end of benchmark -->)", re.DOTALL)
OURS, OTHERS = "#1f6f8b", "#b8b8b8"


def markdown(record: dict) -> str:
    """The table of a record, and the conditions under it."""
    table, _ = view(record)
    return table(record)


def draw(record: dict, path: Path) -> Path:
    """The picture of a record, PNG or SVG by the path's suffix, which depends on nothing but the record."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = record["suite"]  # names inside an SVG are random otherwise
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    _, picture = view(record)
    picture(record, figure, axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    pyplot.close(figure)
    return path


def view(record: dict) -> tuple:
    """The functions that make a table and a picture of this kind of record."""
    views = {"training": (throughput_table, throughput_picture), "gsm8k": (gsm8k_table, gsm8k_picture),
             "demo": (demo_table, demo_picture), "miniature": (study_table, study_picture), "kernels": (kernels.markdown, kernels_picture),
             "kernels-predicted": (prediction_table, prediction_picture), "gpu": (gpu_table, gpu_picture),
             "synthesis": (synthesis_table, synthesis_picture), "compare": (compare_table, compare_picture),
             "scaling": (scaling_table, scaling_picture),
             "retention": (retention_table, retention_picture), "options": (partial(rows_and_conditions, options), options.picture),
             "floor": (partial(rows_and_conditions, floor), floor.picture)}
    return views.get(record["suite"]) or views[record["suite"].split("-")[0]]


def rows_and_conditions(suite: ModuleType, record: dict) -> str:
    """The table of a suite that makes its own rows and conditions."""
    return f"{rows_of_markdown(suite.table(record))}\n\n{suite.conditions(record)}\n"


def rows_of_markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head; all but the first column are figures."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---------------------------------------------------------------- training throughput


def throughput_table(record: dict) -> str:
    rows = [row for row in record["summary"] if not row["line"].endswith("(A/A)")]
    bases = [row["line"] for row in rows if any(row["line"] in other["ratio"] for other in rows)]
    head = ["line", "real tokens per CPU-second", "supervised ones", "padding", "MFU", "memory a step adds, MiB", "operations a step",
            *(f"× {base}" for base in bases)]
    lines = [head]
    for row in rows:
        rate = row["tokens_per_cpu_second"]
        lines.append([
            row["line"], f"{rate['value']:,.0f} ({rate['low']:,.0f}-{rate['high']:,.0f})",
            f"{row['supervised_per_cpu_second']['value']:,.0f}", f"{row['padding']:.0%}", f"{row['mfu']['value']:.0%}",
            f"{row['mib']:,.0f}", f"{row['operations']:,.0f}" if row["operations"] else "",
            *(times(row["ratio"].get(base)) for base in bases)])
    return f"{rows_of_markdown(lines)}\n\n{throughput_conditions(record)}\n"


def times(ratio: dict | None) -> str:
    return f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""


def throughput_conditions(record: dict) -> str:
    c = record["conditions"]
    same = next((row["ratio"] for row in record["summary"] if row["line"].endswith("(A/A)")), {})
    aa = "".join(f" A line timed against itself: {times(ratio)}." for ratio in same.values())
    worst = max(record["agreement"].items(), key=lambda item: item[1])
    left_out = "".join(f" No line of {name}: {why}." for name, why in c.get("left_out", {}).items())
    phases = "".join(f" {name}: {', '.join(f'{phase} {share:.0%}' for phase, share in spent.items())}."
                     for name, spent in c.get("phases", {}).items())
    phases = phases and f" Time by phase, wall:{phases}"
    return (
        f"{c['model']}; {c['adapter']}; {c['chats']} chats ({c['data']}; mean {c['mean_tokens']:.0f} tokens, "
        f"{c['supervised']:.0%} supervised), about {c['tokens_per_step']:,} tokens a step. {record['cpu']}, {record['threads']} "
        f"thread{'s' * (record['threads'] > 1)}; torch {record['versions']['torch']}, transformers "
        f"{record['versions']['transformers']}. Medians of {c['rounds']} interleaved rounds, rates with their 20th and 80th percentiles, "
        f"ratios with 95% intervals; MFU is the share of this machine's matrix-product rate that useful work reaches. Memory: the most "
        f"that a step holds beside weights and moments; operations: of ATen, views apart.{aa} "
        f"Losses agree step by step, at worst to {worst[1]:.0e} ({worst[0]}).{phases}{left_out} "
        f"{origin(record)}.")


def throughput_picture(record: dict, figure, axes) -> None:
    """Bars of real tokens per CPU-second, slowest on top, with their 20th and 80th percentiles; beside them the memory that a step adds."""
    rows = sorted((r for r in record["summary"] if not r["line"].endswith("(A/A)")), key=lambda r: -r["tokens_per_cpu_second"]["value"])
    rates = [row["tokens_per_cpu_second"] for row in rows]
    values = [rate["value"] for rate in rates]
    whiskers = [[r["value"] - r["low"] for r in rates], [r["high"] - r["value"] for r in rates]]
    names, memory = [row["line"] for row in rows], [row["mib"] for row in rows]
    colours = [OURS if name.startswith("Steadfast") else OTHERS for name in names]
    axes.set_axis_off()
    figure.set_size_inches(11, 0.9 + 0.45 * len(rows))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.barh(names, values, xerr=whiskers, ecolor="#555555", color=colours)
    right.barh(names, memory, color=colours)
    for i, (rate, held) in enumerate(zip(rates, memory, strict=True)):
        left.text(rate["high"] + 0.01 * max(values), i, f" {rate['value']:,.0f}", va="center")
        right.text(held, i, f" {held:,.0f}", va="center")
    left.set(xlim=(0, 1.15 * max(rate["high"] for rate in rates)), xlabel="real tokens per CPU-second")
    right.set(xlim=(0, 1.2 * max(memory)), xlabel="memory a step adds, MiB", yticks=[])
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------- GSM8K through the whole trainer


def gsm8k_table(record: dict) -> str:
    head = ["trained", "held-out loss before", "after one epoch", "tokens", "tokens per second", "logits agree within"]
    rows = [[row["line"], f"{row['heldout_loss_before']:.3f}", f"{row['heldout_loss_after']:.3f}", f"{row['tokens']:,}",
             f"{row['tokens_per_second']:,.0f}", f"{row['logits_agree_within']:.0e}"] for row in record["summary"]]
    c, first = record["conditions"], record["summary"][0]
    return (
        f"{rows_of_markdown([head, *rows])}\n\n{c['model']}; {c['precision']} compute, {record['cpu']}, {c['threads']} threads. "
        f"Loss over 3% of the problems, never trained on. Agreement: the merged model in transformers against the adapter in PEFT (LoRA), "
        f"or sdpa against eager attention (full). "
        f"From the start of the process to the end of the first step {c['startup_seconds']['cold']:.1f} s, "
        f"{c['startup_seconds']['warm']:.1f} s once the tokens are cached. {origin(record)}; {first['steps']} steps each.\n")


def gsm8k_picture(record: dict, figure, axes) -> None:
    """Held-out loss over the epoch."""
    for row, colour in zip(record["summary"], (OURS, "#c8803c")):
        steps, losses = [point["step"] for point in row["heldout"]], [point["loss"] for point in row["heldout"]]
        axes.plot(steps, losses, marker="o", color=colour, label=row["line"])
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss")
    axes.legend(frameon=False)


# ---------------------------------------------------------------- the miniature: demo and study


def demo_table(record: dict) -> str:
    columns, c = ("general", "domain", "forgotten"), record["conditions"]
    rows = [[row["line"], *(f"{row[column]:.3f}" for column in columns)] for row in record["summary"]]
    return (
        f"{rows_of_markdown([['model', *columns], *rows])}\n\nExact match of greedy answers to {c['items']['general']} general and "
        f"{c['items']['domain']} domain items, all held out. Forgotten: share of the base's right general answers that are wrong now. "
        f"{c['domain_rows']} domain chats, {c['epochs']} epochs, LoRA; {c['seconds']:.0f} s with both evaluations, "
        f"{record['threads']} thread. {origin(record)}.\n")


def demo_picture(record: dict, figure, axes) -> None:
    """General against domain accuracy, one point an arm."""
    for row in record["summary"]:
        axes.plot(row["domain"], row["general"], "o", markersize=9, color=OURS, clip_on=False)
        axes.annotate(row["line"], (row["domain"], row["general"]), xytext=(8, 8), textcoords="offset points")
    axes.set(xlabel="domain accuracy", ylabel="general accuracy", xlim=(0, 1.15), ylim=(0, 1.1))


def study_table(record: dict) -> str:
    return f"{rows_of_markdown(display.table(record))}\n\n{display.conditions(record)}\n"


def study_picture(record: dict, figure, axes) -> None:
    display.picture(record, figure)


# ---------------------------------------------------------------- kernels


def prediction_table(record: dict) -> str:
    """Of the first model, beside what the newest record of a GPU measured."""
    return kernel_predictions.markdown(record, kernel_predictions.newest_measured(), (record["conditions"]["models"][0]["name"],))


def prediction_picture(record: dict, figure, axes) -> None:
    """Predicted milliseconds of the first model's operations on every part, on a logarithmic axis."""
    model, parts = record["conditions"]["models"][0]["name"], [part["name"] for part in record["conditions"]["parts"]]
    rows = [row for row in record["summary"] if row["model"] == model][::-1]
    figure.set_size_inches(8, 1 + 0.45 * len(rows))
    for i, (part, colour) in enumerate(zip(parts, (OURS, "#c8803c", OTHERS))):
        axes.barh([j + 0.27 * (1 - i) for j in range(len(rows))], [sum(row["ms"][part].values()) for row in rows], 0.25, color=colour,
                  label=part)
    axes.set_yticks(range(len(rows)), [row["operation"] for row in rows])
    axes.set(xscale="log", xlabel=f"predicted ms, forward and backward, {model}")
    axes.legend(frameon=False)


def kernels_picture(record: dict, figure, axes) -> None:
    """How many times as long as ours every other line of the first model's operations takes."""
    model = record["conditions"]["models"][0]["name"]
    rows = [row for row in record["summary"] if row["model"] == model and row["ms"] and kernels.OURS in row["ratio"]][::-1]
    figure.set_size_inches(8, 1 + 0.25 * len(rows))
    axes.barh([f"{row['operation']}: {row['line']}" for row in rows], [row["ratio"][kernels.OURS]["value"] for row in rows], color=OTHERS)
    axes.axvline(1, color=OURS)
    axes.set_xlabel(f"time over Steadfast's, {model}, {record['device']}")


def gpu_table(record: dict) -> str:
    """The outcome of each part of `make gpu`, then the kernels' table."""
    rows = [["part", "outcome"], *([name, f"{part['outcome']} ({part.get('seconds', 0):.0f} s)"] for name, part in record["parts"].items())]
    inside = record["parts"].get("kernels", {}).get("record")
    return rows_of_markdown(rows) + "\n" + (f"\n{kernels.markdown(inside)}" if inside else "")


def gpu_picture(record: dict, figure, axes) -> None:
    if inside := record["parts"].get("kernels", {}).get("record"):
        kernels_picture(inside, figure, axes)


# ---------------------------------------------------------------- synthesis


def synthesis_table(record: dict) -> str:
    """How well the world's distribution comes back, at every setting; below it, what synthesis costs beside the engine's own work."""
    c = record["conditions"]
    head = ["instructions", "topic distance", "invalid", "dropped", "distinct"]
    rows = [[row["sampled"], f"{row['distance']:.3f}", f"{row['invalid']:.1%}", f"{row['dropped']:.1%}", f"{row['distinct']:.0%}"]
            for row in c["distribution"]]
    lines = {row["line"]: row for row in record["summary"]}
    speeds = "; ".join(f"{name} {row['tokens_per_second']['value']:,.0f} tokens/s, {times(row['share_of_bare'])} of bare"
                       for name, row in lines.items())
    writing = c["writing"]
    return (
        f"{rows_of_markdown([head, *rows])}\n\nTotal variation between the shares of the world's eight skills and those among the "
        f"instructions sampled from the miniature base; invalid: no question of any skill. Speed of stage `instruct` ({c['prompts']:,} "
        f"prompts, {c['tokens']:,} tokens, {c['engine']}, {c['rounds']} rounds in turns): {speeds}. The pool: {writing['rows']:,} scores "
        f"written in {writing['seconds']:.1f} s, so {writing['scores'] / 1e6:.1f} million take about "
        f"{writing['extrapolated_seconds']:.0f} s. {record['cpu']}, {record['threads']} thread; {origin(record)}.\n")


def synthesis_picture(record: dict, figure, axes) -> None:
    """Topic distance and the share of invalid instructions, side by side."""
    rows = record["conditions"]["distribution"][::-1]
    figure.set_size_inches(8, 1 + 0.45 * len(rows))
    for i, (key, colour) in enumerate((("distance", OURS), ("invalid", "#c8803c"))):
        axes.barh([j + 0.2 - 0.4 * i for j in range(len(rows))], [row[key] for row in rows], 0.38, color=colour,
                  label={"distance": "topic distance", "invalid": "invalid"}[key])
    axes.set_yticks(range(len(rows)), [row["sampled"] for row in rows])
    axes.legend(frameon=False)


# ---------------------------------------------------------------- scaling


def scaling_table(record: dict) -> str:
    """Cost of a token at every point, and how a step's cost grows over each setting."""
    c, points = record["conditions"], {}
    for row in record["summary"]:
        points.setdefault((row["axis"], row["value"]), {})[row["line"]] = row
    names = list(dict.fromkeys(row["line"] for row in record["summary"]))
    rows = [["setting", "value", *(f"{name}, µs a token" for name in names), f"speed, × {names[0]}"]]
    for (axis, value), lines in points.items():
        costs = [f"{row['us_per_token']['value']:,.0f}" if row["us_per_token"] else row["outcome"] for row in lines.values()]
        rows.append([axis, f"{value:,}", *costs, times(lines[names[-1]]["ratio"].get(names[0]))])
    same = [row["same"]["value"] for row in record["summary"] if row["same"]]
    again = f" A line timed against itself: {min(same):.2f}-{max(same):.2f} over all points." if same else ""
    powers = "; ".join(f"{name} {power:.2f}" for name, power in c["growth"].items() if power is not None)
    middle, model = c["middle"], c["middle"]["model"]
    unit = f"CPU-time, {record['cpu']}, {record['threads']} thread{'s' * (record['threads'] > 1)}" if record["device"] == "cpu" else (
        f"time on {record['device']}")
    return (
        f"{rows_of_markdown(rows)}\n\nA Llama of width {model['width']} with {model['layers']} layers, random weights, {c['dtype']}; one "
        f"setting varied at a time from {middle['count']} samples of {middle['length']} tokens, vocabulary {model['vocabulary']:,}, LoRA "
        f"of rank {middle['rank']} on all linear layers; half of the tokens supervised, no padding on either side. Context: one sample. "
        f"{unit}; medians of {c['rounds']} interleaved rounds, ratios with 95% intervals.{again} Power that a step's cost grows with, from "
        f"the smallest to the largest value: {powers}. Losses agree, at worst to {max(record['agreement'].values()):.0e}. "
        f"{origin(record)}.\n")


def scaling_picture(record: dict, figure, axes) -> None:
    """Cost of a token over each setting, both axes logarithmic."""
    from matplotlib import ticker

    axes.set_axis_off()
    settings = list(dict.fromkeys(row["axis"] for row in record["summary"]))
    costs = [row["us_per_token"]["value"] for row in record["summary"] if row["us_per_token"]]
    figure.set_size_inches(3 * len(settings), 3)
    for i, axis in enumerate(settings):
        panel = figure.add_subplot(1, len(settings), i + 1)
        for name, colour in ((record["summary"][0]["line"], OTHERS), ("Steadfast", OURS)):
            rows = [row for row in record["summary"] if (row["axis"], row["line"]) == (axis, name) and row["us_per_token"]]
            panel.plot([row["value"] for row in rows], [row["us_per_token"]["value"] for row in rows], marker="o", color=colour, label=name)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="µs a token" if i == 0 else "")
        values = sorted({row["value"] for row in record["summary"] if row["axis"] == axis})
        panel.set_xticks(values, [f"{value // 1024}k" if value >= 1024 else str(value) for value in values])
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.minorticks_off()
        panel.set_ylim(0.9 * min(costs), 1.1 * max(costs))
        panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)


# ---------------------------------------------------------------- forgetting on real text


def retention_table(record: dict) -> str:
    """Every arm beside the base: what it knows and what it lost in general, and what it gained on the domain."""
    head = ["arm", "general", "domain", "forgotten", "gained", "general text", "KL, general", "KL, domain", "decisions", "solutions"]
    keys = ("general", "domain", "forgotten", "gained", "text", "kl_general", "kl_domain", "decisions", "solutions")
    rows = [head] + [[row["line"], *(estimated(row, key, sign=key in ("domain", "text")) for key in keys)] for row in record["summary"]]
    return f"{rows_of_markdown(rows)}\n\n{retention_conditions(record)}\n"


def estimated(row: dict, key: str, sign: bool = False) -> str:
    """A mean, with its standard error where it has one."""
    error = row.get(f"{key}_error")
    value = f"{row[key]:+.3f}" if sign and row[key] else f"{row[key]:.3f}"
    return value + (f" ± {error:.3f}" if error is not None else "")


def retention_conditions(record: dict) -> str:
    c = record["conditions"]
    items, seeds = c["items"], c["seeds"]
    schooled = "; ".join(f"{name} {figures['base']:.2f} to {figures['model']:.2f}" for name, figures in c["schooled"].items())
    return (
        f"General: exact match of greedy answers to {items['skills']} skill items; forgotten, gained: share of those that the base has "
        f"right, or wrong, and the arm does not. Domain and general text: change of the log-prob of held-out answers against the base, "
        f"nats per token ({items['problems']} problems of GSM8K's test set; {items['long answers']} PubMedQA answers and {items['tasks']} "
        f"self-instruct tasks). KL: from the base on these answers, nats per token. Decisions: {items['decisions']} of PubMedQA, accuracy "
        f"adjusted for chance. Solutions: the right one of four is the likeliest per token ({items['solutions']} problems; by chance 0.25)."
        f" Means of {seeds} seed{'s' * (seeds > 1)}{' ± standard error' * (seeds > 1)}; {c['steps']} steps of {c['tokens']:,} tokens for "
        f"every arm, {c['ratio']:.0%} of them replay where there is any; LoRA of rank 16 unless full; {c['precision']} training. The base: "
        f"Llama, {c['parameters'] / 1e6:.1f} M parameters, from random weights in {c['base_cpu_seconds'] / 60:.1f} CPU minutes, which "
        f"brought held-out log-probs per token from {schooled}. {c['seconds'] / 60:.0f} minutes with {c['workers']} workers of one thread "
        f"on {record['cpu']}. {origin(record)}.")


def retention_picture(record: dict, figure, axes) -> None:
    """What each arm keeps in general, of skills and of text, beside what it learns of the domain; whiskers are standard errors."""
    axes.set_axis_off()
    rows = record["summary"][::-1]
    figure.set_size_inches(10, 1 + 0.35 * len(rows))
    for i, (key, name) in enumerate((("general", "general: skill items right"), ("text", "general text: nats per token, against the base"),
                                     ("domain", "GSM8K: nats per token, against the base"))):
        panel = figure.add_subplot(1, 3, i + 1)
        panel.barh([row["line"] for row in rows], [row[key] for row in rows], xerr=[row.get(f"{key}_error") or 0 for row in rows],
                   ecolor="#555555", color=[OTHERS if row["line"] == "base" or "domain only" in row["line"] else OURS for row in rows])
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelleft=i == 0, labelsize=9)
        panel.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------- one commit against another


def compare_table(record: dict) -> str:
    """How many times as fast as the other commit, what is noise, and what that makes of it."""
    c = record["conditions"]
    here, there = (record["commit"] or "none")[:8] + " with changes" * bool(record["dirty"]), c["other"][:8]
    rows = [["case", f"{here}, CPU-ms a step", f"{there}, CPU-ms a step", f"speed, × {there}", f"A/A {here[:8]}", f"A/A {there}",
             "results differ by", "outcome"]]
    for row in record["summary"]:
        ms = [f"{row['cpu_ms'][side]['value']:.3g}" for side in ("this", "other")]
        apart = f"{row['results_differ']:.0e}" if row["results_differ"] else "0"
        rows.append([row["line"], *ms, times(row["ratio"]["other"]), *map(times, row["same"].values()), apart, row["outcome"]])
    left_out = "".join(f" Left out: {case} ({why})." for case, why in c["left_out"].items())
    return (
        f"{rows_of_markdown(rows)}\n\nMedians of {c['rounds']} interleaved rounds, each side in processes of its own, started "
        f"{c['starts']} times; ratios with {c['confidence']:.0%} intervals. A/A: a commit's second process over its first. Slower or "
        f"faster: the interval excludes 1, and the ratio is further from 1 than the interval of either A/A reaches.{left_out} "
        f"{record['cpu']}, {record['threads']} thread{'s' * (record['threads'] > 1)}; `{record['command']}`, {record['time'][:10]}.\n")


def compare_picture(record: dict, figure, axes) -> None:
    """The ratio of every case with its interval, over those of the A/As."""
    rows = record["summary"][::-1]
    figure.set_size_inches(8, 1 + 0.35 * len(rows))
    for i, row in enumerate(rows):
        ratio = row["ratio"]["other"]
        for same, place in zip(row["same"].values(), (i + 0.18, i - 0.18)):
            axes.barh(place, same["high"] - same["low"], 0.3, left=same["low"], color=OTHERS)
        axes.errorbar(ratio["value"], i, xerr=[[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]], fmt="o", color=OURS)
    axes.axvline(1, color="#555555", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["line"] for row in rows])
    axes.set_xlabel(f"speed over that of {record['conditions']['other'][:8]} (grey: each commit over itself)")


# ---------------------------------------------------------------- README


def renew(text: str, records: dict[str, dict]) -> str:
    """README text with the table of every marked suite written anew."""
    def table(block: re.Match) -> str:
        if block[2] not in records:
            raise UserError(f"README.md: expected a record of suite {block[2]} in benchmarks/results, found none; run its benchmark first")
        record = records[block[2]]
        table = kernel_predictions.markdown(record, kernel_predictions.newest_measured()) if block[3] else markdown(record)
        return block[1] + table + block[5]

    return BLOCK.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="README tables and pictures from the newest records.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where README.md differs from the records")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the pictures; the README shows PNG (default)")
    arguments = parser.parse_args(argv)
    try:
        records = newest()
        texts = {page: page.read_text() for page in PAGES}
        renewed = {page: renew(text, records) for page, text in texts.items()}
    except (UserError, FileNotFoundError) as error:
        print(f"benchmarks.plot: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        for page in PAGES:
            if renewed[page] != texts[page]:
                print(f"benchmarks.plot: {page.name} differs from the newest records; run python -m benchmarks.plot", file=sys.stderr)
        return int(renewed != texts)
    for page, text in renewed.items():
        page.write_text(text)
    for suite, record in records.items():
        print(draw(record, RESULTS / f"{suite}.{arguments.format}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
