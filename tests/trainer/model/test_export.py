"""What is saved, stock PEFT and transformers load, and their logits are those of the model that was trained."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

from benchmarks.families.tiny_configs import tiny_config
from tests.helpers import mixtures, tiny, wrapped
from tests.helpers.models import our_logits, pack, relative_error, stock_logits, unlike_initial
from trainer.config import Config, Lora, Model
from trainer.errors import UserError
from trainer.model import export
from trainer.model.export import merge_and_save, merged_state, save_adapter
from trainer.model.loading import load_model
from trainer.model.lora import adapted_weights, add_adapter
from trainer.model.patch import patch
from trainer.model.peft_targets import make_loadable

BATCH = pack(vocab_size=260)  # fewer than any tokenizer here has
ADAPTERS = {"lora": {}, "rslora": dict(rslora=True), "dora": dict(dora=True), "some": dict(target_modules=["q_proj", "o_proj"])}


def trained(folder, precision="fp32", adapter=None):
    """A patched model as after training: an adapter, or every weight, moved away from where it began."""
    model, tokenizer = load_model(Config(model=Model(path=str(folder)), precision=precision), "cpu")
    if adapter is not None:
        model = add_adapter(model, Lora(rank=4, alpha=8, **adapter))
    patch(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05
    return model, tokenizer


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_stock_peft_loads_the_adapter(model_folder, tmp_path, adapter):
    model, tokenizer = trained(model_folder, adapter=ADAPTERS[adapter])
    save_adapter(model, tmp_path / "adapter", tokenizer)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(model_folder.resolve())
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(described["base_model_name_or_path"]), tmp_path / "adapter")
    assert relative_error(stock_logits(stock, BATCH), our_logits(model, BATCH)) < 1e-5
    assert relative_error(stock_logits(stock.get_base_model(), BATCH), stock_logits(stock, BATCH)) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merged_model_is_a_stock_model(model_folder, tmp_path, adapter):
    model, tokenizer = trained(model_folder, adapter=ADAPTERS[adapter])
    before = our_logits(model, BATCH)
    merge_and_save(model, tokenizer, tmp_path / "merged")
    assert torch.equal(our_logits(model, BATCH), before)  # the model in memory is as it was
    stock, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert relative_error(stock_logits(stock, BATCH), before) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("family", ["phi3", "gemma3_text", "qwen2"])
def test_merging_other_families(tmp_path, family):
    tiny.model(family).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = trained(tmp_path / "base", adapter={})
    merge_and_save(model, tokenizer, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(stock_logits(stock, BATCH), our_logits(model, BATCH)) < 1e-5
    if model.config.tie_word_embeddings:
        with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
            assert "lm_head.weight" not in file.keys()


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("family", mixtures.MIXTURES)
def test_merged_and_reloaded_mixtures_compute_what_was_trained(tmp_path, family, experts):
    mixtures.model(family).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = trained(tmp_path / "base", adapter=dict(experts=experts))
    before = our_logits(model, BATCH)
    merge_and_save(model, tokenizer, tmp_path / "merged")
    save_adapter(model, tmp_path / "adapter", tokenizer)
    assert torch.equal(our_logits(model, BATCH), before)  # the model in memory is as it was
    files = [safe_open(tmp_path / name / "model.safetensors", "pt") for name in ("base", "merged")]
    assert set(files[0].keys()) == set(files[1].keys())  # the checkpoint's own layout
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(stock_logits(stock, BATCH), before) < 1e-5
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert relative_error(stock_logits(stock, BATCH), before) < 1e-5
    assert relative_error(stock_logits(stock.get_base_model(), BATCH), stock_logits(stock, BATCH)) == 0

    ours, _ = load_model(Config(model=Model(path=str(tmp_path / "base")), precision="fp32"), "cpu")
    ours = add_adapter(ours, Lora(path=str(tmp_path / "adapter")))
    patch(ours)
    assert torch.equal(our_logits(ours, BATCH), before)


def test_checkpoint_keeps_its_layout_of_experts(tmp_path):
    """transformers holds all experts of a layer in two weights; Qwen3-MoE checkpoints hold three for each expert."""
    mixtures.model("qwen3_moe").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = trained(tmp_path / "base", adapter=dict(experts=True))
    merge_and_save(model, tokenizer, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        experts = [name for name in file.keys() if ".experts." in name]
        assert len(experts) == 2 * 4 * 3 and {name.rsplit(".", 2)[1] for name in experts} == {"gate_proj", "up_proj", "down_proj"}
        up = file.get_tensor("model.layers.1.mlp.experts.2.up_proj.weight")
    wrapper = model.get_base_model().model.layers[1].mlp.experts.base_layer
    exact = wrapper.get_param()[2] + wrapper.get_delta_weight("default")[2]
    assert relative_error(up, exact[32:]) < 1e-6


def test_merged_model_that_would_not_load_is_not_left(model_folder, tmp_path, monkeypatch):
    model, tokenizer = trained(model_folder, adapter={})

    def misnamed(base):
        return {name.replace("q_proj", "query"): weight for name, weight in merged_state(base).items()}

    monkeypatch.setattr(export, "merged_state", misnamed)
    with pytest.raises(UserError, match="export: transformers would not find 2 weights .*, such as model.layers.0.self_attn.q_proj"):
        merge_and_save(model, tokenizer, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers"), [("gemma3", 7 * 2), ("llama4", 7 * 2), ("deepseek_ocr2", 4 * 2 + 3 * 2)])
def test_adapters_of_wrapped_checkpoints_load_in_their_own_class(tmp_path, kind, layers):
    """Towers that are not in memory have layers of the same names; DeepSeek-OCR's checkpoint names the text's layers in another way."""
    if kind in wrapped.WRAPPED:
        wrapped.save_wrapped(tmp_path / "base", kind)
        stock = wrapped.wrapped_class(kind)
    else:
        stock = type(saved := AutoModelForMultimodalLM.from_config(tiny_config(kind)))
        unlike_initial(saved).save_pretrained(tmp_path / "base")
        tiny.tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = trained(tmp_path / "base", adapter={})
    save_adapter(model, tmp_path / "adapter", tokenizer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        served = PeftModel.from_pretrained(stock.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert not [str(warning.message) for warning in said if "adapter keys" in str(warning.message)]
    assert len(adapted_weights(served.get_base_model())) == layers
    assert relative_error(stock_logits(served, BATCH), our_logits(model, BATCH)) < 1e-5
    ours, _ = load_model(Config(model=Model(path=str(tmp_path / "base")), precision="fp32"), "cpu")
    ours = add_adapter(ours, Lora(path=str(tmp_path / "adapter")))
    patch(ours)
    assert torch.equal(our_logits(ours, BATCH), our_logits(model, BATCH))


@pytest.mark.parametrize("settings", [{}, dict(dora=True), dict(dropout=0.1)])
def test_layers_that_peft_would_take_for_experts_are_named_by_their_weights(tmp_path, settings):
    """PEFT makes `gate_proj` the experts of this family, though dense layers and shared experts have layers of that name."""
    with torch.device("meta"):
        model = add_adapter(mixtures.sketch("glm4_moe"), Lora(rank=4, **settings))
    targets = {f"{end}.weight" for end in ("gate_proj", "up_proj", "down_proj")}
    saved = model.peft_config["default"]
    assert {name.rsplit(".", 1)[-1] for name in saved.target_modules} == (
        {"q_proj", "k_proj", "v_proj", "o_proj"} | (set() if settings else {"gate_proj", "up_proj", "down_proj"}))
    saved.save_pretrained(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    make_loadable(model.get_base_model(), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name.rsplit(".", 1)[-1] for name in written["target_modules"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {".".join(name.rsplit(".", 2)[-2:]) for name in written["target_parameters"] or ()} == (set() if settings else targets)


def test_fully_trained_model_is_a_stock_model(model_folder, tmp_path):
    model, tokenizer = trained(model_folder)
    merge_and_save(model, tokenizer, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in model.state_dict().items():
        assert torch.equal(stock.state_dict()[name], weight), name
    assert relative_error(stock_logits(stock, BATCH), our_logits(model, BATCH)) < 1e-5


def test_merging_rounds_once_to_the_weights_precision(model_folder, tmp_path):
    model, tokenizer = trained(model_folder, precision="bf16", adapter={})
    merge_and_save(model, tokenizer, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double())
    merged = stock.model.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    assert relative_error(merged, exact) < 2 * relative_error(exact.bfloat16(), exact)


@pytest.mark.parametrize("merged", [False, True])
def test_saved_config_is_the_users(model_folder, tmp_path, merged):
    model, tokenizer = trained(model_folder, adapter={})
    (merge_and_save(model, tokenizer, tmp_path / "out") if merged else save_adapter(model, tmp_path / "out", tokenizer))
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert "steadfast" not in written
    if merged:
        ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", model_folder))
        assert ours == theirs


def test_adapter_that_is_not_finite_is_not_merged(model_folder, tmp_path):
    model, tokenizer = trained(model_folder, adapter={})
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="cannot merge the adapter"):
        merge_and_save(model, tokenizer, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_folder_appears_whole_or_not_at_all(model_folder, tmp_path, monkeypatch):
    model, tokenizer = trained(model_folder, adapter={})
    target = tmp_path / "runs" / "adapter"
    save_adapter(model, target, tokenizer)
    first = (target / "adapter_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "save_pretrained", fail)
        with pytest.raises(UserError, match="cannot write .*No space left on device"):
            save_adapter(model, target, tokenizer)
    assert (target / "adapter_model.safetensors").read_bytes() == first
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]

    next(p for p in model.parameters() if p.requires_grad).data += 1
    save_adapter(model, target)
    assert (target / "adapter_model.safetensors").read_bytes() != first
    assert not (target / "tokenizer.json").exists()
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]
