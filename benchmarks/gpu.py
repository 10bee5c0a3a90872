"""Run everything that needs a GPU, in under nine minutes: `make gpu`. It writes one JSON and one page.

tests        every tests/kernels/test_*.py, with real kernels in real bf16
compile      one whole training step under torch.compile, without a break in the graph
capture      the same as a CUDA graph
throughput   real tokens a second of the trainer's step beside a plain Hugging Face loop
kernels      times of every operation beside plain torch, torch.compile and the libraries that are installed

Only where asked for, as in `make gpu ARGS="--parts sizes"`:

rivals       throughput beside others' packs, TRL's with Liger's kernels among them
sizes        throughput, memory and launches of 1B, 4B and 8B shapes with LoRA, QLoRA and all weights
context      one sample of 2k to 128k tokens a step, as far as it fits

It runs from a checkout under any Python that has torch, Triton and pytest; a check that lacks something is skipped by name. Each check is
a process of its own (the tests one for each file), with a time after which it is ended. JSON and page are written anew after each check.
Short runs add up: of an earlier run of the same clean commit on the same device, the checks that were not asked for again are taken over,
and of `sizes` and `context`, where they were not done, the cases.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOTAL = 520.0  # seconds
TEST_PROCESSES = 8
FAILURES_KEPT = 40  # failed tests whose message is written down


@dataclass(frozen=True)
class Check:
    """A check, the most seconds it may take, and the packages it needs."""

    name: str
    seconds: float
    needs: tuple[str, ...] = field(default=())


# The last one gets whatever is left, and keeps what it has measured when its time is over.
CHECKS = (
    Check("tests", 220, ("pytest", "triton")), Check("compile", 90, ("transformers", "peft")),
    Check("capture", 40, ("transformers", "peft")),
    Check("throughput", 50, ("transformers", "peft")), Check("kernels", TOTAL, ("triton",)),
)
ASKED_FOR = (Check("rivals", 200, ("transformers", "peft", "trl")), Check("sizes", TOTAL, ("transformers", "peft")),
             Check("context", TOTAL, ("transformers", "peft")))
BY_CASES = ("sizes", "context")  # those that write their outcome anew after each case, and go on where an earlier run was ended


class Processes:
    """Child processes: each in a group of its own, ended with all that it started."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.over = False

    def run(self, words: list[str], seconds: float, log: Path) -> int | None:
        """Return the exit status of a Python command, None if its time ran out; its output goes to `log`."""
        if self.over:
            return None
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                       start_new_session=True)
        self.running.add(process)
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end(process)

    def end(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.running.discard(process)

    def end_all(self) -> None:
        self.over = True
        for process in list(self.running):
            self.end(process)


# ---------------------------------------------------------------- the parts


def run_tests(processes: Processes, seconds: float, folder: Path) -> dict:
    """Run each test file; return its counts, names and messages of failures, and reasons of skips."""
    files, deadline = sorted((ROOT / "tests" / "kernels").glob("test_*.py")), time.monotonic() + seconds

    def run_file(file: Path) -> tuple[str, dict]:
        report, log = folder / f"{file.stem}.xml", folder / f"{file.stem}.log"
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file.relative_to(ROOT)), f"--junitxml={report}"]
        begun = time.monotonic()
        status = processes.run(words, deadline - begun, log)
        found = read_report(report) if report.exists() else {"tests": 0, "output": tail(log)}
        return file.name, found | {"status": status, "seconds": round(time.monotonic() - begun, 1)}

    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        by_file = dict(pool.map(run_file, files))
    ended = [name for name, found in by_file.items() if found["status"] is None]
    failed = [name for name, found in by_file.items() if found["status"] not in (0, 5, None)]  # 5: nothing to run
    outcome = "failed: " + ", ".join(failed) if failed else "out of time: " + ", ".join(ended) if ended else "passed"
    return {"outcome": outcome, "files": by_file}


def read_report(path: Path) -> dict:
    """Return counts, failures and reasons of skips from pytest's JUnit file."""
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failures, skips = {}, {}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            if (fault := case.find(kind)) is not None and len(failures) < FAILURES_KEPT:
                failures[case.get("name")] = (fault.get("message") or "").strip()[:300]
        if (skip := case.find("skipped")) is not None:
            why = skip.get("message", "")
            skips[why] = skips.get(why, 0) + 1
    return counts | {"failed": failures, "skipped_because": skips}


def run_whole_step(name: str, processes: Processes, seconds: float, folder: Path) -> dict:
    """Run a check of whole steps, and return its outcome as far as it came."""
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    sized = ["benchmarks.on_gpu.whole_step_sizes", name, "--seconds", str(seconds)]
    check = sized if name in BY_CASES else ["benchmarks.on_gpu.whole_step", name]
    status = processes.run(["-m", *check, "--out", str(out)], seconds, log)
    found = json.loads(out.read_text()) if out.exists() else {}
    passed = status == 0 and found.get("passed")  # it may have crashed after what it wrote
    outcome = "out of time" if status is None else "passed" if passed else "failed: " + found.get("error", "see the record")
    found |= {} if passed or "error" in found else {"output": tail(log)}
    return {**found, "outcome": outcome}  # an earlier run's outcome may lie in what was found


def run_kernels(processes: Processes, seconds: float, folder: Path) -> dict:
    """Return the record of `benchmarks.speed.kernels`, as far as it came.

    A case that is under way when the budget is over is given 30 seconds.
    """
    out, log = folder / "kernels.json", folder / "kernels.log"
    words = ["-m", "benchmarks.speed.kernels", "--device", "cuda", "--out", str(out), "--budget", str(seconds - 30)]
    status = processes.run(words, seconds, log)
    if not out.exists():
        return {"outcome": "out of time" if status is None else "failed", "output": tail(log)}
    measured = json.loads(out.read_text())
    wrong = [f"{r['operation']}, {r['model']}: {r['contender']} {r['outcome']}" for r in measured["summary"]
             if r["contender"] == "Steadfast" and r["outcome"] not in ("timed", "out of memory")]
    outcome = "failed: " + "; ".join(wrong) if wrong or status not in (0, None) else "out of time" if status is None else "passed"
    return {"outcome": outcome, "record": measured, "output": tail(log)}


def tail(log: Path, characters: int = 4000) -> str:
    return log.read_text(errors="replace")[-characters:] if log.exists() else ""


def run_check(part: Check, processes: Processes, seconds: float, folder: Path) -> dict:
    if absent := [name for name in part.needs if importlib.util.find_spec(name) is None]:
        return {"outcome": f"skipped: {', '.join(absent)} not installed"}
    if seconds < 20:
        return {"outcome": "skipped: no time left"}
    runner = {"tests": run_tests, "kernels": run_kernels}.get(part.name) or partial(run_whole_step, part.name)
    try:
        return runner(processes, seconds, folder)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:  # what it left behind cannot be read
        return {"outcome": f"failed: {type(error).__name__}: {error}"}


def earlier(folder: Path, made: dict) -> dict[str, dict]:
    """Return the checks of the newest other record of `make gpu` on this commit and device.

    Neither record may have uncommitted changes.
    """
    alike = ("suite", "commit", "dirty", "device")
    records = [json.loads(path.read_text()) for path in folder.glob("gpu-*.json")] if made["commit"] and not made["dirty"] else []
    records = [record for record in records if all(record.get(key) == made[key] for key in alike)]
    newest = max(records, key=lambda record: record["time"], default={"parts": {}})
    return {name: {"measured": newest["time"]} | part for name, part in newest["parts"].items() if part["outcome"] != "not begun"}


def unfinished(kept: dict[str, dict]) -> dict[str, dict]:
    """Return the checks that have cases left."""
    return {name: part for name, part in kept.items() if name in BY_CASES and part.get("not_reached")}


def as_far_as_it_came(name: str, folder: Path) -> dict:
    """Return the outcome that an interrupted check has written."""
    path = folder / f"{name}.json"
    return finite(json.loads(path.read_text())) if name in BY_CASES and path.exists() else {}


def finite(value):
    """Replace figures that JSON cannot hold (NaN, infinity) by text."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(made: dict, folder: Path) -> Path:
    """Write the JSON, and the page beside it where its libraries are installed.

    An error in the page does not end the run.
    """
    from benchmarks.harness import record

    path = record.write(made, folder)
    try:
        from benchmarks.on_gpu import page as gpu_page

        gpu_page.write(made, path.with_suffix(".html"))
    except Exception as error:
        print(f"page: none ({error}); from the record: python -m benchmarks.on_gpu.page {path.name}", file=sys.stderr)
    return path


# ---------------------------------------------------------------- the command


def why_not() -> str | None:
    """Return the reason why nothing can be measured, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"expected torch, found none in {sys.executable}"
    import torch

    if not torch.cuda.is_available():
        return f"expected a GPU that torch can use, found none (torch {torch.__version__} in {sys.executable})"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder for the JSON (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in CHECKS + ASKED_FOR], default=[part.name for part in CHECKS])
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all of it (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if fault := why_not():
        print(f"make gpu: {fault}", file=sys.stderr)
        return 2
    from benchmarks.harness import record

    begun, processes = time.monotonic(), Processes()
    made = record.make("gpu", {"total_seconds": arguments.total}, {}, [], {}) | {"parts": {}}
    parts = [part for part in CHECKS + ASKED_FOR if part.name in arguments.parts]
    kept = earlier(arguments.results, made)
    asked = {part.name for part in parts}
    order, open_parts = [part.name for part in CHECKS + ASKED_FOR if part.name in asked | kept.keys()], unfinished(kept)
    made["parts"] = {name: {"outcome": "not begun"} if name in asked - open_parts.keys() else kept[name] for name in order}
    path = write(made, arguments.results)

    def interrupted(number, frame):
        processes.end_all()
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    try:
        with tempfile.TemporaryDirectory(prefix="steadfast-gpu-") as folder:
            for part in parts:
                left = arguments.total - (time.monotonic() - begun)
                started = time.monotonic()
                if part.name in open_parts:
                    (Path(folder) / f"{part.name}.json").write_text(json.dumps(open_parts[part.name]))
                try:
                    found = finite(run_check(part, processes, min(part.seconds, left), Path(folder)))
                except BaseException:
                    made["parts"][part.name] = as_far_as_it_came(part.name, Path(folder)) | {"outcome": "interrupted"}
                    raise
                if "rows" not in found:  # it did not get to begin
                    found = open_parts.get(part.name, {}) | found
                made["parts"][part.name] = found | {"seconds": round(time.monotonic() - started, 1)}
                write(made, arguments.results)
                print(f"{part.name}: {found['outcome']} ({time.monotonic() - started:.0f} s)", flush=True)
    finally:
        processes.end_all()
        write(made, arguments.results)
        print(f"record: {path}")
        if (page := path.with_suffix(".html")).exists():
            print(f"page: {page}")
    outcomes = [made["parts"][name]["outcome"] for name in asked]
    return 0 if all(o == "passed" or o.startswith("skipped") for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
