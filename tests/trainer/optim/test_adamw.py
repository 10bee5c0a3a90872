"""Flat masters against torch's AdamW on separate parameters, the guard, and the schedules."""

import copy

import pytest
import torch
from torch import nn

from trainer.config import Optim
from trainer.errors import UserError
from trainer.optim import adamw
from trainer.optim.adamw import FlatAdamW
from trainer.optim.schedule import learning_rate


def network(dtype=torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def accumulate(model: nn.Module, packs: int = 2) -> None:
    for seed in range(packs):
        x = torch.randn(11, 7, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
        model(x).float().square().sum().backward()


def test_five_steps_equal_torch_adamw_with_clipping():
    settings = Optim(lr=0.05, weight_decay=0.1, max_grad_norm=0.5)
    ours, stock = network(), None
    stock = copy.deepcopy(ours)
    flat = FlatAdamW(ours.parameters(), settings)
    groups = [dict(params=[p for p in stock.parameters() if p.ndim == 2], weight_decay=0.1),
              dict(params=[p for p in stock.parameters() if p.ndim == 1], weight_decay=0.0)]
    reference = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(5):
        accumulate(ours)
        accumulate(stock)
        expected = nn.utils.clip_grad_norm_(stock.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        norm = flat.step(0.05)
        flat.zero_grad()
        torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.parameters(), stock.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("small", [0, 20, 1 << 18])
def test_gradients_that_are_added_together_are_those_that_come_one_by_one(small, monkeypatch):
    """Bit for bit, over packs, with parameters on both sides of the bound."""
    monkeypatch.setattr(adamw, "SMALL", small)
    model = network()
    stock = copy.deepcopy(model)
    flat = FlatAdamW(model.parameters(), Optim())
    for packs in (1, 2):
        for seed in range(packs):
            x = torch.randn(11, 7, generator=torch.Generator().manual_seed(seed))
            model(x).square().sum().backward()
            flat.collect()
            stock(x).square().sum().backward()
        assert [p.grad is None for p in model.parameters()] == [p.numel() <= small for p in model.parameters()]
        expected = [p.grad.flatten() for p in (stock[0].weight, stock[2].weight, stock[0].bias, stock[2].bias)]
        gathered = torch.cat([g[g != 0] for g in flat.gradients])
        assert torch.equal(gathered, torch.cat([g[g != 0] for g in expected]))
        flat.zero_grad()
        stock.zero_grad()
    model(x).sum().backward()
    flat.zero_grad()
    assert not any(g.any() for g in flat.gradients), "a gradient that was not collected is dropped too"


def test_fp32_parameters_are_views_and_bf16_ones_follow_their_masters():
    model = network()
    flat = FlatAdamW(model.parameters(), Optim())
    assert all(p.data_ptr() >= flat.groups[0].master.data_ptr() for p in list(model.parameters())[::2])
    low = network(torch.bfloat16)
    flat = FlatAdamW(low.parameters(), Optim(lr=1e-4, max_grad_norm=0))
    masters = flat.groups[0].master.detach().clone()
    accumulate(low)
    assert all(p.grad is None for p in low.parameters()), "the low-precision gradient is dropped once it is added up"
    flat.step(1e-4)
    moved = flat.groups[0].master
    assert 0 < (moved - masters).abs().max() < 2e-4, "the master keeps updates that bf16 would round away"
    torch.testing.assert_close(low[0].weight, moved[: 35].view(5, 7).to(torch.bfloat16), rtol=0, atol=0)


def test_low_precision_gradients_add_up_in_fp32():
    low = network(torch.bfloat16)
    flat = FlatAdamW(low.parameters(), Optim())
    accumulate(low, packs=1)
    once = [g.clone() for g in flat.gradients]
    for _ in range(299):
        accumulate(low, packs=1)
    for one, many in zip(once, flat.gradients):
        torch.testing.assert_close(many, 300 * one, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    model = network()
    flat = FlatAdamW(model.parameters(), Optim(lr=0.1))
    accumulate(model)
    flat.step(0.1)
    flat.zero_grad()
    before = {k: v.clone() for k, v in flat.state().items()}
    accumulate(model)
    flat.gradients[0][3] = bad
    assert not flat.step(0.1).isfinite()
    for name, value in flat.state().items():
        assert torch.equal(value, before[name]), name


def test_state_restores_the_next_steps_bit_for_bit():
    def steps(model, flat, count):
        for _ in range(count):
            accumulate(model)
            flat.step(0.01)
            flat.zero_grad()

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        first = network(dtype)
        twin = copy.deepcopy(first)
        a, b = FlatAdamW(first.parameters(), Optim()), FlatAdamW(twin.parameters(), Optim())
        steps(first, a, 3)
        b.load_state({k: v.clone() for k, v in a.state().items()})
        steps(first, a, 3)
        steps(twin, b, 3)
        for x, y in zip(first.parameters(), twin.parameters()):
            assert torch.equal(x, y)


def test_nothing_to_train_is_an_error():
    model = network().requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        FlatAdamW(model.parameters(), Optim())


def rates(total: int, **settings) -> list[float]:
    return [learning_rate(step, total, Optim(lr=1.0, **settings)) for step in range(total)]


def test_schedules():
    assert rates(5, lr_scheduler="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1]
    linear = rates(10, lr_scheduler="linear", warmup_ratio=0, min_lr_ratio=0.1)
    assert linear[-1] == pytest.approx(0.1) and linear[0] == pytest.approx(0.91)
    cosine = rates(100, lr_scheduler="cosine", warmup_ratio=0.1, min_lr_ratio=0.0)
    assert cosine[9] == 1 and cosine[54] == pytest.approx(0.5) and cosine[-1] == pytest.approx(0, abs=1e-9)
    wsd = rates(100, lr_scheduler="wsd", warmup_steps=10, decay_ratio=0.2, min_lr_ratio=0.0)
    assert wsd[10:80] == [1.0] * 70 and wsd[89] == pytest.approx(0.5) and wsd[-1] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(wsd[10:], wsd[11:]))


def test_a_number_of_steps_wins_over_a_share():
    assert rates(20, lr_scheduler="constant", warmup_ratio=0.5, warmup_steps=4) == rates(20, lr_scheduler="constant", warmup_ratio=0.2)
    shares = dict(lr_scheduler="wsd", warmup_ratio=0.1)
    assert rates(20, **shares, decay_ratio=0.9, decay_steps=5) == rates(20, **shares, decay_ratio=0.25)
