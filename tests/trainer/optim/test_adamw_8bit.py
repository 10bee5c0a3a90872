"""8-bit AdamW: bitsandbytes' update bit for bit, clipped, guarded, restored."""

import copy

import pytest
import torch
from torch import nn

from trainer.config import Optim
from trainer.optim.adamw import FlatAdamW
from trainer.optim.adamw_8bit import AdamW8bit

bitsandbytes = pytest.importorskip("bitsandbytes")


def network() -> nn.Module:
    """A large matrix, for moments in bytes; a small one and vectors, for fp32."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(48, 100), nn.Tanh(), nn.Linear(100, 3))


def accumulate(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed))
    loss = (model(x) - x[:, :3].sin()).square().mean()
    loss.backward()
    return loss.detach()


def descend(model, flat, steps, lr=0.01) -> list[float]:
    losses = []
    for step in range(steps):
        losses.append(float(accumulate(model, step)))
        flat.step(lr)
        flat.zero_grad()
    return losses


def test_8_bit_moments_are_bytes_and_small_weights_keep_fp32():
    model = network()
    flat = FlatAdamW(model.parameters(), Optim(name="adamw_8bit"))
    descend(model, flat, 1)
    state = flat.state()
    assert [type(update).__name__ for update in flat.updates] == ["AdamW8bit", "FusedAdamW", "FusedAdamW"]
    assert state["0.exp_avg"].dtype == state["0.exp_avg_sq"].dtype == torch.uint8
    assert state["0.exp_avg"].numel() == state["0.master"].numel() == 19 * 256  # 4800 weights in whole blocks
    assert state["0.exp_avg_scale"].numel() == 19 and state["1.exp_avg"].dtype == torch.float32
    assert state["0.exp_avg"].unique().numel() > 50, "the moments are there"


@pytest.mark.parametrize("segment", [1 << 24, 1024])
def test_the_update_is_that_of_bitsandbytes_bit_for_bit(segment, monkeypatch):
    monkeypatch.setattr(AdamW8bit, "SEGMENT", segment)
    model, weight = network(), nn.Parameter(network()[0].weight.detach().clone())
    flat = FlatAdamW(model.parameters(), Optim(name="adamw_8bit", weight_decay=0.1, max_grad_norm=0))
    stock = bitsandbytes.optim.AdamW8bit([weight], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(6):
        accumulate(model, step)
        weight.grad = model[0].weight.grad.clone()
        flat.step(0.01), stock.step()
        flat.zero_grad()
        assert torch.equal(model[0].weight, weight), step
    kept = stock.state[weight]
    assert torch.equal(flat.state()["0.exp_avg"][:4800], kept["state1"].flatten())
    assert torch.equal(flat.state()["0.exp_avg_sq_scale"], kept["absmax2"])


def test_8_bit_training_goes_as_fp32_training_goes():
    runs = {}
    for name in ("adamw", "adamw_8bit"):
        model = network()
        runs[name] = descend(model, FlatAdamW(model.parameters(), Optim(name=name)), 150)
    fp32, eight = (torch.tensor(runs[name]) for name in ("adamw", "adamw_8bit"))
    assert fp32[-10:].mean() < 0.1 * fp32[0]
    assert ((eight - fp32).abs() <= 0.1 * fp32 + 1e-3).all(), (eight / fp32 - 1).abs().max()


def test_8_bit_gradients_are_clipped():
    model, free = network(), network()
    clipped = FlatAdamW(model.parameters(), Optim(name="adamw_8bit", max_grad_norm=1e-3, eps=1e4))
    unclipped = FlatAdamW(free.parameters(), Optim(name="adamw_8bit", max_grad_norm=0, eps=1e4))
    before = clipped.groups[0].master.detach().clone()
    accumulate(model, 0), accumulate(free, 0)
    norm, ratio = clipped.step(1e4), 1e-3 / unclipped.step(1e4)
    assert norm > 1e-2
    # with so large an eps the update is linear in the gradient
    moved, moved_free = (flat.groups[0].master - before for flat in (clipped, unclipped))
    torch.testing.assert_close(moved, moved_free * ratio, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_8_bit_step_that_is_not_finite_changes_no_weight_and_no_moment(bad, monkeypatch):
    monkeypatch.setattr(AdamW8bit, "SEGMENT", 1024)
    model = network()
    flat = FlatAdamW(model.parameters(), Optim(name="adamw_8bit"))
    descend(model, flat, 2)
    before = {name: value.clone() for name, value in flat.state().items()}
    accumulate(model, 3)
    flat.gradients[0][3] = bad
    assert not flat.step(0.1).isfinite()
    for name, value in flat.state().items():
        assert torch.equal(value, before[name] + (name == "0.step")), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_state_restores_the_next_steps_bit_for_bit(dtype):
    first = network().to(dtype)
    twin, a = copy.deepcopy(first), FlatAdamW(first.parameters(), Optim(name="adamw_8bit"))
    b = FlatAdamW(twin.parameters(), Optim(name="adamw_8bit"))

    def steps(model, flat, seeds):
        for seed in seeds:
            model(torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)).to(dtype)).float().square().mean().backward()
            flat.step(0.01)
            flat.zero_grad()

    steps(first, a, range(3))
    b.load_state({name: value.clone() for name, value in a.state().items()})
    for model, flat in ((first, a), (twin, b)):
        steps(model, flat, range(3, 6))
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(value, b.state()[name]) for name, value in a.state().items())
