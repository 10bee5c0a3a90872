"""Packed attention in stock modules: equal to stock attention, refused where packs cannot be expressed."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from tests.helpers import tiny
from tests.helpers.models import our_logits, pack, relative_error, stock_logits, with_packed_attention
from trainer.errors import UserError
from trainer.model.packed_attention import is_packed
from trainer.model.patch import patch

UNKNOWN = {  # family: (settings, whether it packs)
    "gpt_neox": ({}, True),
    "starcoder2": (dict(sliding_window=8), True),
    "opt": (dict(ffn_dim=112, word_embed_proj_dim=32), True),
    "phi": ({}, True),
    "phimoe": (dict(num_local_experts=2, sliding_window=8), True),  # leaves its window to the mask
    "minicpm3": (dict(kv_lora_rank=16, q_lora_rank=16, v_head_dim=24, qk_nope_head_dim=16, qk_rope_head_dim=16, num_key_value_heads=4),
                 True),  # values wider than keys
    "gemma3_text": (dict(use_bidirectional_attention=True, sliding_window=8), False),
    "stablelm": ({}, True),  # its layers drop keyword arguments
    "bloom": (dict(n_head=4, n_layer=2), False),  # its attention has a bias by distance
    "mamba": (dict(state_size=4), True),  # a recurrence, which runs by sample
    "mimo_v2_flash": (dict(head_dim=16, v_head_dim=24, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1,
                           topk_group=1, sliding_window=8), True),  # sinks
    "llama4_text": (dict(head_dim=16, num_local_experts=2, intermediate_size_mlp=64, attention_chunk_size=8), True),  # chunked
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_unknown_family_is_right_and_says_so(family, caplog):
    settings, packs = UNKNOWN[family]
    shape = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=512, vocab_size=400, pad_token_id=2)
    config = AutoConfig.for_model(family, **(shape | settings))
    stock, ours = (AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for _ in range(2))
    ours.load_state_dict(stock.state_dict())
    with caplog.at_level(logging.WARNING, "trainer"):
        report = patch(with_packed_attention(ours))
    batch = pack()
    expected = stock_logits(stock, batch)
    assert is_packed(ours) == packs
    assert relative_error(our_logits(ours, batch), expected) < 1e-5
    assert "unknown family" in str(report)
    assert ("one at a time" in caplog.text) != packs


def test_unknown_head_is_refused():
    model = tiny.model("llama")
    model.config.model_type = "unheard-of"
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x).tanh()
    with pytest.raises(UserError, match="expected a head that .* found another in unheard-of"):
        with_packed_attention(model)


def test_window_counts_the_token_itself():
    """Seven tokens back is seen with a window of 8, eight is not; in stock layers, and in ours."""
    for patched in (False, True):
        model = tiny.model("mistral", num_hidden_layers=1)
        if patched:
            patch(with_packed_attention(model))
        batch = pack((20,))
        for distance, seen in ((7, True), (8, False)):
            changed = batch.input_ids.clone()
            changed[19 - distance] += 1
            with torch.no_grad():
                before, after = (our_logits(model, replace(batch, input_ids=ids))[19] for ids in (batch.input_ids, changed))
            assert (not torch.equal(before, after)) == seen


def test_no_mask_is_built():
    model = with_packed_attention(tiny.model("mistral"))
    batch = pack()
    arguments = dict(config=model.config, inputs_embeds=torch.zeros(1, batch.tokens, 64), attention_mask=None, past_key_values=None,
                     position_ids=batch.position_ids[None])
    assert create_causal_mask(**arguments) is None
    assert create_sliding_window_causal_mask(**arguments) is None


@pytest.mark.parametrize("patched", [False, True])
def test_rows_without_boundaries_are_one_sample_each(patched):
    model, ids = tiny.model("qwen3"), torch.arange(24).view(2, 12)
    expected = model(input_ids=ids, use_cache=False).logits
    with_packed_attention(model)
    if patched:
        patch(model)
    assert relative_error(model(input_ids=ids, use_cache=False).logits, expected) < 1e-5


@pytest.mark.parametrize("patched", [False, True])
def test_masks_and_caches_are_refused(patched):
    model, ids = with_packed_attention(tiny.model("llama")), torch.arange(12).view(2, 6)
    if patched:
        patch(model)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with pytest.raises(ValueError, match="expected no attention_mask.*set_attn_implementation"):
        model(input_ids=ids, attention_mask=padded)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="neither mask nor cache, got 6 cached tokens"):
        model(input_ids=ids[:, :1], past_key_values=cache)
