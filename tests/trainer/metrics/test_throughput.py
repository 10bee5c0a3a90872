"""The FLOP convention, counted by torch itself; phases and records."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import tiny
from trainer.config import Lora
from trainer.metrics.log import keep_records
from trainer.metrics.throughput import model_size, peak_flops
from trainer.metrics.timers import Phases, peak_memory_gb
from trainer.model.lora import add_adapter


def counted_flops(model, ids) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_flops_agree_with_what_torch_counts(adapter):
    model = tiny.model("llama", tie_word_embeddings=False, attn_implementation="eager").train()
    if adapter:
        model = add_adapter(model, Lora(rank=4))
        model.enable_input_require_grads()  # torch skips the first layer's input gradient otherwise; the convention counts it
    size = model_size(model)
    tokens = 96
    ids = torch.randint(5, 300, (1, tokens))
    # eager attention computes the full square: 12 tokens^2 where the causal convention says 6
    causal_half = 6 * tokens**2 * size.attention_width
    expected = size.flops(tokens, tokens, tokens**2) + causal_half
    assert counted_flops(model, ids) == pytest.approx(expected, rel=0.01)


def test_size_of_an_adapter():
    model = tiny.model("llama", tie_word_embeddings=False)
    full = model_size(model)
    assert full.frozen_matrices == 0 and full.head_trained
    adapted = model_size(add_adapter(model, Lora(rank=4)))
    assert adapted.frozen_matrices == full.trained_matrices and not adapted.head_trained
    assert adapted.trained_matrices == adapted.trainable > 0


def test_a_cpu_has_a_measured_peak_and_memory():
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < rate < 1e13 and "measured" in source
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 100


def test_phases_add_up():
    phases = Phases(torch.device("cpu"))
    for _ in range(3):
        with phases("forward"):
            sum(range(1000))
    seconds = phases.read()
    assert list(seconds) == ["forward"] and 0 < seconds["forward"] < 1
    assert phases.read() == {}


def test_records_beyond_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"kind": "step", "step": s} for s in (10, 20, 30)] + [{"kind": "end", "step": 20}]
    path.write_text("".join(json.dumps(r) + "\n" for r in whole) + '{"kind": "step", "step": 20, "seconds": {"data": 0.1}')
    keep_records(path, 20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
    keep_records(path, 0)
    assert not path.exists()
