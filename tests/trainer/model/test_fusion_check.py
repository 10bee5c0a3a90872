"""Fused layers that differ from the family's own code are found, taken back and reported."""

import logging

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.helpers import tiny
from tests.helpers.models import our_logits, pack, relative_error, stock_logits, unlike_initial, with_packed_attention
from trainer.model import families
from trainer.model.families import FAMILIES, Family
from trainer.model.fused_layers import is_fused
from trainer.model.fusion_check import fusion_fault
from trainer.model.patch import patch

WRONG = {  # family: (a row that does not say all, settings that matter)
    "llama": (Family(norm_offset=1.0), {}),
    "smollm3": (Family(window_in_config=True), dict(no_rope_layers=[1, 1], use_sliding_window=True, sliding_window=8,
                                                    layer_types=["sliding_attention", "full_attention"])),
    "exaone4": (Family(stream_norm=None), {}),  # full attention has no positions
    "falcon_h1": (families.HYBRID, {}),  # its MLP has multipliers inside
    "glm4": (Family(own_rope=True, activation="activation_fn", attention_norm="post_self_attn_layernorm"), {}),
    "qwen3_5_text": (Family(norm_offset=1.0, norm_eps="eps", probed=True), {}),  # without the gate, which makes shapes wrong
}


@pytest.mark.parametrize("family", WRONG)
def test_a_wrong_row_is_found_and_stock_layers_run(family, monkeypatch, caplog):
    row, settings = WRONG[family]
    monkeypatch.setitem(FAMILIES, family, row)
    stock, ours = (unlike_initial(tiny.model(family, **settings)) for _ in range(2))
    with caplog.at_level(logging.WARNING, "trainer.model.patch"):
        report = patch(with_packed_attention(ours))
    assert "fused ones differ from its code: stock layers" in report.family
    assert f"{family} runs with stock layers, since fused ones differ from its own code" in caplog.text
    assert not any(map(is_fused, ours.modules())) and set(report.backends) <= {"attention", "mixers", "experts", "linear cross entropy"}
    batch = pack()
    assert relative_error(our_logits(ours, batch), stock_logits(stock, batch)) < 1e-4


def test_what_small_values_do_not_show_is_found(monkeypatch):
    """A clamp as some families have in their MLP, far above the values of fresh weights."""
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: own(mlp, x).clamp(-0.2, 0.2))
    model = with_packed_attention(tiny.model("llama"))
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda mlp, args, out: seen.append(float(out.abs().max())))
    our_logits(model, pack())
    assert max(seen) < 0.1
    assert "stock layers" in patch(model).family


def test_the_check_changes_nothing():
    model, batch = with_packed_attention(tiny.model("qwen3", dtype=torch.bfloat16)).train(), pack()
    patch(model)
    expected = our_logits(model, batch)
    weights = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    assert fusion_fault(model) is None
    assert model.training and torch.equal(our_logits(model, batch), expected)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == weights
    assert not any(module._forward_pre_hooks for module in model.model.layers.modules())
