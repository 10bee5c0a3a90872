"""Compare ways to prevent forgetting: arms fine-tune the same miniature bases on the same domain.

`synth.run` makes one pool of judged responses for each base; every synthetic replay set is selected from it, and `trainer.run` trains every
arm and seed. A seed draws the domain rows, the test items, the order of the data and the adapter's initial weights; all seeds share the
pool.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peft import PeftModel

from benchmarks.forgetting.job import LEARNING_RATES, Job, configuration
from benchmarks.forgetting.miniature import arms, display, summary
from benchmarks.forgetting.miniature.arms import Arm
from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.evaluate import evaluate
from benchmarks.forgetting.miniature.family import STUDIED, load
from benchmarks.forgetting.miniature.replays import make_replay_sets, replay_file, write_world_set
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl
from benchmarks.harness import parallel, record
from benchmarks.harness.parallel import quietly, results_of
from benchmarks.harness.suite import Suite, View
from trainer.config import Config, Data, Logging, Model, Replay
from trainer.interpolate import Interpolate, interpolate
from trainer.run import train

ITEMS = {"general": (GENERAL, 200), "domain": (DOMAIN, 100)}  # skills, and items of each


@dataclass(frozen=True)
class Size:
    """Sizes of data and training."""

    instructions: int = 3000  # in each pool, and in each set drawn from skills
    domain: int = 600  # rows
    steps: int = 900
    tokens: int = 512  # a step: about 14 chats


@dataclass(frozen=True)
class Outcome:
    """Marks of one set of weights: a string for each kind of items, 1 for a right answer, else 0."""

    base: str
    arm: str
    seed: int
    general: str
    domain: str
    seconds: float = 0.0  # CPU time of the training


# ---------------------------------------------------------------- one arm


def measure(job: Job) -> list[Outcome]:
    """Train an arm, and evaluate the trained model and its interpolations with the base."""
    base = STUDIED[job.base].folder
    with quietly(job.output.with_suffix(".log")):
        begun = time.process_time()
        folder = train(recipe(job)).folder
        seconds = time.process_time() - begun
        outcomes = [Outcome(job.base, job.arm.name, job.seed, *marks_of(base, folder, job), seconds)]
        if job.arm.alphas:
            points = folder / "points"
            interpolate(Interpolate(output=str(points), model=Model(path=str(base)), adapter=str(folder / "adapter"),
                                    alpha=[*job.arm.alphas]))
            outcomes += [Outcome(job.base, job.arm.alpha_name(alpha), job.seed, *marks_of(base, points / f"alpha-{alpha:g}", job))
                         for alpha in job.arm.alphas]
    return outcomes


def recipe(job: Job) -> Config:
    """Return the configuration of an arm's run."""
    arm, size, base = job.arm, job.size, STUDIED[job.base].folder
    domain = write_jsonl(training_records(DOMAIN, size.domain, seed=job.seed), job.output.with_suffix(".domain.jsonl"))
    replay = Replay(data=str(replay_rows(job)), ratio=arm.ratio) if arm.replay else Replay()
    data = Data(train=str(domain), max_length=256)
    return replace(configuration(job, base, data, replay, arms.KL), logging=Logging(every=100))


def replay_rows(job: Job) -> Path:
    """Return the path of the arm's replay set, or of as many rows as the arm may use."""
    arm, path = job.arm, replay_file(job.work, job.base, job.arm.replay, job.seed)
    if arm.replay in arms.WORLD_SETS:
        path = write_world_set(job.work, job.base, arm.replay, job.seed, job.size.instructions)
    if arm.unique_rows is None:
        return path
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    start = job.seed * arm.unique_rows % max(1, len(rows) - arm.unique_rows)
    return write_jsonl(rows[start : start + arm.unique_rows], job.output.with_suffix(".replay.jsonl"))


def marks_of(base: Path, folder: Path | None, job: Job) -> tuple[str, ...]:
    """Return the general and domain marks of a trained model, or of the base without `folder`.

    `folder` is a run's folder with a model or an adapter, or the folder of an adapter itself.
    """
    full = folder and folder / "model"
    model, tokenizer = load(full if full and full.exists() else base)
    if folder and not full.exists():
        adapter = folder / "adapter"
        model = PeftModel.from_pretrained(model, adapter if adapter.exists() else folder)
    scores_by_kind = (evaluate(model, tokenizer, heldout_items(skills, count, job.seed)) for skills, count in ITEMS.values())
    return tuple("".join("01"[right] for right in scores.right) for scores in scores_by_kind)


def measure_base(job: Job) -> list[Outcome]:
    """Evaluate the base on a seed's items."""
    return [Outcome(job.base, "base", job.seed, *marks_of(STUDIED[job.base].folder, None, job))]


# ---------------------------------------------------------------- all arms


def make_pool(work: Path, base: str, names: Sequence[str], count: int) -> list[dict]:
    """Make the named replay sets of a base, and return their statistics."""
    with quietly(work / base / "synth.log"):
        return make_replay_sets(work, base, names, count)


def jobs_of(plan: dict[str, Sequence[Arm]], seeds: int, size: Size, work: Path) -> list[Job]:
    return [Job(base, arm, seed, size, work) for seed in range(seeds) for base, base_arms in plan.items() for arm in base_arms]


def run_all(plan: dict[str, Sequence[Arm]], seeds: int, size: Size, work: Path, workers: int) -> tuple[list[Outcome], list[dict]]:
    """Measure every arm of every base with every seed; return the outcomes and the sets' statistics.

    Raises UserError if a run cannot be made.
    """
    begun = time.perf_counter()
    todo = jobs_of(plan, seeds, size, work)
    sets = {base: sorted({arm.replay for arm in base_arms} - {None, *arms.WORLD_SETS}) for base, base_arms in plan.items()}
    with parallel.pool(workers) as pool:
        bases = [pool.submit(measure_base, job) for job in todo if job.arm is plan[job.base][0]]
        pools = [pool.submit(make_pool, work, base, names, size.instructions) for base, names in sets.items()]
        outcomes = results_of(begun, bases, lambda found: f"{found[0].base}, seed {found[0].seed}")
        replay_stats = results_of(begun, pools, lambda found: f"pool of {found[0]['base']}")
        outcomes += results_of(begun, [pool.submit(measure, job) for job in todo],
                               lambda found: f"{found[0].base}, {found[0].arm}, seed {found[0].seed}")
    return list(itertools.chain.from_iterable(outcomes)), list(itertools.chain.from_iterable(replay_stats))


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parallel.add_arguments(parser, seeds=3)
    parser.add_argument("--quick", action="store_true", help="one base, one seed, four arms: under four minutes")


def run(arguments: argparse.Namespace) -> dict:
    parallel.check(arguments)
    begun = time.perf_counter()
    plan = {"novice": arms.QUICK} if arguments.quick else {
        "novice": (*arms.ARMS, *arms.FULL, *arms.SHARES, *arms.UNIQUE), "reader": arms.ARMS}
    seeds, size = 1 if arguments.quick else arguments.seeds, Size()
    with parallel.working_folder(arguments) as work:
        outcomes, replay_stats = run_all(plan, seeds, size, work, arguments.workers)
    curves = {"share": {arm.name: arm.ratio for arm in arms.SHARES}, "unique": {arm.name: arm.unique_rows for arm in arms.UNIQUE}}
    conditions = {**asdict(size), "items": {kind: len(skills) * count for kind, (skills, count) in ITEMS.items()}, "seeds": seeds,
                  "ratio": arms.RATIO, "rates": LEARNING_RATES, "kl": arms.KL, "workers": arguments.workers, "curves": curves,
                  "replay": replay_stats, "seconds": time.perf_counter() - begun}
    order = {name: place for place, name in enumerate(summary.row_names(plan))}
    outcomes.sort(key=lambda outcome: (list(plan).index(outcome.base), order[outcome.arm], outcome.seed))
    return record.make("miniature-cpu", conditions, {}, summary.rows(outcomes), {"outcomes": [asdict(outcome) for outcome in outcomes]})


SUITE = Suite("miniature", "The miniature study: every way to keep a model from forgetting, over several seeds", add_arguments, run,
              {"miniature": View(display.table, display.caption, display.draw, display.headline)})
