"""The step itself: its loss and gradients against the stock model's, and nothing that would make the host wait for a GPU."""

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from tests.helpers.runs import Readbacks, samples
from trainer.config import Config, Lora
from trainer.data.batch import PadTo, collate, pad_batch
from trainer.metrics.throughput import model_size
from trainer.metrics.timers import Phases
from trainer.model.loading import use_packed_attention
from trainer.model.lora import add_adapter
from trainer.model.patch import patch
from trainer.optim.adamw import FlatAdamW
from trainer.runtime.distributed import Distributed
from trainer.training.loader import StepWork, TokenCounts
from trainer.training.loop import train_step
from trainer.training.training_run import TrainingRun

CPU = torch.device("cpu")


def ready_run(family: str) -> TrainingRun:
    model = tiny.model(family).train()
    use_packed_attention(model)
    model = add_adapter(model, Lora(rank=4))
    patch(model)
    optimizer = FlatAdamW(model.parameters(), Config().optim)

    class Plan:
        total = 100

    return TrainingRun(Config(), None, CPU, Distributed(), model, model_size(model), optimizer, Plan, None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_a_step_reads_nothing_back(family):
    run, batch = ready_run(family), collate(samples())
    with Readbacks() as readbacks:
        train_step(run, StepWork(0, [batch, batch], 2 * batch.weight_sum, TokenCounts(), []), Phases(CPU))
    assert readbacks.found == []
    with Readbacks() as readbacks:
        torch.ones(()).item()
    assert readbacks.found, "the test sees a scalar that is read back"


def test_the_loss_is_the_weighted_mean_of_the_stock_models():
    run, chats = ready_run("llama"), samples()
    batch = collate(chats)
    loss = train_step(run, StepWork(0, [batch], batch.weight_sum, TokenCounts(), []), Phases(CPU)).loss
    stock, total = tiny.model("llama").requires_grad_(False), 0.0
    for ids, supervised, weight, *_ in chats:
        logits = stock(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64)), reduction="none")
        total += weight * float(losses[torch.from_numpy(supervised[1:])].sum())
    assert float(loss) == pytest.approx(total / batch.weight_sum, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_fills_a_pack_up_changes_nothing(family):
    one, two, batch = ready_run(family), ready_run(family), collate(samples())
    longer = pad_batch(batch, PadTo(tokens=64, rows=32), capacity=64)
    assert len(longer.input_ids) == 64 and len(longer.targets) == 32
    outcomes = [(*train_step(run, StepWork(0, [b], b.weight_sum, TokenCounts(), []), Phases(CPU))[:2], run.optimizer.groups[0].master)
                for run, b in ((one, batch), (two, longer))]
    for mine, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_pack_without_supervised_tokens_adds_nothing():
    one, two = ready_run("llama"), ready_run("llama")
    batch = collate(samples())
    silent = collate([sample._replace(supervised=np.zeros(len(sample.input_ids), dtype=bool)) for sample in samples()])
    loss_one, norm_one, *_ = train_step(one, StepWork(0, [batch], batch.weight_sum, TokenCounts(), []), Phases(CPU))
    loss_two, norm_two, *_ = train_step(two, StepWork(0, [silent, batch], batch.weight_sum, TokenCounts(), []), Phases(CPU))
    assert torch.equal(loss_one, loss_two) and torch.equal(norm_one, norm_two)
