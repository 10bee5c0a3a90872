"""Print what a training step asks of the host, by shape: launches and milliseconds, beside stock transformers and PEFT.

The device costs nothing here, so these are the times that a GPU waits where its own work is shorter. They are CPU time, medians of
rounds in which both take turns. `make fake-gpu` runs it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch

import trainer.model.patch as patching
from benchmarks.harness.model_shapes import MODELS, ModelShape
from benchmarks.harness.synthetic_models import adapted, random_samples, stock_model
from benchmarks.speed.baselines import Batching, padded_loop
from benchmarks.speed.contenders import fused, in_memory
from tests.helpers.fake_gpu import recorded

SAMPLES, LENGTH = 16, 512
WARM, ROUNDS = 3, 15


def contenders(shape: ModelShape, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the steps to compare, each on the same tokens with an adapter on every linear layer."""
    samples = random_samples([LENGTH] * SAMPLES, shape.vocabulary, 0)
    ours, stock = (adapted(stock_model(shape, device, torch.bfloat16), dropout=0.05) for _ in range(2))
    return {"Steadfast": in_memory(fused(ours), samples, SAMPLES * LENGTH, 1e-3, device).step,
            "Hugging Face + PEFT": padded_loop(stock, samples, Batching(samples=SAMPLES), 1e-3, device=device).step}


def measure(steps: dict[str, Callable[[], object]]) -> dict[str, tuple[int, float]]:
    """Return the launches and the median CPU milliseconds of each one's step."""
    launches, seconds = {}, {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(WARM):
            step()
        with recorded() as calls:
            step()
        launches[name] = len(calls.launches)
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            seconds[name].append(time.process_time() - begun)
    gc.enable()
    return {name: (launches[name], 1e3 * statistics.median(seconds[name])) for name in steps}


def main(names: list[str]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)  # its library asks a GPU for more than the fake one knows
    patching.fusion_fault = lambda base: None  # which compares numbers, and nothing computes them here
    print(f"{'shape':14} {'layers':>6}  {'a step of':20} {'launches':>8} {'host ms':>8}")
    for shape in MODELS:
        if names and shape.name not in names:
            continue
        for name, (launches, milliseconds) in measure(contenders(shape, torch.device("cuda", 0))).items():
            print(f"{shape.name:14} {shape.layers:>6}  {name:20} {launches:>8,} {milliseconds:>8.1f}", flush=True)
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
