"""Adapters: our fused forwards against PEFT's own, what makes them step aside, and what add_adapter refuses."""

import logging
import pickle

import peft
import pytest
import torch
from peft.tuners.lora.variants import DoraLinearVariant
from transformers import AutoModelForCausalLM

from tests.helpers import tiny
from tests.helpers.models import LENGTHS, gradients, our_logits, pack, relative_error, stock_logits, with_packed_attention
from trainer.config import Lora
from trainer.errors import UserError
from trainer.model import lora
from trainer.model.forward import forward_hidden, lm_head
from trainer.model.lora import add_adapter
from trainer.model.patch import patch

VARIANTS = {
    "lora": {},
    "rslora": dict(rslora=True),
    "dora": dict(dora=True),
    "queries and values": dict(target_modules=["q_proj", "v_proj"]),
    "gates": dict(target_modules=["gate_proj"]),
    "down and output": dict(target_modules=r".*\.(down_proj|o_proj)"),
    "one layer": dict(target_modules=r"model\.layers\.1\..*_proj"),
    "dora of keys": dict(dora=True, target_modules=["k_proj"]),
}


def adapted(family, dtype=torch.float64, **settings):
    """A stock model with an adapter whose B is not zero."""
    model = add_adapter(tiny.model(family, dtype=dtype), Lora(**({"rank": 4, "alpha": 8} | settings)))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            parameter.data += noise.to(parameter.dtype)
    return model


def ours_of(model):
    with_packed_attention(model.get_base_model())
    patch(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3_text"])
def test_fused_adapter_equals_pefts(family, variant):
    settings = VARIANTS[variant]
    if family == "phi3":
        names = {"q_proj": "qkv_proj", "v_proj": "qkv_proj", "k_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
        targets = settings.get("target_modules")
        settings = settings | ({"target_modules": sorted({names[t] for t in targets})} if isinstance(targets, list) else {})
    batch, stock, ours = pack(), adapted(family, **settings), ours_of(adapted(family, **settings))
    expected, found = stock_logits(stock, batch), our_logits(ours, batch)
    assert relative_error(found, expected) < 1e-6
    expected, found = gradients(stock, expected), gradients(ours, found)
    assert found.keys() == expected.keys() and all("lora_" in name for name in found)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 3e-5, name


@pytest.mark.parametrize("family", ["granite", "qwen3"])
def test_other_families_take_adapters_too(family):
    batch, stock, ours = pack(), adapted(family), ours_of(adapted(family))
    assert relative_error(our_logits(ours, batch), stock_logits(stock, batch)) < 1e-6


def test_unknown_family_has_fused_adapters():
    config = tiny.AutoConfig.for_model("starcoder2", vocab_size=400, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
                                       num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    def made():
        torch.manual_seed(0)
        return add_adapter(AutoModelForCausalLM.from_config(config).eval(), Lora(rank=4))
    stock, ours = made(), made()
    with_packed_attention(ours.get_base_model())
    report, batch = patch(ours), pack()
    assert report.backends["adapter"] == "reference x 12"
    expected, found = stock_logits(stock, batch), our_logits(ours, batch)
    assert relative_error(found, expected) < 1e-5
    expected, found = gradients(stock, expected), gradients(ours, found)
    assert all(relative_error(found[name], gradient) < 1e-4 for name, gradient in expected.items() if gradient.norm() > 0)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["fp32 adapter", "bf16 adapter"])
def test_bf16_is_as_exact_as_pefts_bf16(adapter_dtype):
    batch = pack()
    exact_model = adapted("llama")
    exact = stock_logits(exact_model, batch)
    exact_gradients, errors = gradients(exact_model, exact), {}
    for kind in ("stock", "ours"):
        model = adapted("llama").to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        logits = stock_logits(model, batch) if kind == "stock" else our_logits(ours_of(model), batch)
        found = gradients(model, logits)
        assert {g.dtype for g in found.values()} == {adapter_dtype}
        flat = [torch.cat([g[name].double().flatten() for name in exact_gradients]) for g in (found, exact_gradients)]
        errors[kind] = relative_error(logits, exact), relative_error(*flat)
    assert errors["ours"][0] <= 2 * errors["stock"][0]
    assert errors["ours"][1] <= 2 * errors["stock"][1]


def test_trained_base_weights_get_their_gradient():
    """Adapters on some layers, everything else trained in full."""
    batch, found = pack(), {}
    for kind in ("stock", "ours"):
        model = adapted("qwen2", target_modules=["q_proj", "gate_proj"])
        model.requires_grad_(True)
        logits = stock_logits(model, batch) if kind == "stock" else our_logits(ours_of(model), batch)
        found[kind] = gradients(model, logits)
    assert found["ours"].keys() == found["stock"].keys()
    for name, gradient in found["stock"].items():
        assert relative_error(found["ours"][name], gradient) < 3e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_unbiased_in_training_and_absent_in_evaluation(dora):
    model = ours_of(adapted("llama", dropout=0.3, dora=dora)).eval()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    x = torch.randn(8, 112, dtype=torch.float64)
    exact = layer(x).detach()
    assert torch.equal(layer(x), exact)
    model.train()
    torch.manual_seed(0)
    drawn = torch.stack([layer(x).detach() for _ in range(3000)])
    assert not torch.equal(drawn[0], drawn[1])
    standard_error = drawn.std(0) / len(drawn) ** 0.5
    assert float(((drawn.mean(0) - exact).abs() / standard_error).max()) < 6


def test_dropout_is_repeatable_by_seed():
    model = ours_of(adapted("llama", dropout=0.5)).train()
    def run():
        torch.manual_seed(7)
        return our_logits(model, pack())
    assert torch.equal(run(), run())


# ---------------------------------------------------------------- stepping aside


def disable(model):
    for layer in lora_layers(model):
        layer.enable_adapters(False)


def merge(model):
    model.merge_adapter()


def second_adapter(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def other_adapter_alone(model):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.set_adapter("second")


def hook(model):
    for layer in lora_layers(model):
        layer.register_forward_hook(lambda module, inputs, output: output * 1.25)


def lora_layers(model):
    return [m for m in model.modules() if lora.is_adapted(m)]


@pytest.mark.parametrize("change, reason", [
    (disable, "disabled"), (merge, "merged"), (second_adapter, "one active adapter, found default, second"),
    (other_adapter_alone, "one active adapter, found second"), (hook, "hooks"),
])
def test_steps_aside_with_one_warning(change, reason, caplog):
    lora._warn_not_fused.cache_clear()
    batch, stock, ours = pack(), adapted("llama"), ours_of(adapted("llama"))
    plain = stock_logits(stock, batch)
    for model in (stock, ours):
        torch.manual_seed(5)
        change(model)
    expected = stock_logits(stock, batch)
    assert relative_error(expected, plain) > 1e-3 or change is merge
    with caplog.at_level(logging.WARNING, "trainer.model.lora"):
        assert relative_error(our_logits(ours, batch), expected) < 1e-6
        our_logits(ours, batch)
    assert len(caplog.records) == 1 and reason in caplog.text


def test_adapter_with_a_bias_is_right():
    def made():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", lora_bias=True, init_lora_weights=False)
        return peft.get_peft_model(tiny.model("qwen2", dtype=torch.float64), config)
    batch, stock, ours = pack(), made(), ours_of(made())
    assert relative_error(our_logits(ours, batch), stock_logits(stock, batch)) < 1e-6
    assert {lora.why_not_fused(layer) for layer in lora_layers(ours)} == {"the adapter has a bias"}


def test_unknown_variant_is_right():
    class Doubled(DoraLinearVariant):
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            return 2 * result
    batch, stock, ours = pack(), adapted("llama", dora=True), ours_of(adapted("llama", dora=True))
    for model in (stock, ours):
        for layer in lora_layers(model):
            layer.lora_variant["default"] = Doubled()
    assert relative_error(our_logits(ours, batch), stock_logits(stock, batch)) < 1e-6


def test_switching_back_is_fused_again():
    model, batch = ours_of(adapted("llama")), pack()
    expected = our_logits(model, batch)
    with model.disable_adapter():
        assert relative_error(our_logits(model, batch), expected) > 1e-3
    assert torch.equal(our_logits(model, batch), expected)
    assert all(lora.why_not_fused(layer) is None for layer in lora_layers(model))


def test_report_counts_layers_that_stay_pefts():
    model = adapted("llama")
    assert patch(model).backends["adapter"] == "reference x 14"
    lora_layers(model)[0].register_forward_hook(lambda *_: None)
    assert patch(model).backends["adapter"] == "reference x 13, PEFT x 1"


def test_adapted_model_pickles():
    model, batch = ours_of(adapted("llama")), pack()
    assert torch.equal(our_logits(pickle.loads(pickle.dumps(model)), batch), our_logits(model, batch))


def test_hidden_state_and_head_are_found_under_pefts_wrapper():
    model = adapted("granite")
    assert lm_head(model).weight is model.get_base_model().lm_head.weight
    with_packed_attention(model.get_base_model())
    assert forward_hidden(model, pack()).shape == (sum(LENGTHS), 64)


# ---------------------------------------------------------------- making and loading


def test_all_linear_leaves_the_head_out_and_freezes_the_rest():
    model = add_adapter(tiny.model("llama"), Lora(rank=3))
    assert {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if lora.is_adapted(m)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28 and all(p.dtype == torch.float32 for p in trained)


def test_adapters_of_bf16_models_are_fp32():
    model = add_adapter(tiny.model("llama", dtype=torch.bfloat16), Lora(rank=3))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("settings, message", [
    (dict(rank=0), "lora.rank: expected at least 1, got 0"),
    (dict(rank=-4), "lora.rank: expected at least 1, got -4"),
    (dict(rank=33, target_modules=["q_proj", "k_proj"]),
     r"lora.rank: expected at most 32, the smaller side of model.layers.0.self_attn.k_proj \(32 x 64\), got 33"),
    (dict(rank=113), "expected layers that can take an adapter, found none in 'all-linear': narrower than lora.rank: 2 x"),
    (dict(alpha=0.0), "lora.alpha: expected more than 0"),
    (dict(dropout=1.0), "lora.dropout: expected 0 <= dropout < 1, got 1.0"),
    (dict(dropout=-0.1), "lora.dropout"),
    (dict(target_modules=["query"]), "no layer is called query; the model has: down_proj, gate_proj, k_proj"),
    (dict(target_modules=["q_proj", "query"]), "no layer is called query;"),
    (dict(target_modules=[]), "empty list"),
    (dict(target_modules="q_proj"), "regular expression 'q_proj'; for last parts of names write a list, of: down_proj"),
    (dict(target_modules="["), r"'\[' is not a regular expression"),
    (dict(target_modules=["lm_head"]), "lm_head is the head, which takes no adapter"),
    (dict(target_modules=["embed_tokens"]), "matches model.embed_tokens, a Embedding"),
    (dict(target_modules=".*"), "expected linear layers"),
    (dict(path="/not/there"), "lora.path: expected a folder with adapter_config.json"),
])
def test_unfit_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        add_adapter(tiny.model("llama"), Lora(**settings))
    assert "\n" not in str(caught.value)


def test_saved_adapter_is_continued(tmp_path):
    first = adapted("llama", dora=True)
    first.save_pretrained(tmp_path)
    second = add_adapter(tiny.model("llama", dtype=torch.float64), Lora(path=str(tmp_path), rank=99))
    assert relative_error(stock_logits(second, pack()), stock_logits(first, pack())) < 1e-12
    names = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (first, second)]
    assert names[0] == names[1]


@pytest.mark.parametrize("family, overrides", [("llama", dict(hidden_size=128)), ("phi3", {})])
def test_adapter_of_another_model_is_refused(tmp_path, family, overrides):
    adapted("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit this model"):
        add_adapter(tiny.model(family, **overrides), Lora(path=str(tmp_path)))


def test_adapters_of_other_kinds_and_pickles_are_refused(tmp_path):
    other = peft.get_peft_model(tiny.model("llama"), peft.IA3Config(task_type="CAUSAL_LM"))
    other.save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match="expected a LoRA adapter"):
        add_adapter(tiny.model("llama"), Lora(path=str(tmp_path / "ia3")))
    adapted("llama").save_pretrained(tmp_path / "pickle", safe_serialization=True)
    (tmp_path / "pickle" / "adapter_model.safetensors").rename(tmp_path / "pickle" / "adapter_model.bin")
    with pytest.raises(UserError, match="only safetensors"):
        add_adapter(tiny.model("llama"), Lora(path=str(tmp_path / "pickle")))


def test_outline_takes_adapters():
    """A dry run counts an adapter's parameters without memory for any."""
    with torch.device("meta"):
        model = add_adapter(AutoModelForCausalLM.from_config(tiny.model_config("llama")), Lora(rank=4))
    assert {p.device.type for p in model.parameters()} == {"meta"}
