"""Compare this checkout with another commit, in CPU-seconds for equal work.

`python -m benchmarks.run --compare REV` checks REV out into a temporary folder. Each side runs in a process of its own, all driven from
here: in a round every side does equal steps of every case, one after another, in a freshly shuffled order, so that drift affects all alike.
Each commit runs in two processes, whose ratio (A/A) shows the noise between processes, and all are started again half-way, since where a
process lies in memory is part of that noise.

A case has changed if the 99% interval of the ratio excludes 1, and the ratio is further from 1 than the interval of either commit's A/A
reaches. Results (losses; norms of outputs and gradients) are compared first. The exit status is 1 where a case is slower.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.harness import record, show, timing
from benchmarks.harness.arguments import add_timing_arguments, check_timing
from benchmarks.harness.record import origin_command
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.timing import Interval, Measurement
from trainer.errors import UserError

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("compare_worker.py")
KERNELS = ("linear CE, frozen head", "linear CE, trained head", "linear KL, frozen head", "LoRA linear", "LoRA QKV", "LoRA MLP",
           "add + RMSNorm", "QK-norm + RoPE", "RoPE", "GLU", "NF4, all layers", "packed attention")
THIS, OTHER = "this", "other"
AGAIN = {THIS: "this (A/A)", OTHER: "other (A/A)"}
STARTS = 2  # times that each side's process is started
FEWEST_ROUNDS = 6  # of which an interval can be had
SAMPLE_SECONDS = 0.25  # of CPU, of one side's share of one round
CONFIDENCE = 0.99


# ---------------------------------------------------------------- sides


def git(*words: str) -> str:
    """Output of a git command on this repository; UserError with git's own words where it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--compare: needs git, which is not installed") from None
    if done.returncode:
        raise UserError(f"--compare: git {words[0]}: {last_line(done.stderr)}")
    return done.stdout.strip()


def commit_of(rev: str) -> str:
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    except UserError:
        if not (ROOT / ".git").exists():
            raise
        raise UserError(f"--compare: expected a commit of this repository (a hash, branch or tag), got {rev}") from None


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    git("worktree", "add", "--detach", "--quiet", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


class Side:
    """A worker process on one checkout."""

    def __init__(self, name: str, root: Path, setting: Path, folder: Path, threads: int):
        self.name, self.errors = name, (folder / "errors").open("w+")
        environment = os.environ | {
            "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false"}
        if setting.exists():
            shutil.copytree(setting, folder / "setting")
        self.process = subprocess.Popen([sys.executable, "-P", str(WORKER), str(root), str(folder / "setting"), str(threads)],
                                        cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors)

    def ask(self, **request) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its answer will show
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise UserError(f"--compare: the process of {self.name} ended early: {last_line(self.errors.read()) or 'no reason given'}")
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


@contextlib.contextmanager
def started(roots: dict[str, Path], setting: Path, threads: int) -> Iterator[dict[str, Side]]:
    """Start a process for each side, in temporary folders, and end them afterwards."""
    with tempfile.TemporaryDirectory(prefix="steadfast-sides-") as folder, contextlib.ExitStack() as stack:
        sides = {}
        for i, (name, root) in enumerate(roots.items()):
            own = Path(folder) / str(i)
            own.mkdir()
            sides[name] = Side(name, root, setting, own, threads)
            stack.callback(sides[name].end)
        for side in sides.values():
            side.answer()
        yield sides


# ---------------------------------------------------------------- measuring


def prepared(sides: dict[str, Side], cases: list[str]) -> tuple[list[str], dict[str, str], dict[str, float]]:
    """Return the cases that all sides have, why others are left out, and how far results differ."""
    present, left_out, differences = [], {}, {}
    for case in cases:
        made = {name: side.ask(do="make", case=case) for name, side in sides.items()}
        if absent := [f"{name}: {answer['missing']}" for name, answer in made.items() if "missing" in answer]:
            left_out[case] = absent[0]
        elif made[THIS]["tokens"] != made[OTHER]["tokens"]:
            left_out[case] = f"not the same work: steps of {made[THIS]['tokens']} tokens here, {made[OTHER]['tokens']} there"
        else:
            present.append(case)
            differences[case] = apart(made[THIS]["results"], made[OTHER]["results"])
    return present, left_out, differences


def apart(ours: list[float], others: list[float]) -> float:
    """Largest relative difference; 1 where there is no comparing."""
    if len(ours) != len(others) or not np.isfinite(ours + others).all():
        return 1.0
    return max((abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in zip(ours, others)), default=0.0)


def steps_for(sides: dict[str, Side], case: str) -> int:
    """Steps that fill a sample. Every side takes these, so that all stay at the same step of the same run."""
    taken = [side.ask(do="run", case=case, steps=1)["cpu"] for side in sides.values()]
    return max(1, round(SAMPLE_SECONDS / max(min(taken), 1e-6)))


def rounds_of(sides: dict[str, Side], steps: dict[str, int], rounds: int,
              order: np.random.Generator) -> dict[str, dict[str, list[Measurement]]]:
    samples: dict[str, dict[str, list[Measurement]]] = {case: {name: [] for name in sides} for case in steps}
    names, cases = list(sides), list(steps)
    for _ in range(rounds):
        for c in order.permutation(len(cases)):
            for s in order.permutation(len(names)):
                took = sides[names[s]].ask(do="run", case=cases[c], steps=steps[cases[c]])
                samples[cases[c]][names[s]].append(Measurement(took["cpu"], took["wall"], took["steps"], took["tokens"], 0, 0, 0.0))
    return samples


def per_cpu_second(sample: Measurement) -> float:
    return sample.steps / sample.cpu


def verdict(ratio: Interval, same: Iterable[Interval]) -> str:
    """Judge the ratio of this commit to the other, beside those of each commit to itself."""
    noise = max(abs(end - 1) for one in same for end in (one.low, one.value, one.high))
    if ratio.low <= 1 <= ratio.high or abs(ratio.value - 1) <= noise:
        return "no change beyond noise"
    return "faster" if ratio.value > 1 else "slower"


def row(case: str, samples: dict[str, list[Measurement]], difference: float) -> dict:
    both = {name: samples[name] + samples[again] for name, again in AGAIN.items()}
    ratio = timing.ratio(both[THIS], both[OTHER], per_cpu_second, CONFIDENCE)
    same = {name: timing.ratio(samples[again], samples[name], per_cpu_second, CONFIDENCE) for name, again in AGAIN.items()}
    ms = {name: asdict(timing.spread(line, lambda s: 1e3 * s.cpu / s.steps)) for name, line in both.items()}
    return {"line": case, "cpu_ms": ms, "ratio": {OTHER: asdict(ratio)}, "same": {name: asdict(one) for name, one in same.items()},
            "outcome": verdict(ratio, same.values()), "results_differ": difference}


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rev", metavar="REV", help="the other commit: a hash, branch or tag")
    parser.add_argument("--suite", dest="cases", choices=("training", "kernels", "all"), default="all",
                        help="which cases (default: %(default)s)")
    add_timing_arguments(parser, rounds=12, threads=1)


def run(arguments: argparse.Namespace) -> dict:
    """Measure both commits; returns the record."""
    check_timing(arguments, rounds=FEWEST_ROUNDS)
    commit, code = commit_of(arguments.rev), record.code(ROOT)
    cases, left_out = chosen(arguments.cases), {}
    with tempfile.TemporaryDirectory(prefix="steadfast-compare-") as name:
        folder = Path(name)
        if any(case.startswith("training") for case in cases):
            from benchmarks.harness.synthetic_models import quiet
            from benchmarks.speed.chat_task import make_task

            quiet()
            (folder / "setting").mkdir()
            make_task(folder / "setting")
        with checked_out(commit, folder / "other") as other:
            roots = {THIS: ROOT, AGAIN[THIS]: ROOT, OTHER: other, AGAIN[OTHER]: other}
            samples, left_out, differences = measured(roots, folder / "setting", cases, arguments)
    if not samples:
        raise UserError(f"--compare: no case runs on both sides: {'; '.join(f'{c}: {why}' for c, why in left_out.items())}")
    conditions = {"other": commit, "asked": arguments.rev, "rounds": arguments.rounds, "starts": STARTS, "confidence": CONFIDENCE,
                  "left_out": left_out}
    rows = [row(case, lines, differences[case]) for case, lines in samples.items()]
    raw = {f"{case}: {side}": line for case, lines in samples.items() for side, line in timing.raw(lines).items()}
    return record.make("compare-cpu", conditions, differences, rows, raw) | code | {"threads": arguments.threads}


def chosen(suite: str) -> list[str]:
    from trainer.runtime.device import fast_bf16

    training = ["training: fp32"] + ["training: bf16"] * fast_bf16()
    kernels = [f"kernels: {operation}" for operation in KERNELS]
    return {"training": training, "kernels": kernels, "all": training + kernels}[suite]


def measured(roots: dict[str, Path], setting: Path, cases: list[str], arguments: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Samples by case and side, over all starts; cases left out; differences of results."""
    order, samples, steps = np.random.default_rng(0), {}, {}
    for start in range(STARTS):
        with started(roots, setting, arguments.threads) as sides:
            present, left_out, differences = prepared(sides, cases)
            if start == 0:
                steps = {case: steps_for(sides, case) for case in present}
            rounds = arguments.rounds // STARTS + (start < arguments.rounds % STARTS)
            for case, lines in rounds_of(sides, steps, rounds, order).items():
                for side, line in lines.items():
                    samples.setdefault(case, {}).setdefault(side, []).extend(line)
    return samples, left_out, differences


def status(made: dict) -> int:
    """1 where a case is slower beyond noise."""
    return int(any(row["outcome"] == "slower" for row in made["summary"]))


# ---------------------------------------------------------------- how a record is shown


def table(record: dict) -> list[list[str]]:
    """Return how many times as fast each case is as in the other commit, the noise, and the verdict."""
    here, there = commits(record)
    rows = [["case", f"{here}, CPU-ms a step", f"{there}, CPU-ms a step", f"speed, × {there}", f"A/A {here[:8]}", f"A/A {there}",
             "results differ by", "outcome"]]
    for row in record["summary"]:
        ms = [f"{row['cpu_ms'][side]['value']:.3g}" for side in ("this", "other")]
        difference = f"{row['results_differ']:.0e}" if row["results_differ"] else "0"
        rows.append([row["line"], *ms, show.interval(row["ratio"]["other"]), *map(show.interval, row["same"].values()), difference,
                     row["outcome"]])
    return rows


def commits(record: dict) -> tuple[str, str]:
    return (record["commit"] or "none")[:8] + " with changes" * bool(record["dirty"]), record["conditions"]["other"][:8]


def caption(record: dict) -> Caption:
    c, (here, there) = record["conditions"], commits(record)
    return Caption(
        f"CPU time for equal work in {here} and in {there}; {show.machine(record)}. Faster or slower: the interval excludes 1, and the "
        "ratio is further from 1 than either A/A (a commit's second process over its first) reaches.",
        (f"Medians of {c['rounds']} interleaved rounds, each side in processes of its own, started {c['starts']} times; ratios with "
         f"{c['confidence']:.0%} intervals.", *show.left_out(c["left_out"]), f"`{origin_command(record)}`, {record['time'][:10]}."))


def draw(record: dict, figure) -> None:
    """Draw the ratio of every case with its interval, over those of the A/As."""
    rows = record["summary"][::-1]
    axes = show.axes_of(figure, 8, 1.3 + 0.35 * len(rows))
    for i, row in enumerate(rows):
        ratio = row["ratio"]["other"]
        for same, place in zip(row["same"].values(), (i + 0.18, i - 0.18)):
            axes.barh(place, same["high"] - same["low"], 0.3, left=same["low"], color=show.OTHERS)
        axes.errorbar(ratio["value"], i, xerr=[[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]], fmt="o", color=show.OURS)
    axes.axvline(1, color=show.GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["line"] for row in rows])
    axes.set_xlabel(f"speed over that of {commits(record)[1]} (grey: each commit over itself)")


SUITE = Suite("compare", "This checkout against another commit, CPU time for equal work", add_arguments, run,
              {"compare": View(table, caption, draw, lambda record: f"Speed against commit {commits(record)[1]}")}, status)
