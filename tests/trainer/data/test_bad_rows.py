"""Rows that are no chats, and turns that follow one of their own role: refused, or skipped, joined and counted, by choice."""

import json

import pytest

from tests.helpers import tiny
from tests.helpers.chat_templates import read, tokenizer_for
from trainer.config import Config, Data
from trainer.data.prepare import data_summary, note_lines, prepare_data
from trainer.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
ROBOT = {"messages": [{"role": "robot", "content": "Q"}]}


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def prepared(lines, tmp_path, tokenizer=None, name="rows.jsonl", **data):
    path = tmp_path / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    options = Data(train=str(path), cache_dir=str(tmp_path / "cache"), num_proc=1, **data)
    training = prepare_data(Config(data=options), tokenizer or tiny.tokenizer())
    summary = data_summary(training, Config())["sources"]
    return training, summary[0], note_lines(summary)


def texts(training) -> list[str]:
    return [training.template.tokenizer.decode(training.samples[i][0]) for i in range(len(training.samples))]


def test_bad_rows_are_skipped_counted_and_the_first_five_named(tmp_path):
    bad = [ROBOT, "{broken", '"text"', {"messages": []}, {"messages": [turn("user", "Q"), turn("assistant", "")]}, {"other": 1}, ROBOT]
    training, summary, notes = prepared([GOOD, *bad, GOOD], tmp_path, on_bad_row="skip")
    assert len(training.samples) == summary["kept"] == 2 and summary["refused"] == 7 and summary["unsupervised"] == 0
    line, = [note for note in notes if "refused" in note]
    assert line.startswith('rows: 7 of 9 rows are refused and skipped: line 2: turn 1: expected a role')
    for part in ("; line 3: expected one JSON object, found malformed JSON", '; line 4: expected an object with columns, found "text"',
                 "; line 5: expected a list of messages in 'messages', found []", "; line 6: turn 2: expected text, found an empty string",
                 "; and 2 more"):
        assert part in line
    assert "\n" not in line
    again = prepared([GOOD, *bad, GOOD], tmp_path, on_bad_row="skip")  # from the caches
    assert again[1:] == (summary, notes)
    with pytest.raises(UserError, match="rows.jsonl, line 2: turn 1: expected a role"):
        prepared([GOOD, *bad, GOOD], tmp_path)


def test_chats_that_the_template_refuses_are_bad_rows(tmp_path):
    tokenizer = tokenizer_for(read("gemma"))
    tokenizer.chat_template = read("gemma")
    two = {"messages": [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]}
    _, summary, notes = prepared([GOOD, two, GOOD], tmp_path, tokenizer, on_bad_row="skip")
    assert summary["kept"] == 2 and summary["refused"] == 1
    assert "line 2: chat template of" in notes[0] and "refuses turn 2 (user)" in notes[0]
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: chat template of .* refuses turn 2 \(user\)"):
        prepared([GOOD, two, GOOD], tmp_path, tokenizer)


def test_a_first_row_that_is_none_and_rows_of_csv_are_skipped(tmp_path):
    assert prepared(["{broken", GOOD], tmp_path, on_bad_row="skip")[1]["refused"] == 1
    _, summary, _ = prepared(["prompt,completion", "a,b", "a,b,c", "a,", "c,d"], tmp_path, name="rows.csv", on_bad_row="skip")
    assert summary["kept"] == 2 and summary["refused"] == 2
    _, summary, _ = prepared([{"text": "Once upon a time"}, {"text": ""}], tmp_path, name="texts.jsonl", on_bad_row="skip")
    assert summary["kept"] == 1 and summary["refused"] == 1


def test_a_source_of_bad_rows_alone_is_an_error(tmp_path):
    with pytest.raises(UserError, match="rows: 2 of 2 rows are refused and skipped: line 1: turn 1: expected a role"):
        prepared([ROBOT, ROBOT], tmp_path, on_bad_row="skip")
    with pytest.raises(UserError, match="expected records, found none that can be read: .*line 1: expected one JSON object"):
        prepared(["{broken"], tmp_path, on_bad_row="skip")


TWICE = {"messages": [turn("user", "a"), turn("user", "b"), turn("assistant", "c"), turn("assistant", "d")]}


def test_turns_of_one_role_in_a_row_are_joined_refused_or_kept(tmp_path):
    training, _, notes = prepared([GOOD, TWICE], tmp_path, same_role="join")
    assert texts(training)[1].endswith("user\na\n\nb<|im_end|>\n<|im_start|>assistant\nc\n\nd<|im_end|>\n")
    assert "rows: 2 turns follow one of their own role, and are joined to it (data.same_role=join)" in notes
    with pytest.raises(UserError,
                       match="line 2: turn 2: expected another role than that of the turn before, found user again; .*data.same_role=join"):
        prepared([GOOD, TWICE], tmp_path, same_role="refuse")
    with pytest.raises(UserError, match="line 2: .* turn 4 .*two assistant turns in a row cannot be separated; .*data.same_role=join"):
        prepared([GOOD, TWICE], tmp_path)
    users = {"messages": TWICE["messages"][:3]}
    training, _, notes = prepared([users], tmp_path)
    assert "user\na<|im_end|>\n<|im_start|>user\nb<|im_end|>" in texts(training)[0]
    assert "rows: 1 turns follow one of their own role, and are kept apart (data.same_role=keep)" in notes
    assert prepared([GOOD, TWICE], tmp_path, same_role="refuse", on_bad_row="skip")[1]["refused"] == 1


def test_joined_turns_keep_reasoning_and_calls_and_must_agree_on_weight(tmp_path):
    tokenizer = tokenizer_for(read("qwen3"))
    tokenizer.chat_template = read("qwen3")
    call = {"name": "f", "arguments": {}}
    chat = [turn("user", "a"), turn("assistant", "b", reasoning_content="r"), turn("assistant", "", tool_calls=[call]), turn("tool", "1"),
            turn("tool", "2"), turn("assistant", "c")]
    text, = texts(prepared([{"messages": chat}], tmp_path, tokenizer, same_role="join")[0])
    assert '<think>\nr\n</think>\n\nb\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>" in text
    for messages in ([turn("user", "a"), turn("assistant", "b", weight=0), turn("assistant", "c")],
                     [turn("user", "a"), turn("assistant", "", tool_calls=[call]), turn("assistant", "c")]):
        with pytest.raises(UserError, match="line 1: turn 3: expected a turn that can be joined to the one before"):
            prepared([{"messages": messages}], tmp_path, tokenizer, same_role="join")


def test_chats_without_an_answer_are_counted_with_the_rest(tmp_path):
    _, summary, _ = prepared([GOOD, {"messages": GOOD["messages"][:1]}, {"messages": GOOD["messages"][:1]}], tmp_path)
    assert summary["kept"] == 1 and summary["unsupervised"] == 2


def test_columns_and_keys_that_nothing_reads_are_named(tmp_path):
    rows = [GOOD | {"category": "x", "url": None, "id": 3}, GOOD | {"category": "y", "text": "another format's"},
            {"messages": [turn("user", "Q", note="n"), turn("assistant", "A")]}]
    _, _, notes = prepared(rows, tmp_path)
    assert notes == ["rows: nothing reads category (2 rows), messages.note (1 rows), text (1 rows)"]
    row = {"instruction": "Square of", "input": 0, "output": "0", "history": [["a", "b"]]}
    training, _, notes = prepared([row], tmp_path)
    assert "Square of\n\n0<|im_end|>" in texts(training)[0] and notes == ["rows: nothing reads history (1 rows)"]
    training, _, _ = prepared([row | {"input": False}], tmp_path)
    assert "Square of\n\nfalse<|im_end|>" in texts(training)[0]


def test_names_that_the_template_does_not_print_are_told(tmp_path):
    row = {"messages": [turn("user", "Q", name="Ann"), turn("assistant", "A")]}
    assert prepared([row], tmp_path)[2] == ["rows: nothing reads messages.name (1 rows)"]


def test_the_caches_depend_on_every_option(tmp_path):
    seen = [prepared([TWICE], tmp_path, same_role="join")[0].samples.fingerprint]
    assert prepared([TWICE], tmp_path, same_role="join")[0].samples.fingerprint == seen[0]
    with pytest.raises(UserError):
        prepared([TWICE], tmp_path, same_role="keep")
    tokenizer = tokenizer_for(read("qwen3"))
    tokenizer.chat_template = read("qwen3")
    runs = [prepared([GOOD], tmp_path, tokenizer, **options)[0].samples.fingerprint
            for options in ({}, {"empty_reasoning": "mask"}, {"train_on": "all"})]
    assert len(set(runs)) == 3
