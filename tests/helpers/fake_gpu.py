"""Read what the fake GPU (tests/fake_gpu) was asked to do, and make training runs that it can run."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from benchmarks.harness.synthetic_models import random_samples
from benchmarks.on_gpu.whole_step_sizes import Linear4bit
from benchmarks.speed.contenders import Steadfast, samples_in_memory
from trainer.config import BatchSize, Config, Lora, Model, Optim
from trainer.data.mixture import Mixture, MixtureSource
from trainer.data.step_plan import StepPlan
from trainer.metrics.throughput import model_size
from trainer.model import lora
from trainer.model.forward import apply_activation_checkpointing, padding_for
from trainer.model.loading import use_packed_attention
from trainer.model.patch import patch
from trainer.model.text_part import auto_class
from trainer.optim.adamw import FlatAdamW
from trainer.retention import kl
from trainer.runtime.distributed import Distributed
from trainer.training.loader import StepLoader
from trainer.training.training_run import TrainingRun

DONE_BY_THE_DEVICE = ("KERNEL", "TRITON", "GEMM", "GEMV", "DOT", "MEMSET", "MEMCPY")
LENGTHS = [130, 40, 9, 200, 77, 56]  # tokens of the samples of a pack


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@dataclass
class Calls:
    """Calls that reached the device, one line each: a kind, and what was asked."""

    lines: list[str] = field(default_factory=list)

    def of(self, *kinds: str) -> list[str]:
        """Return the calls of these kinds."""
        return [line for line in self.lines if line.partition(" ")[0] in kinds]

    @property
    def launches(self) -> list[str]:
        """Return what the device was given to do: kernels, matmuls, copies and fills."""
        return self.of(*DONE_BY_THE_DEVICE)

    @property
    def waits(self) -> list[str]:
        """Return the calls for which the host stands still, also those that torch's sync debug mode does not see."""
        return self.of("SYNC", "cudaMalloc", "cudaFree", "cudaHostAlloc") + [line for line in self.lines if "pageable" in line]

    @property
    def faults(self) -> list[str]:
        """Return the calls that a GPU would refuse."""
        return [line for line in self.lines if line.startswith(("BAD", "CAPTURE-VIOLATION"))]

    def by_name(self) -> Counter[str]:
        """Return how often each kernel of ours was launched."""
        return Counter(line.split()[1] for line in self.of("TRITON"))


@contextmanager
def recorded() -> Iterator[Calls]:
    """Note the calls made inside."""
    library, calls = _library(), Calls()
    library.fg_start()
    try:
        yield calls
    finally:
        library.fg_stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "calls"
            library.fg_dump(str(path).encode())
            calls.lines[:] = path.read_text().splitlines()


# ---------------------------------------------------------------- runs


def put_into_nf4(model: nn.Module) -> None:
    """Put every adapted layer into NF4, as bitsandbytes would."""
    for module in list(model.modules()):
        if isinstance(base := getattr(module, "base_layer", None), nn.Linear):
            module.base_layer = Linear4bit(base, torch.bfloat16)
            module.base_layer.compute_dtype = torch.bfloat16


def make_run(shape: PretrainedConfig, config: Config, lengths: list[int], device: torch.device,
             change: Callable[[nn.Module], object] = lambda model: None) -> Steadfast:
    """Make the run that the trainer makes of a configuration, on a model with random weights and samples of these lengths.

    It is made on the CPU, where the probes of its layers compute, and then moved. Every step takes all samples, in as many packs as the
    configuration's batch makes of them.
    """
    model = auto_class(shape).from_config(shape, dtype=torch.bfloat16)
    use_packed_attention(model)
    if config.method != "full":
        model = lora.add_adapter(model, config.lora)
    report = patch(model)
    assert "stock layers" not in report.family, report.family
    model.to(device)
    if config.method == "qlora":
        put_into_nf4(model)
    change(model)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    to_base = kl.prepare(config.retention, model, ["domain"])
    optimizer = FlatAdamW(model.parameters(), config.optim)
    optimizer.publish()
    samples = samples_in_memory(random_samples(lengths, shape.vocab_size, 0))
    plan = StepPlan(samples.lengths, Mixture(samples.lengths, samples.sources, [MixtureSource(samples.names[0], "domain")], seed=0),
                    config.batch, epochs=64, max_steps=64, seed=0)
    loader = StepLoader(plan, samples, Distributed(), device, to_base, padding_for(model))
    return Steadfast(TrainingRun(config=config, folder=Path(), device=device, dist=Distributed(), model=model, size=model_size(model),
                                 optimizer=optimizer, plan=plan, loader=loader, kl=to_base))


def configured(method: str = "lora", packs: int = 1, dropout: float = 0.05, **options) -> Config:
    """Return the configuration of such a run; `options` are sections and options of the trainer's."""
    tokens = sum(LENGTHS)
    config = Config(model=Model(config="-"), method=method, lora=Lora(dropout=dropout), optim=Optim(warmup_ratio=0.0),
                    batch=BatchSize(tokens_per_pack=tokens, tokens_per_step=packs * tokens), device="cuda")
    return replace(config, **options)


def step_calls(run: Steadfast, warm: int = 3) -> Calls:
    """Return the calls of one step, after as many as compile kernels and fill caches."""
    for _ in range(warm):
        run.step()
    with recorded() as calls:
        run.step()
    return calls
