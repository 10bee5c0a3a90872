"""The estimate against the bytes that autograd really keeps."""

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from trainer.config import BatchSize, Config, Lora
from trainer.data.batch import collate
from trainer.data.samples import Piece
from trainer.model.forward import apply_activation_checkpointing
from trainer.model.loading import use_packed_attention
from trainer.model.lora import add_adapter
from trainer.model.patch import patch
from trainer.optim.adamw import FlatAdamW
from trainer.training.loss import sft_loss
from trainer.training.memory_estimate import activation_bytes, estimate

TOKENS = 960
CPU = torch.device("cpu")


def saved_bytes(model, batch) -> int:
    """Bytes of distinct storages kept for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sft_loss(model, batch)
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_activations_of_a_pack(checkpointing):
    model = tiny.model("llama", num_hidden_layers=6, hidden_size=128, intermediate_size=352).train()
    use_packed_attention(model)
    model = add_adapter(model, Lora(rank=4))
    patch(model)
    apply_activation_checkpointing(model, checkpointing)
    ids = np.arange(120, dtype=np.int32)
    batch = collate([Piece(ids, np.ones(120, dtype=bool))] * (TOKENS // 120))
    estimated = activation_bytes(model, TOKENS, 4, checkpointing, CPU)
    real = saved_bytes(model, batch) - TOKENS * 128 * 4  # the loss keeps one row gradient per supervised token
    assert estimated == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("family", ["gemma4_text", "lfm2", "qwen3_moe"])
def test_activations_of_other_layouts(family):
    """Stock layers keep up to twice as much."""
    model = tiny.model(family).train()
    use_packed_attention(model)
    ids = np.arange(120, dtype=np.int32)
    batch = collate([Piece(ids, np.ones(120, dtype=bool))] * 2)
    real = saved_bytes(model, batch) - 240 * 64 * 4
    assert real / 2 < activation_bytes(model, 240, 4, "none", CPU) < 1.2 * real


def test_checkpointing_keeps_less():
    model = tiny.model("llama", num_hidden_layers=6)
    none, selective, full = (activation_bytes(model, TOKENS, 4, mode, CPU) for mode in ("none", "selective", "full"))
    assert full < selective / 2 < none / 3


def test_the_states_are_counted_exactly():
    config = Config(method="full", batch=BatchSize(tokens_per_pack=64, tokens_per_step=64))
    model = tiny.model("llama")
    count = sum(p.numel() for p in model.parameters())
    optimizer = FlatAdamW(model.parameters(), config.optim)
    optimizer.step(1e-4)
    estimated = estimate(model, config, torch.float32, CPU)
    held = sum(t.numel() * 4 for t in optimizer.state().values()) + sum(g.numel() * 4 for g in optimizer.gradients)
    assert estimated.weights == count * 4 and estimated.masters == 0
    assert estimated.weights + estimated.gradients + estimated.moments == pytest.approx(held, rel=0.02)
