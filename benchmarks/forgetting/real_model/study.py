"""Measure what a real instruct model forgets as it learns a domain: `python -m benchmarks.run real`.

The base writes its replay sets by `synth.run`, `trainer.run` trains every arm and seed, `trainer.evaluate` scores them beside the base. A
seed draws the domain rows, the order of the data and the adapter. Everything lies in `--work`: the same command goes on where an earlier
sitting was stopped, and writes the record when all jobs are done.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.forgetting.real_model import display, jobs, pools, texts
from benchmarks.forgetting.real_model.arms import ARMS, BASE, KL_WEIGHT, PUBLIC, QUICK, Arm, synthetic_sets
from benchmarks.forgetting.real_model.jobs import Job, Size, Study
from benchmarks.forgetting.real_text_data import precision
from benchmarks.harness import parallel, record
from benchmarks.harness.arguments import check_names
from benchmarks.harness.parallel import begin, results_of
from benchmarks.harness.public_sets import add_data_argument
from benchmarks.harness.smollm2 import smollm2
from benchmarks.harness.suite import Suite
from benchmarks.harness.synthetic_models import quiet
from synth import config as synthesis
from trainer.errors import UserError, require
from trainer.evaluation.suites.table import SUITES
from trainer.files import atomic_file, sole_owner

DEFAULT_BASE = "smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser, "folder with gsm8k_train.jsonl, gsm8k_test.jsonl (or pubmedqa_ori_pqal.json), dolly_small.jsonl and, there "
                              "or in its folder general, files of suites such as arc_easy.jsonl")
    parser.add_argument("--base", default=DEFAULT_BASE, help="instruct model: folder or hub name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--responders", nargs="*", default=[], metavar="MODEL", help="models that answer and judge beside the base")
    parser.add_argument("--domain", choices=texts.DOMAINS, default=texts.DOMAINS[0],
                        help="what the model is to learn (default: %(default)s)")
    parser.add_argument("--arms", nargs="*", default=[], metavar="ARM", help="names of arms to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer arms, steps and items")
    parser.add_argument("--seeds", type=int, help="default: 2, with --quick 1")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes of one thread (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="folder of the study, to go on in (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    """Do every job that no earlier sitting has done, and return the record."""
    arms, size, seeds = chosen(arguments)
    begin()
    quiet()
    work = arguments.work.absolute()
    with sole_owner(work, "study"):
        return _run(arguments, arms, size, seeds, work)


def chosen(arguments: argparse.Namespace) -> tuple[list[Arm], Size, int]:
    """Return the arms, sizes and number of seeds that the options ask for.

    Raises UserError for what no run can use.
    """
    known = {arm.name: arm for arm in known_arms(arguments)}
    check_names("--arms", arguments.arms, known)
    require(arguments.workers >= 1, "--workers", "at least 1", arguments.workers)
    seeds = arguments.seeds if arguments.seeds is not None else 1 if arguments.quick else 2
    require(seeds >= 1, "--seeds", "at least 1", seeds)
    return [known[name] for name in arguments.arms or known], jobs.QUICK if arguments.quick else Size(), seeds


def _run(arguments: argparse.Namespace, arms: Sequence[Arm], size: Size, seeds: int, work: Path) -> dict:
    base, label = smollm2() if arguments.base == DEFAULT_BASE else (arguments.base, arguments.base)
    study = Study(str(base), size, work, arguments.domain, suite_folder(arguments.data))
    claim(work, study, label, arguments.responders)
    pool = pools.pool_config(work / "synth", study.base, arguments.responders, synthetic_sets(known_arms(arguments)), size)
    measured = measure(study, arms, seeds, arguments.data, pool, arguments.workers)
    conditions = {
        **asdict(size), "base": label, "domain": study.domain, "responders": [*arguments.responders], "seeds": seeds, "rows": measured.rows,
        "items": {name: file["items"] for name, file in measured.base["files"].items()}, "kl_weight": KL_WEIGHT,
        "ratios": {arm.name: arm.ratio for arm in arms if arm.replay}, "precision": precision(), "workers": arguments.workers}
    return record.make(record_name(arguments), conditions, {}, display.summary(measured.base, measured.outcomes),
                       {"base": [measured.base], "outcomes": measured.outcomes})


class Measured(NamedTuple):
    """The outcomes of a study, and how many rows each of its sets has."""

    base: dict
    outcomes: list[dict]  # by seed, in the order of the arms
    rows: dict[str, int]


def measure(study: Study, arms: Sequence[Arm], seeds: int, data: Path | None, pool: synthesis.Config, workers: int) -> Measured:
    """Make the data and do all jobs, each when what it needs is there.

    Raises UserError if it is stopped, and for data that cannot be read. An error in one job ends the study when the running jobs are done.
    """
    begun, work, sets = time.perf_counter(), study.work, synthetic_sets(arms)
    rows = write_data(study, arms, data, seeds)
    base_job, *others = [Job(study, None), *(Job(study, arm, seed) for seed in range(seeds) for arm in arms)]
    try:
        with parallel.pool(workers) as processes:
            making = processes.submit(pools.make_sets, pool, sets, work / "replay")
            base_outcome, = results_of(begun, [processes.submit(jobs.run, base_job)], name_of)
            running = [processes.submit(jobs.run, job) for job in others if job.arm.replay not in sets]
            rows |= result_or_stop(making, processes)
            made = ", ".join(f"{name} {rows[name]:,} rows" for name in sets)
            print(f"{time.perf_counter() - begun:6.0f} s  replay sets: {made or 'none'}", flush=True)
            running += [processes.submit(jobs.run, job) for job in others if job.arm.replay in sets]
            outcomes = results_of(begun, running, name_of)
    except KeyboardInterrupt:
        raise UserError(f"stopped; the same command goes on with what is in {work}") from None
    order = [(job.arm.name, job.seed) for job in others]
    return Measured(base_outcome, sorted(outcomes, key=lambda outcome: order.index((outcome["arm"], outcome["seed"]))), rows)


def known_arms(arguments: argparse.Namespace) -> Sequence[Arm]:
    """Return the arms that `--arms` chooses from.

    The pool serves all of them, so that a later sitting may choose others.
    """
    return QUICK if arguments.quick else ARMS


def result_or_stop(future: Future, processes: Executor) -> dict[str, int]:
    """Return a result; if there is none, start no further jobs, and say why at once."""
    try:
        return future.result()
    except Exception as error:
        print(f"error: {error}; the study ends when the running jobs are done", file=sys.stderr, flush=True)
        processes.shutdown(wait=False, cancel_futures=True)
        raise


def record_name(arguments: argparse.Namespace) -> str:
    """Return the suite of the record: its device, and what differs from the default."""
    base = [] if arguments.base == DEFAULT_BASE else [re.sub(r"[^a-z0-9.]+", "-", Path(arguments.base).name.lower())]
    domain = [] if arguments.domain == texts.DOMAINS[0] else [arguments.domain]
    device = "cpu" if record.machine()["device"] == "cpu" else "gpu"
    return "-".join(["real", device, *base, *domain, *["quick"] * arguments.quick])


def name_of(outcome: dict) -> str:
    return f"{outcome['arm']}, seed {outcome['seed']}" if outcome["arm"] != BASE else BASE


def suite_folder(data: Path | None) -> str | None:
    """Return the folder with files of suites: `data` or its folder `general`; None for the hub."""
    if data is None:
        return None
    folders = [folder for folder in (data, data / "general") if any((folder / f"{name}.jsonl").is_file() for name in SUITES)]
    if not folders:
        raise UserError(f"--data: expected files of suites, such as arc_easy.jsonl, in {data} or {data / 'general'}, found none")
    return str(folders[0])


def claim(work: Path, study: Study, label: str, responders: Sequence[str]) -> None:
    """Write what the folder's jobs share.

    Raises UserError for a folder of another study.
    """
    shared = json.loads(json.dumps({"base": label, "domain": study.domain, "responders": [*responders], "precision": precision(),
                                    **asdict(study.size)}))
    path = work / "study.json"
    if not path.is_file():
        with atomic_file(path) as tmp:
            tmp.write_text(json.dumps(shared, indent=1), encoding="utf-8")
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if other := next((name for name in shared if shared[name] != earlier.get(name)), None):
        raise UserError(f"--work: expected a study with {other} {shared[other]}, found {earlier.get(other)} in {path}; name another "
                        "folder, or remove it")


def write_data(study: Study, arms: Sequence[Arm], data: Path | None, seeds: int) -> dict[str, int]:
    """Write the rows and items that are not synthetic, and return how many rows they are."""
    size, work = study.size, study.work
    domain, problems = texts.domain_chats(study.domain, data)
    for seed in range(seeds):
        texts.write_rows(domain, size.domain_rows, seed, work / f"domain {seed}.jsonl")
    texts.write_problems(problems, size.problems, work / "problems.jsonl")
    rows = {"domain": min(size.domain_rows, len(domain))}
    if size.public or any(arm.replay == PUBLIC for arm in arms):
        public, heldout = texts.public_chats(data)
        for seed in range(seeds):
            texts.write_rows(public, size.instructions, seed, work / "replay" / f"{PUBLIC} {seed}.jsonl")
        texts.write_rows(heldout, size.public, 0, work / "public items.jsonl")
        rows[PUBLIC] = min(size.instructions, len(public))
    return rows


SUITE = Suite("real", "Forgetting on a real model: SmolLM2 learns GSM8K, with and without replay; resumable", add_arguments, run,
              {"real": display.VIEW})
