"""An exported model holds every tensor of its base: towers, and layers that transformers does not load."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from tests.helpers import hub_cache, tiny
from tests.helpers.models import our_logits, pack, relative_error, stir, stock_logits
from tests.helpers.wrapped import save_wrapped, tensors_of, wrapped_class
from trainer.config import Config, Lora, Model
from trainer.model.checkpoint_rest import QUANT_STATE
from trainer.model.export import merge_and_save
from trainer.model.loading import load_model, weights_fingerprint
from trainer.model.locate import load_tokenizer
from trainer.model.lora import add_adapter
from trainer.model.patch import patch

BATCH = pack(vocab_size=270)


def trained(source, method="lora"):
    model, tokenizer = load_model(Config(model=Model(path=str(source)), precision="fp32", method=method), "cpu")
    if method != "full":
        model = add_adapter(model, Lora(rank=2, alpha=8, target_modules=["q_proj", "down_proj"]))
    stir(model)
    return model, tokenizer


def export(source, folder, method="lora"):
    model, tokenizer = trained(source, method)
    merge_and_save(model, tokenizer, folder)
    return model


OTHER_KINDS = ["qwen3_5", "qwen2_5_vl", "gemma4", "mistral3 mistral", "muse_glimmer", "qwen2_audio qwen2"]


@pytest.mark.parametrize("kind, saving", [
    ("gemma3", {}), ("gemma3", dict(save_original_format=False)),
    *(pytest.param(kind, {}, marks=pytest.mark.slow) for kind in OTHER_KINDS),
    pytest.param("mistral3 mistral", dict(save_original_format=False), marks=pytest.mark.slow),
    pytest.param("llava llama", dict(max_shard_size="50KB"), marks=pytest.mark.slow)])
def test_merged_model_holds_every_tensor_of_its_base(tmp_path, kind, saving):
    base = save_wrapped(tmp_path / "base", kind, **saving)
    (base / "preprocessor_config.json").write_text('{"size": 16}')
    model = export(base, tmp_path / "model")
    before, after = tensors_of(base), tensors_of(tmp_path / "model")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(("q_proj.weight", "down_proj.weight")) and "layers" in name for name in changed)
    stock, loading = wrapped_class(kind).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert relative_error(stock_logits(stock, BATCH), our_logits(model, BATCH)) < 2e-5
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "model")]
    assert all(configs[0][name] == configs[1][name] for name in ("architectures", "model_type", "vision_config") if name in configs[0])
    assert (tmp_path / "model" / "preprocessor_config.json").read_text() == '{"size": 16}'


def test_full_training_leaves_the_tower_as_it_is(tmp_path):
    base = save_wrapped(tmp_path / "base", "gemma3")
    export(base, tmp_path / "model", "full")
    before, after = tensors_of(base), tensors_of(tmp_path / "model")
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert after.keys() == before.keys() and unchanged == {name for name in before if "language_model" not in name}


def add_tensors(folder, **tensors):
    found = load_file(folder / "model.safetensors")
    save_file(found | tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_layers_that_are_not_loaded_are_kept(tmp_path):
    """Multi-token prediction is kept; a tied head that a file repeats, and scales of a layer, are not."""
    base = tiny.save_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    mtp, scale = torch.arange(6.0).reshape(2, 3), torch.ones(1)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    add_tensors(base, **{"model.layers.2.eh_proj.weight": mtp, "mtp.norm.weight": mtp[0].clone(), "lm_head.weight": embedding.clone(),
                         "model.layers.0.self_attn.q_proj.weight_scale_inv": scale})
    export(base, tmp_path / "model", "full")
    after = tensors_of(tmp_path / "model")
    assert after.keys() ^ tensors_of(base).keys() == {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight_scale_inv"}
    assert torch.equal(after["model.layers.2.eh_proj.weight"], mtp) and torch.equal(after["mtp.norm.weight"], mtp[0])
    assert not torch.equal(after["model.embed_tokens.weight"], embedding)
    assert load_model(Config(model=Model(path=str(tmp_path / "model"))), "cpu")


@pytest.mark.slow
def test_a_tower_in_4_bits_becomes_dense(tmp_path):
    base, quantised = save_wrapped(tmp_path / "base", "gemma3", save_original_format=False), tmp_path / "quantised"
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    wrapped_class("gemma3").from_pretrained(base, quantization_config=nf4).save_pretrained(quantised, save_original_format=False)
    load_tokenizer(Model(path=str(base))).save_pretrained(quantised)
    assert any("vision_tower" in name and QUANT_STATE in name for name in tensors_of(quantised))
    model = export(quantised, tmp_path / "model", "qlora")
    before, after = tensors_of(base), tensors_of(tmp_path / "model")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: tensor.shape for name, tensor in before.items()}
    for name in before:
        assert relative_error(after[name], before[name]) < (0.15 if "vision_tower" in name else 1.0)
    stock = wrapped_class("gemma3").from_pretrained(tmp_path / "model")
    patch(model)  # our kernels read rows of any width, bitsandbytes not on every CPU
    assert relative_error(stock_logits(stock, BATCH), our_logits(model, BATCH)) < 2e-5


def test_a_model_of_the_hub_is_completed_from_the_cache(tmp_path, monkeypatch):
    save_wrapped(tmp_path / "gemma", "gemma3", max_shard_size="100KB")
    snapshot = hub_cache.cached_as(monkeypatch, tmp_path / "gemma", tmp_path / "hub")
    export("someone/model", tmp_path / "model")
    assert tensors_of(tmp_path / "model").keys() == tensors_of(snapshot).keys()
    assert weights_fingerprint(Model(path="someone/model")) == hub_cache.COMMIT


def test_random_weights_have_no_rest(tmp_path, model_folder):
    model, tokenizer = load_model(Config(model=Model(config=str(model_folder)), method="full"), "cpu")
    merge_and_save(model, tokenizer, tmp_path / "model")
    assert tensors_of(tmp_path / "model").keys() == tensors_of(model_folder).keys()
