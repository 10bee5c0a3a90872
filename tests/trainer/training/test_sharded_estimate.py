"""Check the estimate of memory by ranks: what they share, and what each holds whole."""

import dataclasses

import pytest
import torch

from tests.helpers import tiny
from trainer.config import BatchSize, Config, Fsdp, Lora
from trainer.model.lora import add_adapter
from trainer.training.memory_estimate import estimate
from trainer.training.sharded_estimate import RANKS, describe, sharded_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(("method", "dtype", "per_trained", "per_frozen"), [
    ("full", torch.float32, 16, 0), ("full", torch.bfloat16, 16, 0), ("lora", torch.bfloat16, 16, 2), ("qlora", torch.bfloat16, 16, 0.5)])
def test_ranks_share_weights_gradients_and_states(method, dtype, per_trained, per_frozen):
    model = tiny.model("llama").requires_grad_(method == "full")
    model = model if method == "full" else add_adapter(model, Lora(rank=4))
    config = Config(method=method, batch=BatchSize(tokens_per_pack=256))
    two, four = (sharded_bytes(model, config, dtype, CPU, ranks) for ranks in (2, 4))
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == wanted) for wanted in (True, False))
    outside = sum(p.numel() for name, p in model.named_parameters() if not p.requires_grad and "proj" not in name)  # stay dense
    shared = per_trained * trained + per_frozen * frozen + (2 - per_frozen) * outside * (method == "qlora")
    assert 4 * (two - four) == pytest.approx(shared, rel=1e-6)
    offloaded = dataclasses.replace(config, fsdp=Fsdp(enabled=True, cpu_offload=True))
    assert sharded_bytes(model, offloaded, dtype, CPU, 2) == pytest.approx(two - shared / 2)
    whole = estimate(model, config, dtype, CPU)
    assert two - shared / 2 > whole.activations + whole.loss


def test_the_dry_run_shows_memory_by_ranks():
    model, config = tiny.model("llama"), Config(method="full", batch=BatchSize(tokens_per_pack=256))
    (line,) = describe(model, config, torch.float32, CPU)
    assert [int(word.rstrip(",")) for word in line.split("ranks: ")[1].split()[2::3]] == [*RANKS]
    config.optim.name = "muon"
    assert describe(model, config, torch.float32, CPU) == []
