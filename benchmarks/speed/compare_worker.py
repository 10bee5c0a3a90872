"""One side of `benchmarks.speed.compare`: a process that runs the cases of one checkout as it is told, one line of JSON after another.

    python -P compare_worker.py ROOT FOLDER THREADS      with ROOT as PYTHONPATH

It is this file for every commit, and all else that it imports is ROOT's: so it keeps to what `benchmarks/speed/training.py` and
`benchmarks/speed/kernel_cases.py` have always had. FOLDER holds the model, the adapter and the chats, the same for every side.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

TOKENS = 1024
SHAPE = ("7 M", 256, 704, 4, 2, 64, 8192, 4)  # of the model that the training cases train, as `kernel_predictions.Model` has it
STEPS = 4096  # that the training cases plan ahead
WARMUP = 2

Step = Callable[[], tuple[float, list[float]]]  # does one step, says how many tokens it took, and its results, each as one figure


def training_case(folder: Path, precision: str) -> Step:
    """The trainer's own step: loss as the result."""
    from transformers import PreTrainedTokenizerFast

    from benchmarks.speed import training

    training.quiet()
    setting = training.Setting(folder, PreTrainedTokenizerFast.from_pretrained(folder / "model"), [], "")
    line = training.Steadfast(setting, precision, STEPS)

    def step() -> tuple[float, list[float]]:
        done = line.step()
        return done.tokens, [done.loss]

    return step


def kernel_case(operation: str) -> Step:
    """An operation forward and backward in fp32, in the form that a CPU gets: norms of what it gives and of its gradients."""
    import torch

    from benchmarks.speed.kernel_cases import CASES, OURS, RANDOM, Source
    from benchmarks.speed.kernel_predictions import Model

    without = {"dropout": 0.0} if operation in RANDOM else {}
    setup = CASES[operation](Source(torch.device("cpu"), torch.float32), Model(*SHAPE), TOKENS, **without)
    wanted, upstream = [t for t in setup.inputs if t.requires_grad], []

    def step() -> tuple[float, list[float]]:
        results = setup.forwards[OURS](*setup.inputs)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        if wanted:
            if not upstream:
                upstream.extend(torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in results)
            results += torch.autograd.grad(results, wanted, upstream)
        return TOKENS, results

    return step


def figures(results: list) -> list[float]:
    return [r if isinstance(r, float) else float(r.detach().double().norm()) for r in results]


class Worker:
    def __init__(self, folder: Path):
        self.folder, self.steps = folder, {}

    def make(self, case: str) -> dict:
        """Builds the case and warms it up; `missing` says why that cannot be."""
        import torch

        torch.manual_seed(0)
        try:
            suite, _, what = case.partition(": ")
            step = training_case(self.folder, what) if suite == "training" else kernel_case(what)
            done = [step() for _ in range(WARMUP)]
        except (ImportError, AttributeError, KeyError, TypeError) as error:  # another time's interface
            return {"missing": f"{type(error).__name__}: {error}"}
        self.steps[case] = step
        return {"tokens": [tokens for tokens, _ in done], "results": [f for _, results in done for f in figures(results)]}

    def run(self, case: str, steps: int) -> dict:
        step = self.steps[case]
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        tokens = sum(step()[0] for _ in range(steps))
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "steps": steps, "tokens": tokens}


def main(root: str, folder: str, threads: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    import torch

    import kernels

    if not Path(kernels.__file__).is_relative_to(root):
        raise ImportError(f"expected the code of {root}, got that of {Path(kernels.__file__).parents[1]}")
    torch.set_num_threads(int(threads))
    worker = Worker(Path(folder))
    answers.write("{}\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(worker, request.pop("do"))(**request)) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main(*sys.argv[1:])
