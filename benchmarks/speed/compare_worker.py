"""Run the cases of one checkout for `benchmarks.speed.compare`: one line of JSON in, one line out.

    python -P compare_worker.py ROOT FOLDER THREADS      with ROOT as PYTHONPATH

This file serves every commit, and all else that it imports is ROOT's: `interface` tries the names of each time. FOLDER holds the model,
the adapter and the chats, equal for every side.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

TOKENS = 1024
SHAPE = ("7 M", 256, 704, 4, 2, 64, 8192, 4)  # of the kernels' cases: name, width, MLP, heads, key heads, channels, vocabulary, layers
STEPS = 4096  # that the training cases plan ahead
WARMUP = 2

Step = Callable[[], tuple[float, list[float]]]  # does one step, says how many tokens it took, and its results, each as one figure


def interface(*names: str):
    """Return the first of these modules that the checkout has; ImportError where it has none."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or "?"):  # a module of that time's own is missing inside
                raise
    raise ImportError(f"none of {', '.join(names)}")


def training_case(folder: Path, precision: str) -> Step:
    """Return the trainer's own step, with the loss as its result."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    try:
        task = interface("benchmarks.speed.chat_task")
        interface("benchmarks.harness.synthetic_models").quiet()
        contender = task.steadfast(task.ChatTask(folder, tokenizer, [], ""), precision, STEPS)
    except ImportError:  # before the task had a module of its own
        training = interface("benchmarks.speed.training", "benchmarks.training")
        training.quiet()
        contender = training.Steadfast(training.Setting(folder, tokenizer, [], ""), precision, STEPS)

    def step() -> tuple[float, list[float]]:
        done = contender.step()
        return done.tokens, [float(done.loss)]

    return step


def kernel_case(operation: str) -> Step:
    """Return an operation's CPU form in fp32, forward and backward.

    Its results are norms of outputs and gradients.
    """
    import torch

    cases = interface("benchmarks.speed.kernel_cases", "benchmarks.kernel_cases")
    without = {"dropout": 0.0} if operation in cases.RANDOM else {}
    shape = shape_class()(*SHAPE)
    setup = cases.CASES[operation](cases.Source(torch.device("cpu"), torch.float32), shape, TOKENS, **without)
    wanted, upstream = [t for t in setup.inputs if t.requires_grad], []

    def step() -> tuple[float, list[float]]:
        results = setup.forwards[cases.OURS](*setup.inputs)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        if wanted:
            if not upstream:
                upstream.extend(torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in results)
            results += torch.autograd.grad(results, wanted, upstream)
        return TOKENS, results

    return step


def shape_class() -> type:
    """Return the class of a model's shape, by the name that the checkout has for it."""
    module = interface("benchmarks.harness.model_shapes", "benchmarks.speed.kernel_predictions", "benchmarks.predict")
    return getattr(module, "ModelShape", None) or module.Model


def figures(results: list) -> list[float]:
    return [r if isinstance(r, float) else float(r.detach().double().norm()) for r in results]


class Worker:
    def __init__(self, folder: Path):
        self.folder, self.steps = folder, {}

    def make(self, case: str) -> dict:
        """Build the case and warm it up; `missing` says why that cannot be."""
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
