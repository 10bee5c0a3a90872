"""Measure `--replay_search.enabled`: its choices, the cost of its probes, and the accuracy kept.

The novice base of the miniature study is trained on the domain for ten epochs: without replay; with the replay ratio and KL weight that
the search chooses for a floor of 99%, by probes of a quarter or a half of the epochs; and with fixed ratios, as probes of an eighth and a
quarter and as whole runs, of which one is evaluated throughout. A run monitors items of one draw; the figures of the table are of another.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.forgetting.job import Job
from benchmarks.forgetting.miniature import study
from benchmarks.forgetting.miniature.arms import Arm
from benchmarks.forgetting.miniature.family import STUDIED
from benchmarks.forgetting.miniature.replays import make_replay_sets
from benchmarks.forgetting.miniature.study import Size
from benchmarks.forgetting.miniature.summary import share
from benchmarks.forgetting.miniature.world import heldout_items, write_jsonl
from benchmarks.harness import parallel, record, show
from benchmarks.harness.parallel import quietly, results_of
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from trainer.config import Config, Forgetting, Retention
from trainer.retention import replay_search
from trainer.run import train

BASE, REPLAY, FLOOR = "novice", "plus", 0.99
MONITOR_SEED_OFFSET = 1000  # added to the seed of the items that a run monitors
MAX_ANSWER_TOKENS = 16  # more than any right answer has


@dataclass(frozen=True)
class Part:
    """A fraction of the epochs of a whole run."""

    name: str
    share: float


EIGHTH, QUARTER, HALF, WHOLE = Part("an eighth", 1 / 8), Part("a quarter", 1 / 4), Part("a half", 1 / 2), Part("the whole", 1.0)


@dataclass(frozen=True)
class Run:
    """A row of the table: a run with a fixed replay ratio, a searched one, or without replay.

    Without `part` there is no replay; without `ratio` the search chooses one, by probes of `part` of the epochs.
    """

    part: Part | None = None
    ratio: float | None = None  # of replay
    kl: float = 0.0  # kl_weight
    monitored: bool = False  # evaluated throughout

    @property
    def name(self) -> str:
        if self.part is None:
            return "domain only"
        if self.ratio is None:
            return f"auto, probes of {self.part.name}"
        return f"{self.ratio:.0%} replay{f', KL {self.kl:g}' * (self.kl > 0)}: {self.part.name}"


SEARCHED = (Run(QUARTER), Run(HALF))
FIXED = tuple(Run(part, ratio, kl, monitored=(part, ratio) == (WHOLE, 0.5))
              for ratio, kl in ((0.2, 0.0), (0.35, 0.0), (0.5, 0.0), (0.65, 0.0), (0.65, 1.0)) for part in (EIGHTH, QUARTER, WHOLE))


@dataclass(frozen=True)
class Plan:
    """The runs of the suite, and sizes of data and training."""

    runs: tuple[Run, ...] = (Run(), *SEARCHED, *FIXED)
    size: Size = Size()
    epochs: float = 10.0
    items: int = 100  # of each skill, that a run monitors
    every: int = 30  # steps between evaluations of the run that is evaluated throughout


QUICK = Plan((Run(), SEARCHED[0], Run(QUARTER, 0.5), Run(WHOLE, 0.5, monitored=True)), Size(instructions=300, domain=60), epochs=2.0,
             items=5, every=3)


# ---------------------------------------------------------------- one run


def measure(run: Run, plan: Plan, seed: int, work: Path) -> dict:
    """Train and evaluate a run; return its figures and its marks, item by item."""
    job = job_of(run, plan, seed, work)
    with quietly(job.output.with_suffix(".log")):
        begun = time.perf_counter()
        result = train(recipe(run, plan, job))
        seconds = time.perf_counter() - begun
        general, domain = study.marks_of(STUDIED[BASE].folder, result.folder, job)
    row = {"line": run.name, "seed": seed, "part": run.part and run.part.name, "share": run.ratio, "kl": run.kl, "steps": result.steps,
           "seconds": seconds, "general": general, "domain": domain, "held": None, "probes": [], "curve": []}
    if run.part and run.ratio is None:
        searched = json.loads((result.folder / replay_search.FILE_NAME).read_text())
        row |= {"probes": searched["probes"], "held": result.forgetting["holds_floor"],
                "share": searched["choice"]["ratio"], "kl": searched["choice"]["kl_weight"],
                "seconds": seconds - sum(probe["seconds"] for probe in searched["probes"])}
    if run.monitored:
        metrics = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
        row["curve"] = [{"step": metric["step"], "retained": metric["general_retained"], "domain": metric["domain"]}
                        for metric in metrics if metric["kind"] == "forgetting"]
    return row


def job_of(run: Run, plan: Plan, seed: int, work: Path) -> Job:
    """Return the run as an arm of the study."""
    return Job(BASE, Arm(run.name.replace(":", ","), REPLAY if run.part else None), seed, plan.size, work)


def recipe(run: Run, plan: Plan, job: Job) -> Config:
    """Return the configuration of a run.

    With a fixed ratio it is the one that the replay search gives a probe of this part.
    """
    config = replace(study.recipe(job), epochs=plan.epochs, max_steps=None)
    if run.part is None:
        return config
    items = {kind: str(write_items(job, kind, plan.items)) for kind in ("general", "domain")}
    search_config = replace(config, replay=replace(config.replay, ratio=None),
                            replay_search=replace(config.replay_search, enabled=True, probe_fraction=run.part.share),
                            forgetting=Forgetting(**items, max_tokens=MAX_ANSWER_TOKENS, floor=FLOOR))
    if run.ratio is None:
        return search_config
    probe = replay_search.probe_config(search_config, run.ratio, run.kl)
    forgetting = replace(search_config.forgetting, floor=None, every=plan.every) if run.monitored else Forgetting()
    return replace(probe, output=config.output, forgetting=forgetting, retention=Retention(kl_weight=run.kl), logging=config.logging)


def write_items(job: Job, kind: str, count: int) -> Path:
    """Write the items that a run is monitored on."""
    skills, _ = study.ITEMS[kind]
    rows = [{"prompt": item.instruction, "answer": item.answer} for item in heldout_items(skills, count, MONITOR_SEED_OFFSET + job.seed)]
    return write_jsonl(rows, job.output.with_suffix(f".{kind}-items.jsonl"))


def measure_base(seed: int, plan: Plan, work: Path) -> dict:
    """Evaluate the base on a seed's items."""
    outcome, = study.measure_base(Job(BASE, Arm("base"), seed, plan.size, work))
    return {"line": "base", "seed": seed, "general": outcome.general, "domain": outcome.domain}


def make_pool(plan: Plan, work: Path) -> dict:
    """Make the replay set, and return its statistics."""
    with quietly(work / "synth.log"):
        return make_replay_sets(work, BASE, [REPLAY], plan.size.instructions)[0]


# ---------------------------------------------------------------- all runs


def run_all(plan: Plan, seeds: int, work: Path, workers: int, begun: float) -> tuple[list[dict], dict]:
    """Measure the base and every run with every seed; also return the replay set's statistics."""
    def submit(runs: Sequence[Run]) -> list:
        return [pool.submit(measure, run, plan, seed, work) for seed in range(seeds) for run in runs]

    with parallel.pool(workers) as pool:
        replay_set = pool.submit(make_pool, plan, work)
        without_replay = [*(pool.submit(measure_base, seed, plan, work) for seed in range(seeds)),
                          *submit([r for r in plan.runs if not r.part])]
        replay_stats = replay_set.result()
        with_replay = submit([r for r in plan.runs if r.part])
        rows = results_of(begun, without_replay + with_replay, lambda row: f"{row['line']}, seed {row['seed']}")
    order = ["base", *(run.name for run in plan.runs)]
    return sorted(rows, key=lambda row: (order.index(row["line"]), row["seed"])), replay_stats


def summary(runs: Sequence[dict]) -> list[dict]:
    """Return a row for each run: what it keeps of the base, and what its probes cost."""
    base = {run["seed"]: share(run["general"]) for run in runs if run["line"] == "base"}
    rows = []
    for run in runs:
        if run["line"] == "base":
            continue
        probes = run["probes"]
        rows.append({
            **{name: run[name] for name in ("line", "seed", "part", "share", "kl", "steps", "seconds", "held")}, "probes": len(probes),
            "probe_steps": sum(probe["steps"] for probe in probes) / run["steps"],
            "probe_seconds": sum(probe["seconds"] for probe in probes),
            "retained": share(run["general"]) / base[run["seed"]], "domain": share(run["domain"])})
    return rows


# ---------------------------------------------------------------- how a record is shown


def table(record: dict) -> list[list[str]]:
    rows = [["run", "replay", "KL", "probes", "their steps, of the run's", "their seconds", "seconds of the run", "general, of the base's",
             "domain"]]
    several = record["conditions"]["seeds"] > 1
    for row in record["summary"]:
        cost = [f"{row['probes']}", f"{row['probe_steps']:.0%}", f"{row['probe_seconds']:.0f}"] if row["probes"] else [""] * 3
        replay = ["", ""] if row["share"] is None else [f"{row['share']:.0%}", f"{row['kl']:g}"]
        rows.append([row["line"] + f", seed {row['seed']}" * several, *replay, *cost, f"{row['seconds']:.0f}", f"{row['retained']:.1%}",
                     f"{row['domain']:.1%}"])
    return rows


def caption(record: dict) -> Caption:
    c = record["conditions"]
    reached = tuple(f"The run after {row['probes']} {row['line'].removeprefix('auto, ')} {'kept' if row['held'] else 'missed'} the floor."
                    for row in record["summary"] if row["probes"])
    curves = tuple(f"Measured all along, {run['line']}: {curve_summary(run['curve'])}." for run in monitored_runs(record))
    return Caption(
        f"Auto: `--replay_search.enabled` with a floor of {c['floor']:.0%} of the base's right answers to "
        f"{c['watched_items']['general']} general items; other runs have a given share of replay. General and domain: exact match of "
        f"greedy answers to {c['items']['general']} and {c['items']['domain']} items of another draw.",
        (*reached, "An eighth, a quarter, a half: of the run's passes over the domain, with the whole learning-rate schedule.",
         f"The novice base of the miniature study, its replay set `{c['replay']['replay']}` ({c['replay']['rows']:,} rows, "
         f"{c['replay']['right']:.1%} of the known answers right), {c['domain']} domain rows, {c['epochs']:g} epochs, LoRA of rank 16, "
         f"{c['tokens']} tokens a step.", *curves,
         f"{c['seconds'] / 60:.0f} minutes with {c['workers']} workers of one thread on {record['cpu']}. {origin(record)}."))


def monitored_runs(record: dict) -> list[dict]:
    """Return the runs that were evaluated throughout."""
    return [run for run in record["raw"]["runs"] if run.get("curve")]


def curve_summary(curve: Sequence[dict]) -> str:
    """Return how much of the base's accuracy a run keeps over its steps."""
    last = curve[-1]["step"]
    lowest = min(curve, key=lambda point: point["retained"])
    third = max((point for point in curve if 3 * point["step"] <= last), key=lambda point: point["step"])
    end = min(point["retained"] for point in curve if 5 * point["step"] >= 4 * last)
    return (f"{lowest['retained']:.1%} of the base's accuracy at its lowest, step {lowest['step']} of {last}, "
            f"{third['retained']:.1%} after a third, {end:.1%} or more in the last fifth, {curve[-1]['retained']:.1%} at the end")


def draw(record: dict, figure) -> None:
    """Draw what probes and whole runs keep at fixed replay ratios, and one run over its steps."""
    figure.set_size_inches(10, 3.9)
    left, right = (show.bare(panel) for panel in figure.subplots(1, 2))
    fixed = [row for row in record["summary"] if row["share"] is not None and not row["probes"] and not row["kl"] and row["seed"] == 0]
    for part, colour in zip((EIGHTH, QUARTER, WHOLE), (show.OTHERS, show.SECOND, show.OURS)):
        points = sorted((row["share"], row["retained"]) for row in fixed if row["part"] == part.name)
        left.plot(*zip(*points), marker="o", color=colour, label=part.name) if points else None
    left.set(xlabel="share of replay", ylabel="general accuracy, of the base's")
    left.legend(frameon=False)
    for run in monitored_runs(record)[:1]:
        steps = [point["step"] for point in run["curve"]]
        right.plot(steps, [point["retained"] for point in run["curve"]], color=show.OURS, label="general, of the base's")
        right.plot(steps, [point["domain"] for point in run["curve"]], color=show.OTHERS, label="domain")
        right.set(xlabel=f"step, {run['line']}", ylim=(0, 1.05))
        right.legend(frameon=False)


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parallel.add_arguments(parser, seeds=1)
    parser.add_argument("--quick", action="store_true", help="four short runs on a tenth of the data: a smoke test")


def run(arguments: argparse.Namespace) -> dict:
    parallel.check(arguments)
    begun, plan = time.perf_counter(), QUICK if arguments.quick else Plan()
    with parallel.working_folder(arguments) as work:
        runs, replay_stats = run_all(plan, arguments.seeds, work, arguments.workers, begun)
    conditions = {
        "floor": FLOOR, "epochs": plan.epochs, "domain": plan.size.domain, "tokens": plan.size.tokens, "seeds": arguments.seeds,
        "items": {kind: len(skills) * count for kind, (skills, count) in study.ITEMS.items()},
        "watched_items": {kind: len(skills) * plan.items for kind, (skills, _) in study.ITEMS.items()}, "replay": replay_stats,
        "workers": arguments.workers, "seconds": time.perf_counter() - begun}
    return record.make("floor-cpu", conditions, {}, summary(runs), {"runs": runs})


SUITE = Suite("floor", "The accuracy floor: what the replay search chooses, and how much accuracy a run keeps", add_arguments, run,
              {"floor": View(table, caption, draw, lambda record: "What probes foretell, and what the whole run keeps")})
