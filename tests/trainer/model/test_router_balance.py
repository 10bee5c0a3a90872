"""The load-balancing loss of routers, against the one that transformers adds to its own loss."""

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from tests.helpers.runs import Readbacks
from trainer.config import Config
from trainer.data.batch import PadTo, collate, pad_batch
from trainer.data.samples import Piece
from trainer.errors import UserError
from trainer.metrics.throughput import model_size
from trainer.metrics.timers import Phases
from trainer.model import router_balance
from trainer.model.forward import apply_activation_checkpointing, supervised_hidden
from trainer.model.loading import use_packed_attention
from trainer.model.patch import patch
from trainer.optim.adamw import FlatAdamW
from trainer.runtime.distributed import Distributed
from trainer.training.loader import StepWork, TokenCounts
from trainer.training.loop import train_step
from trainer.training.loss import pack_loss
from trainer.training.training_run import TrainingRun

CPU = torch.device("cpu")


def ready(family: str):
    """A model that runs packs, and its balance."""
    model = tiny.model(family).train()
    use_packed_attention(model)
    patch(model)
    return model, router_balance.prepare(0.5, model)


def pack(*lengths: int, supervised: int = 3):
    """A pack of samples whose last tokens are supervised."""
    rng = np.random.default_rng(0)
    return collate([Piece(rng.integers(5, 300, n).astype(np.int32), np.arange(n) >= n - supervised) for n in lengths])


def note(model, balance, batch):
    with balance.note():
        supervised_hidden(model, batch)
    return balance.loss(batch.tokens)


def transformers_loss(family: str, ids):
    """The loss of one sample, and the model whose routers it reached."""
    stock = tiny.model(family)
    loss = stock(input_ids=ids[None], output_router_logits=True, use_cache=False).aux_loss
    loss.backward()
    return loss.detach(), stock


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "granitemoehybrid", "qwen3_5_moe_text", "jamba",
                                    "ernie4_5_moe", "olmoe", "phimoe"])
def test_the_loss_of_a_sample_is_transformers(family):
    model, balance = ready(family)
    model.eval()  # Phi's routers add noise in training
    batch = pack(21)
    loss = note(model, balance, batch)
    loss.backward()
    expected, stock = transformers_loss(family, batch.input_ids)
    torch.testing.assert_close(loss.detach(), expected)
    grads, wanted = ({name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (model, stock))
    reached = [name for name in wanted if wanted[name].ndim == 2 and ("router" in name or ".gate." in name)]
    assert reached and all(wanted[name].norm() > 0 for name in reached)
    for name in reached:
        torch.testing.assert_close(grads[name], wanted[name], rtol=1e-3, atol=1e-6)


def test_a_pack_is_one_batch_of_its_real_tokens():
    model, balance = ready("qwen3_moe")
    batch = pack(21, 9, 14)
    loss = note(model, balance, batch)
    padded = pad_batch(batch, PadTo(tokens=64, rows=32), 64)
    assert len(padded.input_ids) == 64 and padded.tokens == 44
    torch.testing.assert_close(note(model, balance, padded), loss)
    logits = [[] for _ in range(2)]
    for sample in batch.input_ids.split([21, 9, 14]):
        for layer, found in zip(logits, tiny.model("qwen3_moe")(sample[None], output_router_logits=True).router_logits):
            layer.append(found)
    shares = torch.stack([torch.cat(layer) for layer in logits]).softmax(-1)  # [layers, T, E]
    chosen = torch.zeros_like(shares).scatter(-1, shares.topk(2).indices, 1.0)
    torch.testing.assert_close(loss, 4 * (chosen.mean((0, 1)) * shares.mean((0, 1))).sum(), rtol=1e-4, atol=1e-5)


def test_samples_that_run_one_by_one_give_the_same_loss():
    model, balance = ready("qwen3_moe")
    batch = pack(21, 9, 14)
    loss = note(model, balance, batch)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(note(model, balance, batch), loss)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_count_once(mode):
    model, balance = ready("qwen3_moe")
    batch = pack(21, 9)
    results = []
    for checkpointing in ("none", mode):
        apply_activation_checkpointing(model, checkpointing)
        model.zero_grad()
        loss = note(model, balance, batch)
        loss.backward()
        assert {len(noted) for noted in balance.logits.values()} == {1} and len(balance.logits) == 2
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "doge", "llama4_text"])
def test_models_without_such_a_loss_are_refused(family):
    assert router_balance.prepare(0.0, tiny.model(family)) is None
    with pytest.raises(UserError, match=rf"^router_aux_loss_coef: expected a mixture of experts [^\n]*, got {family}; set it to 0$"):
        router_balance.prepare(0.01, tiny.model(family))


def test_a_step_adds_each_packs_loss_by_its_share_of_tokens():
    model, balance = ready("qwen3_moe")
    packs = [pack(21, 9), pack(14)]
    work = StepWork(0, packs, sum(batch.weight_sum for batch in packs), TokenCounts(tokens=44), [])
    expected = sum(float(note(model, balance, batch)) * batch.tokens / 44 for batch in packs)
    plain = [pack_loss(model, batch, work, None, Phases(CPU)) for batch in packs]
    ours = [pack_loss(model, batch, work, None, Phases(CPU), balance) for batch in packs]
    assert all(found.router_aux_loss is None for found in plain)
    assert float(sum(found.router_aux_loss for found in ours)) == pytest.approx(expected, rel=1e-6)
    for a, b in zip(plain, ours):
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(b.objective, a.objective + 0.5 * b.router_aux_loss)

    class Plan:
        total = 100

    optimizer = FlatAdamW(model.parameters(), Config().optim)
    run = TrainingRun(Config(), None, CPU, Distributed(), model, model_size(model), optimizer, Plan, None, balance=balance)
    routers = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    before = [p.clone() for p in routers]
    with Readbacks() as readbacks:
        metrics = train_step(run, work, Phases(CPU))
    assert float(metrics.router_aux_loss) == pytest.approx(expected, rel=1e-6)
    assert all((p - start).abs().max() > 0 for p, start in zip(routers, before))
    assert readbacks.found == []
