"""Samples: tokenized once, cut to length, and every lost token is accounted for."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.data.samples
from tests.helpers import tiny
from tests.helpers.processes import complete
from trainer.config import Data, Source
from trainer.data.chat_template import ChatTemplate
from trainer.data.sources import load_sources
from trainer.data.tokenize import _join as join
from trainer.data.tokenize import tokenize
from trainer.errors import UserError

TEMPLATE = ChatTemplate(tiny.tokenizer())


def chat(question: str, answer: str, weight: float = 1.0) -> dict:
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content, "extra": None} for role, content in turns], "weight": weight}


def records(n: int, words=lambda i: 1 + i % 7) -> Dataset:
    return Dataset.from_list([chat(f"What is {i}?", "clips " * words(i) + ".", 1 + i / 8) for i in range(n)])


def source(name: str = "facts") -> Source:
    return Source(f"{name}.jsonl", name=name)


def make(data: Dataset, cache: Path, template: ChatTemplate = TEMPLATE, **options) -> trainer.data.samples.Samples:
    return tokenize([(source(), data)], template, Data(cache_dir=str(cache), num_proc=1, **options))


def encoded(data: Dataset, train_on: str = "assistant") -> list:
    chats = [[{"role": m["role"], "content": m["content"]} for m in record["messages"]] for record in data]
    return TEMPLATE.encode_chats(chats, train_on)


def test_samples_are_the_encoded_chats(tmp_path):
    data = records(1203)  # several batches of the tokenizer and of Arrow
    samples, expected = make(data, tmp_path), encoded(data)
    assert len(samples) == 1203
    for i, (ids, supervised) in enumerate(expected):
        got_ids, got_supervised = samples[i]
        assert got_ids.dtype == np.int32 and got_supervised.dtype == np.bool_
        assert got_ids.tolist() == ids and got_supervised.tolist() == supervised
    np.testing.assert_array_equal(samples.lengths, [len(e.input_ids) for e in expected])
    np.testing.assert_array_equal(samples.supervised, [sum(e.supervised) for e in expected])
    np.testing.assert_array_equal(samples.weights, np.float32(data["weight"]))
    assert samples.length_report == {"facts": {"kept": 1203, "dropped": 0, "truncated": 0, "split": 0, "unsupervised": 0, "tokens_lost": 0,
                                               "refused": 0, "notes": []}}


def test_several_sources_lie_one_after_the_other(tmp_path):
    text = Dataset.from_list([{"text": "The quick brown fox", "weight": 2.0}] * 3)
    sources = [(source("a"), records(5)), (source("b"), text), (source("a"), records(2))]
    samples = tokenize(sources, TEMPLATE, Data(cache_dir=str(tmp_path)))
    assert samples.names == ["a", "b", "a (2)"] and list(samples.length_report) == samples.names
    assert samples.sources.tolist() == [0] * 5 + [1] * 3 + [2] * 2
    assert samples[6][0].tolist() == TEMPLATE.encode_texts(["The quick brown fox"])[0].input_ids
    assert samples[8][0].tolist() == samples[0][0].tolist()


def test_more_sources_than_sixteen_bits_count(tmp_path):
    parts = [make(records(1), tmp_path)] * 33_000
    samples = join(parts, [str(i) for i in range(len(parts))], {})
    np.testing.assert_array_equal(samples.sources, np.arange(33_000))


def test_select(tmp_path):
    samples = make(records(40), tmp_path)
    chosen = samples.select(np.array([31, 2, 2]))
    assert len(chosen) == 3 and chosen.lengths.tolist() == samples.lengths[[31, 2, 2]].tolist()
    assert chosen[0][0].tolist() == samples[31][0].tolist() and chosen[2][0].tolist() == samples[2][0].tolist()
    assert chosen.weights.tolist() == samples.weights[[31, 2, 2]].tolist()


LIMIT = 20
OVERLONG = ["drop", "truncate", "split"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Chats from half to several times the limit, and their tokens."""
    data = records(60, words=lambda i: i % 23)
    return data, encoded(data), tmp_path_factory.mktemp("mixed")


@pytest.mark.parametrize("overlong", OVERLONG)
def test_longer_samples(overlong, mixed):
    data, expected, cache = mixed
    samples = make(data, cache, max_length=LIMIT, on_overlong=overlong)
    windows = []
    for ids, supervised in expected:
        starts = range(0, len(ids), LIMIT) if overlong == "split" else [0] if overlong == "truncate" or len(ids) <= LIMIT else []
        cuts = [(ids[s:s + LIMIT], supervised[s:s + LIMIT]) for s in starts]
        windows += [cut for cut in cuts if any(cut[1][1:])]
    assert [(ids.tolist(), on.tolist()) for ids, on in (samples[i] for i in range(len(samples)))] == windows
    np.testing.assert_array_equal(samples.supervised, [sum(on[1:]) for _, on in windows])
    assert samples.lengths.max() <= LIMIT


@pytest.mark.parametrize("overlong", OVERLONG)
def test_every_lost_token_is_counted(overlong, mixed):
    data, expected, cache = mixed
    samples = make(data, cache, max_length=LIMIT, on_overlong=overlong)
    tally, long = samples.length_report["facts"], sum(len(ids) > LIMIT for ids, _ in expected)
    assert 0 < long < len(expected)
    what = {"drop": "dropped", "truncate": "truncated", "split": "split"}
    assert {key: tally[key] for key in what.values()} == {key: long if key == what[overlong] else 0 for key in what.values()}
    assert tally["kept"] == len(samples)
    assert tally["tokens_lost"] == sum(len(ids) for ids, _ in expected) - samples.lengths.sum()
    windows = sum(-(-len(ids) // LIMIT) for ids, _ in expected) if overlong == "split" else len(expected) - tally["dropped"]
    assert tally["unsupervised"] == windows - len(samples)


def test_a_longer_sample_is_an_error_by_default(mixed):
    data, expected, cache = mixed
    lengths = [len(ids) for ids, _ in expected]
    first = next(i for i, n in enumerate(lengths) if n > LIMIT) + 1
    with pytest.raises(UserError) as caught:
        make(data, cache, max_length=LIMIT)
    message, long = str(caught.value), sum(n > LIMIT for n in lengths)
    assert f"found {long} of 60 that are longer, up to {max(lengths)} tokens, the first is record {first}" in message
    assert "raise data.max_length, or set data.on_overlong to drop, truncate or split" in message
    assert len(make(data, cache, max_length=max(lengths))) == 60


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), limit=st.integers(1, 20))
def test_splitting_loses_and_repeats_nothing(lengths, limit):
    lengths = np.array(lengths)
    record, start, length = trainer.data.tokenize._windows(lengths, Data(max_length=limit, on_overlong="split"))
    assert length.min() >= 1 and length.max() <= limit
    covered = [(r, t) for r, s, n in zip(record, start, length) for t in range(s, s + n)]
    assert covered == [(r, t) for r, n in enumerate(lengths) for t in range(n)]


def test_samples_without_a_target_are_counted_and_left_out(tmp_path):
    silent = {"messages": [{"role": "user", "content": "Hello?", "extra": None}], "weight": 1.0}
    data = Dataset.from_list([chat("Q", "A"), silent, chat("Q", "B"), silent])
    samples = make(data, tmp_path)
    assert len(samples) == 2 and samples.length_report["facts"]["unsupervised"] == 2
    unanswered, = TEMPLATE.encode_chats([[{"role": "user", "content": "Hello?"}]])
    assert samples.length_report["facts"]["tokens_lost"] == 2 * len(unanswered.input_ids)


def test_every_label_masked_is_an_error_that_says_why(tmp_path):
    silent = {"messages": [{"role": "user", "content": "Hello?", "extra": None}], "weight": 1.0}
    with pytest.raises(UserError, match="facts: every label is masked: .* in 3 samples; none has an assistant turn"):
        make(Dataset.from_list([silent] * 3), tmp_path)
    with pytest.raises(UserError, match="every label is masked: .* in 5 samples; 5 of them are cut off at data.max_length=4"):
        make(records(5), tmp_path, max_length=4, on_overlong="truncate")
    with pytest.raises(UserError, match="all 5 samples are longer than data.max_length=4 and were dropped"):
        make(records(5), tmp_path, max_length=4, on_overlong="drop")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_chat_that_cannot_be_rendered_names_its_record(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.data.tokenize, "RECORDS_PER_PROCESS", 10)
    strict = tiny.CHATML + "{% if messages[0].role != 'user' %}{{ raise_exception('a chat starts with the user') }}{% endif %}"
    data = [*records(30), {"messages": chat("", "A")["messages"][1:], "weight": 1.0}]
    template, options = ChatTemplate(tiny.tokenizer(), strict), Data(cache_dir=str(tmp_path), num_proc=workers)
    refusal = r"^facts.jsonl, record 31: chat template of .* refuses turn 1 \(assistant\): a chat starts with the user; correct the chat"
    with pytest.raises(UserError, match=refusal):
        tokenize([(source(), Dataset.from_list(data))], template, options)


def test_messages_reach_the_template_with_their_extra_keys_and_no_others(tmp_path):
    spy = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
           "{% if 'name' in m %} ({{ m.name }}){% endif %}<|im_end|>\n{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    record = chat("Q", "A")
    record["messages"][0]["extra"] = '{"name": "Ann"}'
    template = ChatTemplate(tiny.tokenizer(), spy)
    ids, _ = make(Dataset.from_list([record]), tmp_path, template)[0]
    assert template.tokenizer.decode(ids) == "<|im_start|>user\nQ (Ann)<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


def test_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.data.tokenize, "RECORDS_PER_PROCESS", 10)
    data = records(50)
    one = tokenize([(source(), data)], TEMPLATE, Data(cache_dir=str(tmp_path / "one"), num_proc=1))
    two = tokenize([(source(), data)], TEMPLATE, Data(cache_dir=str(tmp_path / "two"), num_proc=2))
    assert len(list((tmp_path / "two" / "tokens").rglob("*.arrow"))) == 2
    assert one.fingerprint == two.fingerprint
    assert all(one[i][0].tolist() == two[i][0].tolist() for i in range(50))


def test_the_fingerprint_tells_samples_apart(tmp_path):
    samples = make(records(9), tmp_path)
    others = [make(records(8), tmp_path), make(records(9), tmp_path, train_on="all"),
              samples.select(np.arange(9)[::-1]), samples.select(np.arange(8))]
    assert len({samples.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert make(records(9), tmp_path).fingerprint == samples.fingerprint


def test_the_cache_knows_what_decides_the_tokens(tmp_path, monkeypatch):
    encodes = []
    real = trainer.data.tokenize._encode
    monkeypatch.setattr(trainer.data.tokenize, "_encode", lambda *args, **options: encodes.append(1) or real(*args, **options))

    def passes(data=None, template=TEMPLATE, **options) -> int:
        encodes.clear()
        make(data or records(5), tmp_path, template, **options)
        return len(encodes)

    assert passes() == 1
    assert passes() == 0
    assert passes(max_length=15, on_overlong="split") == 0
    assert passes(train_on="all") == 1
    assert passes(data=records(6)) == 1
    assert passes(template=ChatTemplate(tiny.tokenizer(), tiny.CHATML + " ")) == 1
    assert passes(template=ChatTemplate(tiny.tokenizer(vocab_size=340))) == 1
    assert passes(template=ChatTemplate(tiny.tokenizer())) == 0


@pytest.mark.slow
def test_a_second_process_does_not_tokenize_again(tmp_path):
    path, cache = tmp_path / "rows.jsonl", str(tmp_path / "cache")
    path.write_text('{"prompt": "What is 3 + 4?", "completion": "7"}\n' * 3)
    samples = tokenize(load_sources(str(path), "domain", cache_dir=cache), TEMPLATE, Data(cache_dir=cache))
    status, shown, errors = complete("tests.helpers.tokenize_again", [path, cache])
    assert status == 0, errors
    assert shown.split() == [samples.fingerprint]


@pytest.mark.slow
def test_lengths_of_100_000_samples_come_without_a_loop(tmp_path, monkeypatch):
    n, rng = 100_000, np.random.default_rng(0)
    lengths = rng.integers(5, 60, n)
    flat = np.zeros(lengths.sum(), dtype=np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat[offsets[1:] - 1] = 1
    columns = [np.arange(len(flat), dtype=np.int32), flat]
    lists = [pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(column)) for column in columns]
    columns = {"input_ids": lists[0], "supervised": lists[1], "weight": np.ones(n, np.float32),
               "turn_weights": pa.array([[]] * n, pa.list_(pa.float32())), "note": pa.nulls(n, pa.string())}
    table = pa.table(columns)
    tokens = pa.Table.from_batches(table.to_batches(max_chunksize=1000))
    monkeypatch.setattr(trainer.data.tokenize, "_tokens", lambda *args: tokens)
    calls = []
    sys.setprofile(lambda frame, event, function: calls.append(event) if event in ("call", "c_call") else None)
    try:
        samples = make(tokens, tmp_path)
    finally:
        sys.setprofile(None)
    assert len(calls) < n // 2, "a loop over samples calls something for each"
    np.testing.assert_array_equal(samples.lengths, lengths)
    assert (samples.supervised == 1).all()
    assert samples[99_999][0].tolist() == list(range(offsets[-2], offsets[-1]))
