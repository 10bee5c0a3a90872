"""LoRA+, Muon, Adafactor, weight averaging and restarts: against PEFT's, torch's and transformers' own."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

from tests.helpers import tiny
from tests.helpers.models import stir
from trainer.config import Config, Optim
from trainer.optim.adamw import FlatAdamW
from trainer.optim.apart import apart
from trainer.optim.schedule import learning_rate


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(step))
    model(x).square().sum().backward()


def train(model: nn.Module, flat: FlatAdamW, lr: float, steps: int = 4) -> None:
    for step in range(steps):
        backward(model, step)
        flat.step(lr)
        flat.zero_grad()


def assert_equal_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_loraplus_is_pefts():
    base = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    ours = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    stir(ours)
    theirs = copy.deepcopy(ours)
    config = Config(optim=Optim(lr=0.01, loraplus_lr_ratio=8.0, max_grad_norm=0))
    flat = FlatAdamW(ours.parameters(), config.optim, apart(ours, config))
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0, weight_decay=0.0)
    train(ours, flat, 0.01)
    for step in range(4):
        backward(theirs, step)
        reference.step()
        reference.zero_grad()
    assert_equal_parameters(ours, theirs)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_muon_and_adafactor_are_torchs(name):
    ours, lr = network(), 0.02
    theirs, settings = copy.deepcopy(ours), Optim(name=name, lr=lr, weight_decay=0.1, max_grad_norm=0)
    matrices, vectors = ([p for p in theirs.parameters() if p.ndim == n] for n in (2, 1))
    flat = FlatAdamW(ours.parameters(), settings, [p for p in ours.parameters() if p.ndim == 2] if name == "muon" else ())
    if name == "muon":
        references = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0)]
    else:
        references = [torch.optim.Adafactor(matrices, lr=lr, weight_decay=0.1), torch.optim.Adafactor(vectors, lr=lr)]
    train(ours, flat, lr)
    for step in range(4):
        backward(theirs, step)
        for reference in references:
            reference.step()
            reference.zero_grad()
    assert_equal_parameters(ours, theirs)


@pytest.mark.parametrize("settings", [dict(name="muon"), dict(name="adafactor"), dict(ema_decay=0.5)])
def test_their_state_restores_the_next_steps_and_a_bad_gradient_changes_nothing(settings):
    first = network()
    twin, optim = copy.deepcopy(first), Optim(**settings)
    a, b = (FlatAdamW(model.parameters(), optim, [p for p in model.parameters() if p.ndim == 2]) for model in (first, twin))
    train(first, a, 0.01)
    b.load_state({name: tensor.clone() for name, tensor in a.state().items()})
    before = {name: tensor.clone() for name, tensor in a.state().items()}
    backward(first, 0)
    a.gradients[0][3] = torch.nan
    assert not a.step(0.01).isfinite()
    a.zero_grad()
    for name, tensor in a.state().items():
        assert "step" in name or torch.equal(tensor, before[name]), name
    b.load_state({name: tensor.clone() for name, tensor in a.state().items()})
    for model, flat in ((first, a), (twin, b)):
        train(model, flat, 0.01)
    assert all(map(torch.equal, first.parameters(), twin.parameters()))
    with pytest.raises(ValueError, match="expected"):
        FlatAdamW(network().parameters(), Optim()).load_state(a.state())


def test_muon_takes_the_matrices_in_layers_and_loraplus_those_called_b():
    model = tiny.model("llama")
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in apart(model, Config(method="full", optim=Optim(name="muon")))}
    assert found == {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2} and len(found) == 14
    assert apart(model, Config()) == []


def test_the_average_is_torchs_and_is_put_back():
    model = network()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    theirs.update_parameters(model)
    flat = FlatAdamW(model.parameters(), Optim(ema_decay=0.8))
    for step in range(5):
        backward(model, step)
        flat.step(0.05)
        flat.zero_grad()
        theirs.update_parameters(model)
    last = [p.detach().clone() for p in model.parameters()]
    with flat.averaged():
        assert_equal_parameters(model, theirs.module)
    assert all(map(torch.equal, model.parameters(), last))
    flat.keep_average()
    assert_equal_parameters(model, theirs.module)
    with flat.averaged():
        assert_equal_parameters(model, theirs.module)


def test_restarts_are_transformers():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 0, 30, num_cycles=3)
    theirs = []
    for _ in range(30):
        optimizer.step()
        schedule.step()
        theirs.append(schedule.get_last_lr()[0])
    settings = Optim(lr=1.0, lr_scheduler="cosine_with_restarts", num_cycles=3, warmup_ratio=0, min_lr_ratio=0)
    assert [learning_rate(step, 30, settings) for step in range(30)] == pytest.approx(theirs, abs=1e-9)
    assert theirs[9] == 1.0 and theirs[-1] == 0.0
