"""Runs with a KL to the base for tests: ready-made steps, plain torch beside them, and options of measured runs."""

import copy
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from benchmarks.forgetting.miniature.family import FAMILY
from tests.helpers import tiny
from tests.helpers.models import stir
from trainer import config
from trainer.config import Config, Lora, Optim
from trainer.data.batch import collate
from trainer.data.samples import Piece
from trainer.metrics.throughput import model_size
from trainer.metrics.timers import Phases
from trainer.model.loading import use_packed_attention
from trainer.model.lora import add_adapter
from trainer.model.patch import patch
from trainer.optim.adamw import FlatAdamW
from trainer.retention import kl as retention
from trainer.runtime.distributed import Distributed
from trainer.training.loader import StepWork, TokenCounts
from trainer.training.loop import train_step
from trainer.training.training_run import TrainingRun

CPU = torch.device("cpu")
ROLES = ("domain", "replay")
BASE = FAMILY["base"].folder  # the miniature base, which measured runs start from


def ready_run(family: str, adapter: str = "lora", **options) -> TrainingRun:
    """A run whose adapter, if any, is not at its start, and whose optimizer keeps the gradients it was given instead of stepping."""
    model = tiny.model(family).train()
    use_packed_attention(model)
    if adapter == "lora":
        model = add_adapter(model, Lora(rank=4))
        stir(model)
    patch(model)
    held = retention.prepare(config.Retention(**options), model, ROLES)
    if adapter == "full":
        stir(model)  # away from the copy
    run = TrainingRun(Config(), None, CPU, Distributed(), model, model_size(model), FlatAdamW(model.parameters(), Optim()), Plan, None,
                      held)
    run.seen = []
    run.optimizer.step = lambda lr: run.seen.append(copied_gradients(run.optimizer, model)) or torch.zeros(())
    return run


def copied_gradients(optimizer: FlatAdamW, model: nn.Module) -> list[torch.Tensor]:
    """Return copies of the gradients that a step would use, of all trained parameters, in fp32."""
    optimizer.collect()
    small = {id(p): flat for group in optimizer.groups for p, flat in group.small}
    return [small.get(id(p), p.grad).clone() for p in model.parameters() if p.requires_grad]


class Plan:
    total = 100


def samples() -> list[Piece]:
    """Domain and replay samples of unequal weight, some of whose tokens are supervised."""
    rng = np.random.default_rng(0)
    return [Piece(rng.integers(5, 300, n).astype(np.int32), rng.random(n) < 0.6, weight, source)
            for n, weight, source in ((9, 1.0, 0), (14, 0.5, 1), (5, 2.0, 1), (11, 1.5, 0), (7, 1.0, 1))]


def step(run: TrainingRun, packs: list[list[Piece]], chats: list[Piece] | None = None):
    """Loss, divergence and gradients of one step on these packs, or of these packs' share of a step on `chats`."""
    chats = chats or [chat for pack in packs for chat in pack]
    kl_sources = run.kl.kl_sources if run.kl else np.zeros(2, dtype=bool)
    kl_only = run.kl and run.kl.options.kl_only
    weight = sum(collate([chat]).weight_sum for chat in chats if not (kl_only and kl_sources[chat.source])) or 1.0
    every = run.kl and run.kl.options.kl_positions == "all"
    kl_weight_sum = sum(chat.weight * (len(chat.input_ids) - 1) if every else collate([chat]).weight_sum
                        for chat in chats if kl_sources[chat.source])
    lay = run.kl.collate if run.kl else collate
    work = StepWork(0, [lay(pack) for pack in packs], weight, TokenCounts(), [], kl_weight_sum)
    metrics = train_step(run, work, Phases(CPU))
    return metrics.loss, metrics.kl, run.seen[-1]


def plain_rows(model: nn.Module, chat: Piece) -> torch.Tensor:
    """log-probabilities [S,V] at a sample's supervised tokens, by the stock model alone."""
    ids = torch.from_numpy(chat.input_ids.astype(np.int64))
    return torch.log_softmax(model(ids[None], use_cache=False).logits[0, :-1].double(), -1)[torch.from_numpy(chat.supervised[1:])]


def stock(run: TrainingRun) -> tuple[nn.Module, nn.Module]:
    """The run's model and its base as transformers and PEFT have them, in fp64."""
    full = not isinstance(run.model, PeftModel)
    model = tiny.model(run.model.config.model_type)
    base = copy.deepcopy(model)
    model = model if full else add_adapter(model, Lora(rank=4))
    model.load_state_dict({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
    return model.double(), base.double().requires_grad_(False)


def assert_close(ours, expected, tolerance: float = 1e-4) -> None:
    for a, b in zip(ours, expected, strict=True):
        a, b = a.detach().double(), b.detach().double()
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-9


def options(data: Path, *more) -> tuple[str, ...]:
    """Return the options of a run of eight steps whose items are those of the fixture `data`."""
    return ("--replay.data", str(data / "general.jsonl"), "--data.max_length", "256", "--max_steps", "8", "--forgetting.general",
            str(data / "kept.jsonl"), "--forgetting.domain", str(data / "learnt.jsonl"), "--forgetting.max_tokens", "24", *more)
