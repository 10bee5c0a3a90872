"""Fused layers give the logits and gradients of stock ones."""

from collections import Counter

import pytest
import torch

from kernels import _launch
from tests.helpers import tiny
from tests.helpers.kernels import triton_mode
from tests.helpers.models import SETTINGS, gradients, our_logits, pack, relative_error, stock_logits, unlike_initial, with_packed_attention
from trainer.model.families import FAMILIES
from trainer.model.forward import forward_hidden
from trainer.model.patch import patch


def rows():
    """Every row with fused layers, and a few families with the registered attention alone; rows that are probed first take longer."""
    for family, row in FAMILIES.items():
        yield pytest.param(family, True, marks=[pytest.mark.slow] if row.probed else [])
    yield from ((family, False) for family in tiny.FAMILIES)


@pytest.mark.parametrize("family, fused", rows())
def test_packed_model_equals_stock_model(family, fused):
    """In fp64; the stock norms compute in fp32 all the same, and a softmax that cancels enlarges what they round: hence 1e-4."""
    settings = SETTINGS.get(family, {})
    stock = unlike_initial(tiny.model(family, dtype=torch.float64, **settings))
    ours = with_packed_attention(unlike_initial(tiny.model(family, dtype=torch.float64, **settings)))
    stock.set_attn_implementation("eager")
    report = patch(ours, fused)
    batch = pack()
    expected, found = stock_logits(stock, batch), our_logits(ours, batch)
    assert relative_error(found, expected) < 1e-6
    expected, found = gradients(stock, expected), gradients(ours, found)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-4, name
    assert report.backends["attention"].startswith("packed")


@pytest.mark.parametrize("family, settings", [
    ("cohere", dict(use_qk_norm=True)), ("exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 3)),
    ("granitemoehybrid", dict(position_embedding_type="rope")), ("glm4_moe", dict(use_qk_norm=False, attention_bias=True))])
def test_packed_model_equals_stock_model_in_other_forms(family, settings):
    """Norms of queries and keys, windows and positions that a family's configuration turns on or off."""
    stock, ours = (unlike_initial(tiny.model(family, dtype=torch.float64, **settings)) for _ in range(2))
    patch(with_packed_attention(ours))
    batch = pack()
    assert relative_error(our_logits(ours, batch), stock_logits(stock, batch)) < 1e-6


def test_what_a_fused_form_does_not_compute_stays_stock():
    """Attention that clips, or has weights that we do not read."""
    clipping = with_packed_attention(tiny.model("olmoe", clip_qkv=0.5))
    patch(clipping)
    gated = with_packed_attention(tiny.model("llama"))
    gated.model.layers[0].self_attn.gate_proj = torch.nn.Linear(4, 4)
    patch(gated)
    assert "forward" not in vars(clipping.model.layers[0].self_attn) and "forward" not in vars(gated.model.layers[0].self_attn)
    assert "forward" in vars(gated.model.layers[1].self_attn)


def test_dropout_on_what_is_added_to_the_residual_stream():
    """Seed-OSS's; with all of it dropped, the last hidden states are the normalised embeddings."""
    model, batch = with_packed_attention(tiny.model("seed_oss", residual_dropout=1.0)), pack()
    patch(model)
    bare = model.model.norm(model.model.embed_tokens(batch.input_ids))
    assert relative_error(forward_hidden(model.eval(), batch), bare) > 0.1
    assert torch.equal(forward_hidden(model.train(), batch), bare)


def test_only_the_language_model_of_one_that_sees_is_fused():
    stock, ours = (unlike_initial(tiny.model("gemma3", dtype=torch.float64)) for _ in range(2))
    report = patch(with_packed_attention(ours))
    batch = pack()
    assert relative_error(our_logits(ours, batch), stock_logits(stock, batch)) < 1e-6
    assert report.family == "gemma3_text" and report.backends["glu"] == "reference x 3"
    assert not [name for name, module in ours.named_modules() if "vision" in name and "forward" in vars(module)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_bf16_is_as_exact_as_stock_bf16(family):
    batch = pack()
    exact_model = unlike_initial(tiny.model(family, dtype=torch.float64))
    exact = stock_logits(exact_model, batch)
    exact_gradients = gradients(exact_model, exact)
    errors = {}
    for ours in (True, False):
        model = unlike_initial(tiny.model(family, dtype=torch.float64)).to(torch.bfloat16)
        if ours:
            patch(with_packed_attention(model))
        logits = our_logits(model, batch) if ours else stock_logits(model, batch)
        found = gradients(model, logits)
        flat = [torch.cat([g[name].double().flatten() for name in exact_gradients]) for g in (found, exact_gradients)]
        errors[ours] = relative_error(logits, exact), relative_error(*flat)
    assert errors[True][0] <= 2 * errors[False][0]
    assert errors[True][1] <= 2 * errors[False][1]


@pytest.mark.slow
@pytest.mark.skipif(not _launch.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_models_run_on_the_kernels(family):
    settings, batch = SETTINGS.get(family, {}), pack((5, 1, 7))
    stock, ours = (unlike_initial(tiny.model(family, **settings)) for _ in range(2))
    expected = stock_logits(stock, batch)
    with triton_mode():
        report = patch(with_packed_attention(ours))
        found = our_logits(ours, batch)
        gradient = gradients(ours, found)
    assert report.backends["rms_norm"].startswith("triton x ") and report.backends["linear cross entropy"] == "triton"
    assert relative_error(found, expected) < 1e-5
    for name, true in gradients(stock, expected).items():
        assert relative_error(gradient[name], true) < 1e-4, name


def test_hooks_on_norms_that_an_operation_covers():
    """The norm of a layer and those of queries and keys are covered by larger operations, unless someone watches or replaces them."""
    model, batch = with_packed_attention(tiny.model("qwen3")), pack()
    patch(model)
    expected, calls = our_logits(model, batch), Counter()
    layer = model.model.layers[1]
    for name, norm in (("stream", layer.post_attention_layernorm), ("q", layer.self_attn.q_norm), ("k", layer.self_attn.k_norm)):
        norm.register_forward_hook(lambda *_, name=name: calls.update([name]))
    assert torch.equal(our_logits(model, batch), expected)
    assert calls == {"stream": 1, "q": 1, "k": 1}
    model.model.layers[0].post_attention_layernorm = torch.nn.Identity()
    assert not torch.equal(our_logits(model, batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compiled_layers_equal_eager_ones(family):
    model, batch = with_packed_attention(tiny.model(family)), pack()
    patch(model)
    expected = gradients(model, our_logits(model, batch))
    model.zero_grad()
    model.model.layers[0].compile(backend="aot_eager")
    found = gradients(model, our_logits(model, batch))
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name
