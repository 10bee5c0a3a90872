"""Text inside wrapped checkpoints: stock's logits, no tower in memory, adapters and families of the text decoder."""

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from benchmarks.families.tiny_configs import tiny_config
from tests.helpers.models import our_logits, pack, relative_error, stock_logits
from tests.helpers.wrapped import WRAPPED, save_wrapped, wrapped_class
from trainer.config import Config, Lora, Model
from trainer.errors import UserError
from trainer.evaluation.generation import stock_attention
from trainer.model import text_part
from trainer.model.export import save_adapter
from trainer.model.families import FAMILIES
from trainer.model.loading import load_model, meta_model
from trainer.model.lora import add_adapter
from trainer.model.packed_attention import decoder
from trainer.model.patch import patch
from trainer.model.text_part import auto_class, head_layer, keep_text_part

BATCH = pack(vocab_size=270)


def load(folder, **settings):
    return load_model(Config(model=Model(path=str(folder)), precision="fp32", **settings), "cpu")[0]


@pytest.mark.parametrize("kind", [kind if kind in ("gemma3", "qwen2_5_vl") else pytest.param(kind, marks=pytest.mark.slow)
                                  for kind in WRAPPED])
def test_text_has_the_logits_of_the_whole_model(tmp_path, kind):
    save_wrapped(tmp_path, kind)
    model, stock = load(tmp_path), wrapped_class(kind).from_pretrained(tmp_path)
    report = patch(model)
    assert type(model) is type(stock)
    assert relative_error(our_logits(model, BATCH), stock_logits(stock, BATCH)) < 2e-6
    kept = {id(p) for part in (decoder(model), head_layer(model)) for p in part.parameters()}
    assert kept == {id(p) for p in model.parameters()}
    assert len(list(model.parameters())) < len(list(stock.parameters()))
    family = decoder(model).config.model_type
    assert report.family.startswith(family) and ("unknown" in report.family) == (family not in FAMILIES)
    with stock_attention(model) as text:
        prompt = dict(input_ids=BATCH.input_ids[None, :13], attention_mask=torch.ones(1, 13, dtype=torch.long), max_new_tokens=3,
                      do_sample=False, pad_token_id=2)
        assert torch.equal(text.generate(**prompt), stock.generate(**prompt))


def test_startup_names_what_is_not_in_memory(tmp_path):
    model = load(save_wrapped(tmp_path, "gemma3"))
    assert text_part.describe(model) == {"text part": "of Gemma3ForConditionalGeneration; not in memory, and left as they are: "
                                                      "model.vision_tower, model.multi_modal_projector"}
    assert text_part.describe(decoder(model)) == {}
    outline = meta_model(Config(model=Model(path=str(tmp_path))))
    assert {name: p.shape for name, p in outline.named_parameters()} == {name: p.shape for name, p in model.named_parameters()}


def test_adapters_are_in_the_text_decoder(tmp_path):
    model = add_adapter(load(save_wrapped(tmp_path, "gemma3")), Lora(rank=2))
    adapted = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert len(adapted) == 2 * 2 * 7 and all(name.startswith("base_model.model.model.language_model.layers.") for name in adapted)


@pytest.mark.parametrize("kind", ["gemma3", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_stock_peft_adapts_no_tower(tmp_path, kind):
    """Towers have layers of the same names, and Gemma 4's of a class that PEFT cannot adapt."""
    adapted = add_adapter(load(save_wrapped(tmp_path / "base", kind)), Lora(rank=2))
    save_adapter(adapted, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(wrapped_class(kind).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert get_peft_model_state_dict(stock).keys() == get_peft_model_state_dict(adapted).keys()


def test_towers_inside_a_decoder_are_dropped():
    model = AutoModelForCausalLM.from_config(tiny_config("phi4_multimodal"))
    keep_text_part(model)
    assert text_part.dropped_towers(model) == ["model.embed_tokens_extend.image_embed", "model.embed_tokens_extend.audio_embed"]
    assert model(input_ids=BATCH.input_ids[None, :13], use_cache=False).logits.isfinite().all()


def test_random_weights_of_a_wrapped_config_are_its_text_model(tmp_path):
    save_wrapped(tmp_path, "gemma3")
    model, _ = load_model(Config(model=Model(config=str(tmp_path)), method="full"), "cpu")
    assert type(model).__name__ == "Gemma3ForCausalLM"


@pytest.mark.parametrize("architecture, expected", [
    ("Qwen3_5ForConditionalGeneration", AutoModelForMultimodalLM), ("Qwen3_5ForCausalLM", AutoModelForCausalLM),
    (None, AutoModelForMultimodalLM)])
def test_architectures_decide_between_text_and_whole(architecture, expected):
    config = AutoConfig.for_model("qwen3_5", architectures=architecture and [architecture])
    assert auto_class(config) is expected
    assert auto_class(AutoConfig.for_model("llama")) is AutoModelForCausalLM


def test_text_that_needs_an_encoder_is_refused():
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model("florence2"))
    with pytest.raises(UserError, match="Florence2ForConditionalGeneration reads its text with an encoder"):
        keep_text_part(model)


def test_a_forward_that_needs_its_tower_is_refused(tmp_path, monkeypatch):
    def forward(self, input_ids, **kwargs):
        return self.vision_tower(input_ids)

    save_wrapped(tmp_path, "gemma3")
    monkeypatch.setattr(wrapped_class("gemma3"), "forward", forward)
    with pytest.raises(UserError, match="Gemma3ForConditionalGeneration does not run on text alone"):
        load(tmp_path)


def test_attention_is_set_without_warnings(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load(save_wrapped(tmp_path, "gemma3"))
    assert not caplog.records
