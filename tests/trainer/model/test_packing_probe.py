"""Planted leaks are found, however small and wherever; sound models pass; nothing of the model changes."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.helpers import tiny
from trainer.model import packing_probe
from trainer.model.mixers import runs_by_sample
from trainer.model.packing_probe import LENGTHS, find_mixers, higher_precision, layers, probe_packing

SLEEPING = 8e-4


def model(family="llama", dtype=torch.float32, **overrides):
    return tiny.model(family, dtype=dtype, num_hidden_layers=3, **overrides)


def leak_everywhere(x, size):
    """Add a share of the pack's first token to every later one."""
    return x + size * x[:, :1]


def leak_into_one_token(x, size):
    """Add a share of each token to the next one, at the first boundary only."""
    if x.shape[1] != sum(LENGTHS):
        return x
    boundary = LENGTHS[0]
    changed = x.clone()
    changed[:, boundary] += size * x[:, boundary - 1]
    return changed


def leak_from_behind(x, size):
    """Add a share of the last token to every other one."""
    return x + size * x[:, -1:]


def plant(made, leak, size):
    """Make the last norm leak: no part of a layer, so that no mixer is found there."""
    norm = made.model.norm
    norm.forward = partial(lambda stock, x: leak(stock(x), size), norm.forward)


@pytest.mark.parametrize("leak, size, dtype", [
    (leak_everywhere, 1.0, torch.float32), (leak_everywhere, 1e-4, torch.bfloat16), (leak_into_one_token, 1.0, torch.bfloat16),
    (leak_into_one_token, 1e-4, torch.float32), (leak_into_one_token, 1e-4, torch.bfloat16), (leak_from_behind, 1e-4, torch.float32)])
def test_a_planted_leak_is_found(leak, size, dtype):
    made = model(dtype=dtype)
    plant(made, leak, size)
    fault = probe_packing(made)
    assert "samples in one pack change each other" in fault or "differs from the sample alone" in fault


class FreshConv(nn.Module):
    """A causal convolution over tokens whose fresh weights hardly change anything, in place of an MLP."""

    def __init__(self, width, size):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width, bias=False)
        self.scale = nn.Parameter(torch.full((1, 1), size))

    def forward(self, x):
        return self.scale * self.conv(x.transpose(1, 2))[..., :x.shape[1]].transpose(1, 2)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_mixer_is_found_and_runs_by_sample(size):
    """Layers of a kind are treated alike, those of another are not touched."""
    made = model()
    for layer in made.model.layers[:2]:
        layer.mlp = FreshConv(64, size)
    assert probe_packing(made) is None
    assert [runs_by_sample(layer.mlp) for layer in made.model.layers] == [True, True, False]
    assert sum(map(runs_by_sample, made.modules())) == 2


def with_sleeping_leak(size):
    """Return a model whose attention adds the pack's first token to every token, times a small matrix, four times over."""
    made = model()
    torch.manual_seed(0)
    hidden_size = made.config.hidden_size
    asleep = torch.nn.Parameter(torch.randn(hidden_size, hidden_size) * size)

    def leaky(attention, stock, hidden_states, **kwargs):
        return stock(hidden_states, **kwargs)[0] + hidden_states[:, :1] @ torch.linalg.matrix_power(attention.asleep, 4), None

    for layer in made.model.layers:
        layer.self_attn.asleep = asleep
        layer.self_attn.forward = partial(leaky, layer.self_attn, layer.self_attn.forward)
    return made


def test_a_leak_that_training_may_wake_is_found(monkeypatch):
    """With fresh weights the leak is within rounding; with matrices eight times as large it is not."""
    made = with_sleeping_leak(SLEEPING)
    with torch.no_grad():
        assert len(find_mixers(made, torch.float32)) == 3
    monkeypatch.setattr(packing_probe, "AMPLIFIED", 1.0)
    monkeypatch.setattr(packing_probe, "LADDER", (1.0,))
    with torch.no_grad():
        assert find_mixers(made, torch.float32) == []
    assert probe_packing(made) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_as_it_was(dtype):
    made = model("qwen3", dtype).train()
    before = {name: (p.data_ptr(), p.dtype, p.clone()) for name, p in made.named_parameters()}
    assert probe_packing(made) is None
    assert made.training and made.config._attn_implementation == "sdpa"
    for name, p in made.named_parameters():
        pointer, dtype, value = before[name]
        assert (p.data_ptr(), p.dtype) == (pointer, dtype)
        assert torch.equal(p, value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())


def test_layers_compute_in_higher_precision_one_at_a_time():
    made, seen = model(dtype=torch.bfloat16), []
    for layer in layers(made):
        layer.mlp.register_forward_hook(lambda mlp, args, out: seen.append((out.dtype, {p.dtype for p in made.model.layers.parameters()})))
    with torch.no_grad(), higher_precision(made, torch.float32):
        assert made.model(input_ids=torch.arange(5)[None]).last_hidden_state.dtype == torch.float32
    assert len(seen) == 3
    assert all(dtype == torch.float32 and dtypes == {torch.float32, torch.bfloat16} for dtype, dtypes in seen)


def test_a_router_that_groups_tokens_is_no_mixer():
    made = tiny.model("mixtral", num_local_experts=4)
    with torch.no_grad():
        assert find_mixers(made, torch.float32) == []
    assert probe_packing(made) is None
