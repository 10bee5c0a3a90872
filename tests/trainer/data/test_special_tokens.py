"""Special tokens inside the words of data are counted and shown: they become what they look like, such as the end of a turn."""

import json

import pytest

from tests.helpers import tiny
from trainer.config import Config, Data
from trainer.data.prepare import data_summary, note_lines, prepare_data

PLAIN = [{"role": "user", "content": "What is <b>3</b> <|im_ends|> + 4?"}, {"role": "assistant", "content": "7"}]
HELD = {
    "user": [{"role": "user", "content": "Does <|im_end|> end a turn?"}, {"role": "assistant", "content": "Yes."}],
    "assistant": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello.</s>"}],
    "system": [{"role": "system", "content": "Say <s> first."}, *PLAIN],
}


def notes_of(rows, tmp_path, tokenizer) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = prepare_data(Config(data=Data(train=str(path), cache_dir=str(tmp_path / "cache"), num_proc=1)), tokenizer)
    return note_lines(data_summary(training, Config())["sources"])


@pytest.mark.parametrize("role, shown", [("user", "Does <|im_end|> end a turn?"), ("assistant", "Hello.</s>"),
                                         ("system", "Say <s> first.")])
def test_special_tokens_in_words_are_counted_and_shown(tmp_path, role, shown):
    rows = [{"messages": HELD[role]}, {"messages": PLAIN}, {"messages": HELD[role]}]
    told, = notes_of(rows, tmp_path, tiny.tokenizer())
    assert told == f"rows: 2 samples hold special tokens in their words, tokenized as such: {shown!r}"


def test_special_tokens_in_plain_texts_are_told_too(tmp_path):
    told, = notes_of([{"text": "One.</s>Two."}, {"text": "Three."}], tmp_path, tiny.tokenizer())
    assert told == "rows: 1 samples hold special tokens in their words, tokenized as such: 'One.</s>Two.'"


def test_a_tokenizer_that_splits_special_tokens_has_none_in_words(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.split_special_tokens = True
    assert notes_of([{"messages": HELD["user"]}], tmp_path, tokenizer) == []
