"""Fused layers give the logits and gradients of stock ones."""

from collections import Counter

import pytest
import torch

from kernels import _launch
from tests.helpers import tiny
from tests.helpers.kernels import triton_mode
from tests.helpers.models import SETTINGS, gradients, our_logits, pack, relative_error, stock_logits, unlike_initial, with_packed_attention
from trainer.model.families import FAMILIES
from trainer.model.patch import patch


@pytest.mark.parametrize("fused", [True, False], ids=["patched", "registered attention only"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_model_equals_stock_model(family, fused):
    """In fp64; the stock norms compute in fp32 all the same, and a softmax that cancels enlarges what they round: hence 3e-5."""
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
        assert relative_error(found[name], gradient) < 3e-5, name
    assert report.backends["attention"].startswith("packed")


def test_families_are_tested():
    assert set(FAMILIES) == set(tiny.FAMILIES)


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
