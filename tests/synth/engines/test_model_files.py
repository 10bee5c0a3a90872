"""Fingerprints and sizes of a model's files, and texts that tokens add."""

import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from synth.config import Model
from synth.engines.interface import EngineError
from synth.engines.model_files import count_parameters, fingerprint, locate
from synth.engines.tokens import added_text
from tests.helpers.engine_requests import BASE
from trainer.errors import UserError


def test_fingerprints(copy):
    whole = fingerprint(BASE)
    assert fingerprint(copy) == whole and re.fullmatch("[0-9a-f]{16}", whole)
    (copy / "README.md").write_text("words")
    os.utime(copy / "config.json", (0, 0))
    assert fingerprint(copy) == whole
    seen = {whole}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(fingerprint(copy))
        (copy / name).write_bytes(content)
    assert len(seen) == 5 and fingerprint(copy) == whole
    (copy / "merges.txt").write_text("a b")
    assert fingerprint(copy) not in seen


def test_fingerprints_of_large_files_read_their_ends(copy, monkeypatch):
    from synth.engines import model_files

    monkeypatch.setattr(model_files, "READ_WHOLE", 100_000)
    monkeypatch.setattr(model_files, "PIECE", 10_000)
    whole, path = fingerprint(copy), copy / "model.safetensors"
    content = path.read_bytes()
    for place, seen in ((20, True), (len(content) - 5, True), (len(content) // 2, False)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        assert (fingerprint(copy) != whole) == seen


def test_parameters():
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    assert count_parameters(BASE) == sum(weight.numel() for weight in plain.parameters())


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_what_is_written_goes_on_from_the_prompt(before, after):
    from tests.helpers import tiny

    tokenizer = tiny.tokenizer()
    prompt, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, after))
    assert before + added_text(tokenizer, prompt, ids) == before + after


def test_a_space_that_a_sentencepiece_tokenizer_would_drop():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, "c"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([1]) == "b" and added_text(tokenizer, [0], [1]) == " b" and added_text(tokenizer, [0], [2, 1]) == "c b"


@pytest.mark.parametrize("header", [
    "[]", "null", "5", '{"w": null}', '{"w": {}}', '{"w": {"shape": "text"}}', '{"w": {"shape": [1.5]}}', '{"w": {"shape": 3}}',
    "[" * 100_000])
def test_headers_of_another_type_are_one_line(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(EngineError, match="a.safetensors: expected a safetensors file, got one that cannot be read"):
        count_parameters(tmp_path)


@pytest.mark.parametrize("name", ["evil.bin", "../model.safetensors"])
def test_an_index_names_safetensors_of_its_folder_alone(copy, name):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="only .*safetensors files of its own folder are loaded"):
        locate(Model(path=str(copy)))
