"""Shapes read from a config are those that the model's attention really has."""

import pytest
import torch
from transformers import AttentionInterface, AutoConfig

from tests.helpers import tiny
from trainer.model.attention_shapes import attention_shapes

WIDER = {"gemma4_text": dict(global_head_dim=32, num_kv_shared_layers=0), "laguna": dict(num_attention_heads_per_layer=[4, 2]),
         "inkling_text": dict(swa_num_attention_heads=2)}  # settings under which layers differ
FAMILIES = ("llama", "qwen3_5_text", "lfm2", "granitemoehybrid", "deepseek_v3", "qwen3_moe", "gpt_oss", "zamba2", "falcon_h1", *WIDER)
RECORDING, RECORDED = "recording", []  # an attention for transformers that notes the shapes it gets


def record(module, query, key, value, attention_mask=None, **kwargs):
    RECORDED.append((query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return (torch.softmax(query @ key.transpose(2, 3), -1) @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_that_attention_gets(family):
    AttentionInterface.register(RECORDING, record)
    RECORDED.clear()
    model = tiny.model(family, attn_implementation=RECORDING, **WIDER.get(family, {}))
    with torch.no_grad():
        model(input_ids=torch.arange(9)[None], use_cache=False)
    found = attention_shapes(model.config.get_text_config())
    assert len(found) == model.config.get_text_config().num_hidden_layers
    assert [(s.heads, s.key_heads, s.key_width, s.value_width) for s in found if s] == RECORDED and RECORDED


def test_a_layer_may_read_the_keys_of_another():
    shapes = attention_shapes(tiny.model_config("gemma4_text", global_head_dim=32))
    assert [(s.key_heads, s.key_width, s.cache_width) for s in shapes] == [(2, 16, 64), (2, 32, 128), (0, 16, 0), (0, 32, 0)]


def test_a_latent_cache_holds_the_latents():
    assert {s.cache_width for s in attention_shapes(tiny.model_config("deepseek_v3"))} == {16 + 8}


def test_layers_may_differ_in_heads():
    assert [s.heads for s in attention_shapes(tiny.model_config("step3p5", num_sliding_attention_heads=8))] == [8, 4, 4]


@pytest.mark.parametrize("family", ["mamba2", "rwkv"])
def test_models_without_attention(family):
    assert set(attention_shapes(AutoConfig.for_model(family))) == {None}
