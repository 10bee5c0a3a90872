"""Fingerprints and sizes of a model's files, and texts that tokens add."""

import os
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from synth.engines.model_files import count_parameters, fingerprint
from synth.engines.tokens import added_text
from tests.helpers.engine_requests import BASE


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
