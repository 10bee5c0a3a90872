"""Models in GGUF files: converted once, with their logits, tokens and chat template, or refused in one line."""

import logging
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from synth.config import Model as SynthModel
from synth.engines.model_files import locate
from tests.helpers import tiny
from tests.helpers.gguf_file import write_gguf
from tests.helpers.models import relative_error
from trainer.config import Model
from trainer.errors import UserError
from trainer.model import gguf
from trainer.model.locate import load_tokenizer, model_source

CHAT = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7, surely."}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "HF_HOME", str(tmp_path / "cache"))


def saved(path, kind="F32"):
    tokenizer = tiny.tokenizer()
    model = tiny.model("llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128)
    return write_gguf(path, model, tokenizer, kind), model, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "error"), [("F32", torch.float32, 1e-6), ("F16", torch.float16, 2e-3),
                                                      ("Q8_0", torch.bfloat16, 3e-2)])
def test_a_file_becomes_a_folder_with_its_logits_and_tokens(tmp_path, kind, dtype, error):
    file, model, tokenizer = saved(tmp_path / "tiny.GGUF" if kind == "F16" else tmp_path / "tiny.gguf", kind)
    folder = model_source(Model(path=str(file)))
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.dtype == dtype and made.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert relative_error(made.float()(ids).logits, model(ids).logits) < error
    loaded = load_tokenizer(Model(path=str(file)))
    assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    text = "Some words, and 3 + 4 = 7.\n"
    assert loaded(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.slow
def test_a_file_is_converted_once_and_anew_when_it_changes(tmp_path, caplog):
    file, *_ = saved(tmp_path / "tiny.gguf")
    with caplog.at_level(logging.WARNING):
        first = model_source(Model(path=str(file)))
        assert [record.message for record in caplog.records if record.name == "trainer.model.gguf"] == [
            f"model.path: tiny.gguf is dense now, in {first}"]
        caplog.clear()
        assert model_source(Model(path=str(file))) == first and str(locate(SynthModel(path=str(file)))) == first
        assert not caplog.records
    saved(file, "F16")
    assert (second := model_source(Model(path=str(file)))) != first
    assert AutoTokenizer.from_pretrained(second).chat_template


def test_a_damaged_file_is_one_line_and_leaves_nothing(tmp_path):
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"model.path: cannot read .*bad.gguf as GGUF: .*; use a folder with safetensors weights") as error:
        model_source(Model(path=str(file)))
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_a_file_that_was_cut_off_is_refused(tmp_path, kept):
    file, *_ = saved(tmp_path / "tiny.gguf")
    content = file.read_bytes()
    file.write_bytes(content[:int(len(content) * kept)])
    with pytest.raises(UserError, match="cannot read .*tiny.gguf as GGUF"):
        model_source(Model(path=str(file)))


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model.path: expected a model folder or the package gguf.*pip install 'steadfast-sft\[gguf\]'"):
        model_source(Model(path=str(file)))


def test_a_missing_file_is_no_hub_name():
    with pytest.raises(UserError, match="model.path"):
        model_source(Model(path="/nowhere/a.gguf"))
