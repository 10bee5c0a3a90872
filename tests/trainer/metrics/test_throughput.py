"""The FLOP convention, counted by torch itself; phases and records."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from tests.helpers import tiny
from trainer.config import Lora
from trainer.metrics.log import keep_records
from trainer.metrics.throughput import model_size, peak_flops
from trainer.metrics.timers import Phases, peak_memory_gb
from trainer.model.experts import expert_share
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


def counted_matrices(model, ids) -> int:
    """FLOP of products of two matrices, forward and backward; attention and mixers without it multiply batches of them."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def counted_attention(model, ids) -> float:
    """FLOP of causal attention: three times those of a forward pass (torch cannot tell whose a backward's are), and half of the square."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    return sum(ops.get(torch.ops.aten.bmm, 0) for name, ops in counter.get_flop_counts().items() if name.endswith("self_attn")) * 3 / 2


@pytest.mark.parametrize("family", ["gemma4_text", "qwen3_5_moe_text", "lfm2", "granitemoehybrid", "deepseek_v3", "qwen3_moe", "gpt_oss",
                                    "mixtral"])
def test_flops_of_experts_and_of_layers_without_attention(family):
    model = tiny.model(family, attn_implementation="eager", experts_implementation="eager").train()
    tokens = 64
    ids = torch.randint(5, 300, (1, tokens))
    attention = counted_attention(model, ids)
    assert attention > 0
    assert model_size(model).flops(tokens, tokens, tokens**2) == pytest.approx(counted_matrices(model, ids) + attention, rel=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_experts_count_where_tokens_pass(family):
    model = tiny.model(family)
    size = model_size(get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=[
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"])))
    assert size.trained_matrices == size.trainable * 2 / 4  # two of four experts
    assert size.frozen_matrices == model_size(tiny.model(family)).trained_matrices


def test_experts_of_code_that_does_not_tell_how_many_it_chooses():
    model = tiny.model("qwen3_moe")
    assert expert_share(model.config) == 2 / 4
    model.config = PreTrainedConfig(num_hidden_layers=2, num_experts=4)
    assert model_size(model).flops(8, 8, 64) is None


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
