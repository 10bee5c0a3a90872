"""Make the page of a record of `make gpu`: targets, tests, kernels, whole steps and contexts.

`make gpu` writes it beside its JSON where jinja2 and matplotlib are installed; elsewhere: `python -m benchmarks.on_gpu.page RECORD`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.model_shapes import MODELS
from benchmarks.speed import kernel_predictions
from benchmarks.speed.kernel_predictions import ARCHS, TARGETS
from trainer.report import page
from trainer.report.page import duration, number, percent

TEMPLATE = Path(__file__).with_name("gpu_page.html.jinja")
OURS, PLAIN, BARE = "Steadfast", "plain HF loop", "base products"  # as records have them
CARD, MODEL = "H200", MODELS[0].name  # what the targets are set for
MET, MISSED, UNKNOWN = "met", "missed", "not measured"


class Table(NamedTuple):
    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


class Target(NamedTuple):
    what: str
    wanted: str
    measured: str
    verdict: str


class Fact(NamedTuple):
    label: str
    value: str
    note: str = ""


def write(record: dict, path: Path) -> None:
    """Render a record into the page `path`."""
    judged = targets(record)
    tables = [table for make in (parts, tests, kernels, whole_steps, rivals, contexts) if (table := make(record)) and table.rows]
    page.write(path, TEMPLATE, [], record=record, targets=judged, card=CARD, facts=facts(record, judged), failures=failures(record),
               skips=skips(record), tables=tables)


def part(record: dict, name: str) -> dict:
    return record["parts"].get(name, {})


# ---------------------------------------------------------------- targets


def targets(record: dict) -> list[Target]:
    """Return the verdicts on targets of a whole step, then of kernels.

    A card other than the one they are set for is not judged.
    """
    applies = CARD in record["device"]
    return [*(step_targets(record) if applies else step_targets({"parts": {}})), *kernel_targets(record if applies else {"parts": {}})]


def step_targets(record: dict) -> list[Target]:
    """Return the verdicts on a whole step's targets.

    A step of ours that could not be timed missed them all.
    """
    rows = {row["contender"]: row for row in part(record, "sizes").get("rows", [])
            if (row.get("model"), row.get("method"), row.get("lengths")) == (MODEL, "lora", "tailed") and row["tokens"] >= 8192}
    ours, plain = rows.get(OURS, {}), rows.get(PLAIN, {})
    mfu, ratio = (ours.get(name, {}).get("value") for name in ("mfu", "ratio"))
    memory = total_mib(ours) / total_mib(plain) if total_mib(ours) and total_mib(plain) else None
    found = [
        Target("MFU", "≥ 70% of a measured product", percent(mfu), verdict(mfu, least=0.70)),
        Target("Real tokens/s", "≥ 3 × the plain loop's", f"{times(ratio)} ×", verdict(ratio, least=3)),
        Target("Peak memory", "≤ 0.5 × the plain loop's", f"{times(memory)} ×", verdict(memory, most=0.5))]
    if ours and ours["outcome"] != "timed":
        found = [target._replace(measured=ours["outcome"], verdict=MISSED) for target in found]
    return [target._replace(what=f"{target.what}, a step of {MODEL}, LoRA") for target in found]


def kernel_targets(record: dict) -> list[Target]:
    """Return the verdicts on kernels' targets.

    Targets are text in `kernel_predictions.TARGETS`: milliseconds and perhaps GB, a share of copying, or what an adapter adds.
    """
    rows = {row["operation"]: row for row in kernel_rows(record) if row["contender"] == OURS and row["model"] == MODEL}
    return [Target(f"{operation}, {MODEL}", re.sub(r"^≤ (\d+)", r"≤ \1 ms", wanted), *judge(wanted, rows.get(operation)))
            for operation, wanted in TARGETS.items()]


def judge(wanted: str, row: dict | None) -> tuple[str, str]:
    """Return the figure measured for a kernel's target, and the verdict.

    A kernel that could not be timed missed it.
    """
    if row is None:
        return "–", UNKNOWN
    if row["ms"] is None:
        return row["outcome"], MISSED
    if found := re.fullmatch(r"≤ \+(\d+)%", wanted):
        base = row["ratio"].get(BARE)
        return (f"{base['value'] - 1:+.1%}", verdict(base["value"] - 1, most=float(found[1]) / 100)) if base else ("–", UNKNOWN)
    if found := re.fullmatch(r"≥ (\d+)% of copying", wanted):
        return percent(row["share_of_copy"]), verdict(row["share_of_copy"], least=float(found[1]) / 100)
    found = re.fullmatch(r"≤ (\d+)(?:, ([\d.]+) GB)?", wanted)
    measured, ends = [f"{number(row['ms']['value'])} ms"], [verdict(row["ms"]["value"], most=float(found[1]))]
    if found[2]:
        gigabytes = row["peak_mib"] * 2**20 / 1e9 if row["peak_mib"] is not None else None
        measured.append(f"{number(gigabytes)} GB")
        ends.append(verdict(gigabytes, most=float(found[2])))
    return ", ".join(measured), next((end for end in (MISSED, UNKNOWN) if end in ends), MET)


def verdict(value, least: float | None = None, most: float | None = None) -> str:
    if not isinstance(value, (int, float)):
        return UNKNOWN
    return MET if (least is None or value >= least) and (most is None or value <= most) else MISSED


# ---------------------------------------------------------------- at a glance


def facts(record: dict, judged: list[Target]) -> list[Fact]:
    ends = [target.verdict for target in judged]
    outcomes = [found["outcome"] for found in record["parts"].values()]
    files = part(record, "tests").get("files", {}).values()
    found = [Fact("Targets met", f"{ends.count(MET)} of {len(ends)}", f"{ends.count(MISSED)} missed, {ends.count(UNKNOWN)} not measured"),
             Fact("Parts passed", f"{outcomes.count('passed')} of {len(outcomes)}")]
    if files:
        total, failed, skipped = (sum(file.get(name, 0) for file in files for name in names)
                                  for names in (("tests",), ("failures", "errors"), ("skipped",)))
        found.append(Fact("Tests passed", number(total - failed - skipped), f"{failed} failed, {skipped} skipped"))
    return found + [Fact(target.what.partition(",")[0], target.measured, target.wanted) for target in judged[:3]
                    if target.verdict != UNKNOWN]


def failures(record: dict) -> list[list[str]]:
    """Return tests that failed, and the last output of files and checks that left nothing else."""
    files = part(record, "tests").get("files", {})
    found = [[f"{file}: {test}", message] for file, about in files.items() for test, message in about.get("failed", {}).items()]
    silent = [[file, about["output"][-300:]] for file, about in files.items() if about.get("output") and not about.get("failed")]
    return found + silent + [[name, about["output"][-300:]] for name, about in record["parts"].items()
                             if about.get("output") and about["outcome"] != "passed"]


def skips(record: dict) -> list[list[str]]:
    """Return reasons why tests were skipped, and how many were."""
    counts: dict[str, int] = {}
    for about in part(record, "tests").get("files", {}).values():
        for why, count in about.get("skipped_because", {}).items():
            counts[why] = counts.get(why, 0) + count
    return [[why, number(count)] for why, count in sorted(counts.items(), key=lambda item: -item[1])]


# ---------------------------------------------------------------- tables


def parts(record: dict) -> Table:
    rows = []
    for name, about in record["parts"].items():
        waiting = about.get("not_reached") or []
        outcome = about["outcome"] + (f"; not reached: {'; '.join(waiting)}" if waiting else "")
        rows.append([name, outcome, duration(about.get("seconds")), when(about["measured"]) if about.get("measured") else ""])
    return Table("Parts", "", ["Part", "Outcome", "Time", "Taken over from"], rows)


def tests(record: dict) -> Table:
    rows = []
    for name, about in part(record, "tests").get("files", {}).items():
        failed = about.get("failures", 0) + about.get("errors", 0)
        status = {None: "out of time", 0: "passed", 5: "nothing to run"}.get(about["status"], "failed")
        rows.append([name, status, number(about["tests"]), number(failed), number(about.get("skipped", 0)), duration(about["seconds"])])
    return Table("Tests", "", ["File", "Outcome", "Tests", "Failed", "Skipped", "Time"], rows)


def kernel_rows(record: dict) -> list[dict]:
    return part(record, "kernels").get("record", {}).get("summary", [])


def kernels(record: dict) -> Table:
    """Return our times, each beside its prediction and the others' times."""
    card = next((known for known in ARCHS if known.device in record["device"]), None)
    predicted = {(row["operation"], row["model"]): row for row in kernel_predictions.predict()} if card else {}
    others: dict[tuple, list[dict]] = {}
    for row in kernel_rows(record):
        others.setdefault((row["operation"], row["model"]), []).append(row)
    rows = []
    for row in (row for row in kernel_rows(record) if row["contender"] == OURS):
        key = row["operation"], row["model"]
        expected = kernel_predictions.predicted_cell(predicted[key], card.name) if key in predicted else "–"
        rest = "; ".join(other_cell(other) for other in others[key] if not other["contender"].startswith(OURS))
        figures = [kernel_predictions.milliseconds(row["ms"]["value"]), number(row["host_ms"]["value"]), gib(row["peak_mib"]),
                   percent(row["share_of_product"]), percent(row["share_of_copy"])] if row["ms"] else [row["outcome"], *["–"] * 4]
        rows.append([row["operation"], row["model"], figures[0], expected, *figures[1:], rest])
    return Table("Kernels", "Milliseconds of forward and backward; in brackets what a LoRA layer is predicted to add to its base products. "
                 "Others: how many times as long they take.",
                 ["Operation", "Model", "ms", "Predicted", "Host ms", "Peak GiB", "Of matmul rate", "Of copy", "Others"], rows)


def other_cell(row: dict) -> str:
    ratio = row["ratio"].get(OURS) if row["ms"] else None
    return f"{row['contender']} {times(ratio['value']) if ratio else row['outcome']}"


def whole_steps(record: dict) -> Table:
    rows = [[f"{case} ({name})", *cells] for name in ("throughput", "sizes")
            for case, *cells in map(step_row, part(record, name).get("rows", []))]
    return Table("Whole steps", "Rates are medians of interleaved rounds with their 20th and 80th percentiles; ratios of real tokens/s "
                 "have 95% intervals. Memory held is that of weights and optimizer's states; a step adds to it at its height.",
                 ["Model, method, lengths", "Contender", "Real tokens/s", "Supervised/s", "Steps/s", "× plain", "MFU", "Padding",
                  "Micro-batch", "Held GiB", "Step adds GiB", "Launches"], rows)


def step_row(row: dict) -> list[str]:
    case = ", ".join(row[name] for name in ("model", "method", "lengths") if name in row) or row["case"]
    if row["outcome"] != "timed":
        return [case, row["contender"], row["outcome"], *["–"] * 9]
    rates = [number(row[name]["value"]) for name in ("supervised_per_second", "steps_per_second")]
    shares = [percent(row["mfu"]["value"]), percent(row["padding"])]
    return [case, row["contender"], spread(row["tokens_per_second"], number), *rates, spread(row.get("ratio"), times), *shares,
            number(row.get("micro_batch")), gib(row["resident_mib"]), gib(row["step_mib"]), number(row["launches"])]


def rivals(record: dict) -> Table:
    found = part(record, "rivals")
    rates, ratios, memory = (found.get(name, {}) for name in ("tokens_per_second", "ratio", "step_mib"))
    rows = [[name, outcome, spread(rates.get(name), number), spread(ratios.get(name), times), gib(memory.get(name))]
            for name, outcome in found.get("outcomes", {}).items()]
    return Table("Beside others' packs", f"{found.get('model', '')} with LoRA; the ratio is that of our real tokens a second to theirs.",
                 ["Contender", "Outcome", "Real tokens/s", "Ours is ×", "Step adds GiB"], rows)


def contexts(record: dict) -> Table:
    """Return a row for each length, a column for each climb, and last the longest that fits."""
    found = part(record, "context")
    climbs: dict[str, dict[int, dict]] = {}
    for row in found.get("rows", []):
        climbs.setdefault(row["climb"], {})[row["tokens"]] = row
    lengths = sorted({tokens for climb in climbs.values() for tokens in climb})
    rows = [[f"{tokens:,}", *(height(climb.get(tokens)) for climb in climbs.values())] for tokens in lengths]
    rows += [["longest that fits", *(number(found.get("longest", {}).get(name)) for name in climbs)]] if climbs else []
    return Table("Context", f"One sample a step, {found.get('model', '')} with LoRA: time of a step, real tokens a second, peak memory.",
                 ["Tokens", *climbs], rows)


def height(row: dict | None) -> str:
    if row is None:
        return "–"
    if row["outcome"] != "timed":
        return row["outcome"]
    memory = f", {gib(total_mib(row))} GiB" if total_mib(row) else ""
    return f"{duration(1 / row['steps_per_second']['value'])}, {number(row['tokens_per_second']['value'])}/s{memory}"


# ---------------------------------------------------------------- figures in words


def total_mib(row: dict) -> float | None:
    """Return the peak memory of a contender: what it holds, and what a step adds."""
    return row["resident_mib"] + row["step_mib"] if row.get("step_mib") is not None and row["outcome"] == "timed" else None


def gib(mib) -> str:
    return f"{mib / 1024:.3g}" if isinstance(mib, (int, float)) else "–"


def times(value) -> str:
    return f"{value:.2f}" if isinstance(value, (int, float)) else "–"


def spread(interval: dict | None, words) -> str:
    return f"{words(interval['value'])} ({words(interval['low'])}-{words(interval['high'])})" if interval else "–"


def when(time: str) -> str:
    return time[:16].replace("T", " ")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu.page", description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON of `make gpu`; the page is written beside it")
    arguments = parser.parse_args(argv)
    try:
        record = json.loads(arguments.record.read_text())
    except (OSError, ValueError) as error:
        print(f"benchmarks.on_gpu.page: cannot read {arguments.record}: {error}", file=sys.stderr)
        return 2
    if record.get("suite") != "gpu":
        print(f"benchmarks.on_gpu.page: expected a record of `make gpu`, got one of {record.get('suite')}", file=sys.stderr)
        return 2
    write(record, arguments.record.with_suffix(".html"))
    print(f"page: {arguments.record.with_suffix('.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
