"""Files of every kind and format become the same records; each mistake in them is one line."""

import csv
import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import Source
from trainer.data import sources
from trainer.data.formats import choose_format
from trainer.data.sources import load_sources
from trainer.errors import UserError

SHARED = Path(__file__).parents[4] / "shared" / "data"
ROWS = [{"prompt": "What is 3 + 4?", "completion": "7"}, {"prompt": "Née où ?\n\"A, b\"", "completion": " 2020-01-01 "}]
CHATS = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in ROWS]


def load(path, tmp_path, **options) -> Dataset:
    (_, records), = load_sources([Source(str(path), **options)], "domain", cache_dir=str(tmp_path / "cache"))
    return records


def spoken(records: Dataset) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in record["messages"]] for record in records]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def complaint(path, tmp_path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(path, tmp_path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_as(kind: str, folder: Path) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_lines(path, ["\ufeff" + json.dumps(ROWS[0], ensure_ascii=False) + "\n", "\n", json.dumps(ROWS[1]) + "\n"])
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "folder":
        Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "splits":
        DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(path)
    else:
        content = {"array": ROWS, "data": {"data": ROWS}, "by_id": {"a": ROWS[0], "b": ROWS[1]}}.get(kind)
        path = path.with_suffix(".json")
        path.write_text("\n".join(map(json.dumps, ROWS)) if kind == "lines" else json.dumps(content, indent=1))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "array", "data", "by_id", "lines", "csv", "parquet", "folder", "splits"])
def test_every_kind_of_file_gives_the_same_records(kind, tmp_path):
    records = load(write_as(kind, tmp_path), tmp_path)
    assert spoken(records) == CHATS
    assert records["weight"] == [1.0, 1.0]
    assert records["id"] == (["a", "b"] if kind == "by_id" else [None, None])


def test_a_single_object_is_one_record(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert spoken(load(tmp_path / "one.json", tmp_path)) == CHATS[:1]


FORMATS = {
    "chat": ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
             [("system", "S"), ("user", "Q"), ("assistant", "A")]),
    "chat with parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "2"}]},
                                      {"role": "assistant", "content": "A"}]}, [("user", "Q2"), ("assistant", "A")]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
                 [("system", "S"), ("user", "Q"), ("assistant", "A")]),
    "alpaca": ({"instruction": "I", "input": "in", "output": "O"}, [("user", "I\n\nin"), ("assistant", "O")]),
    "alpaca without input": ({"instruction": "I", "input": "", "output": "O"}, [("user", "I"), ("assistant", "O")]),
    "prompt_completion": ({"prompt": "P", "completion": 7, "system": "S"}, [("system", "S"), ("user", "P"), ("assistant", "7")]),
    "conversational prompt": ({"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
                              [("user", "Q"), ("assistant", "A")]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_told_from_the_columns(name, tmp_path):
    row, expected = FORMATS[name]
    records = load(write_lines(tmp_path / "rows.jsonl", [row | {"id": 5, "source": "web", "weight": 0.5}]), tmp_path)
    assert spoken(records) == [expected]
    assert (records[0]["id"], records[0]["source"], records[0]["weight"]) == ("5", "web", 0.5)


def test_plain_text(tmp_path):
    records = load(write_lines(tmp_path / "rows.jsonl", [{"text": "Once upon a time"}]), tmp_path)
    assert records["text"] == ["Once upon a time"] and "messages" not in records.column_names


def test_any_columns_by_mapping_also_nested_ones(tmp_path):
    rows = [{"question": "Q", "facts": ["f1", "f2"], "instances": [{"output": "A"}], "text": "unused"}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    mapped = {"prompt": "question", "completion": "instances.0.output"}
    assert spoken(load(path, tmp_path, columns=mapped)) == [[("user", "Q"), ("assistant", "A")]]
    mapped = {"instruction": "question", "input": "facts", "output": "instances.0.output"}
    assert spoken(load(path, tmp_path, columns=mapped)) == [[("user", "Q\n\nf1\n\nf2"), ("assistant", "A")]]


def test_a_format_can_be_chosen_where_several_fit(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [FORMATS["chat"][0] | {"text": "T"}])
    assert "messages" in load(path, tmp_path).column_names
    assert load(path, tmp_path, format="text")["text"] == ["T"]


def test_further_keys_of_a_message_are_kept(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": None}}}
    turns = [{"role": "user", "content": "Q", "name": None}, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "content": "7"}, {"role": "assistant", "content": "A"}]
    record, = load(write_lines(tmp_path / "rows.jsonl", [{"messages": turns}]), tmp_path)
    assert [m["role"] for m in record["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert record["messages"][0]["extra"] is None and record["messages"][1]["content"] == ""
    assert json.loads(record["messages"][1]["extra"]) == {"tool_calls": [call]}


def test_limit_names_and_several_sources(tmp_path):
    first, second = write_lines(tmp_path / "first.jsonl", ROWS), write_lines(tmp_path / "second.jsonl", ROWS)
    loaded = load_sources([str(first), Source(str(second), name="other", max_records=1)], "domain", cache_dir=str(tmp_path / "cache"))
    assert [(source.name, len(records)) for source, records in loaded] == [("first", 2), ("other", 1)]
    (source, records), = load_sources(str(first), "domain", cache_dir=str(tmp_path / "cache"))
    assert source.name == "first" and len(records) == 2
    assert load_sources([], "domain") == []


def test_a_second_run_reads_the_cache_and_a_changed_file_is_read_again(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    first, second = load(path, tmp_path), load(path, tmp_path)
    assert first._fingerprint == second._fingerprint and first.cache_files == second.cache_files
    write_lines(path, [*ROWS, {"prompt": "new", "completion": "row"}])
    assert spoken(load(path, tmp_path)) == [*CHATS, [("user", "new"), ("assistant", "row")]]


def test_a_missing_file(tmp_path):
    assert "no such file" in complaint(tmp_path / "absent.jsonl", tmp_path)
    assert "no such file" in complaint("./absent folder/x", tmp_path)


def test_a_hub_name_is_looked_up(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert spoken(load("someone/chats", tmp_path, subset="main", split="train[:2]")) == CHATS
    assert calls == [(("someone/chats", "main"), {"split": "train[:2]"})]


def test_a_hub_name_that_cannot_be_loaded(tmp_path):
    assert "no hub data set of that name could be loaded" in complaint("nobody/nothing", tmp_path)


def test_a_file_of_another_kind_and_a_folder_of_another_kind(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    assert ".parquet" in complaint(tmp_path / "rows.xlsx", tmp_path)
    assert "save_to_disk" in complaint(tmp_path, tmp_path)
    (tmp_path / "rows.parquet").write_text("not Parquet")
    assert "expected a Parquet file" in complaint(tmp_path / "rows.parquet", tmp_path)


def test_a_split_that_is_not_there(tmp_path):
    assert "found train, test" in complaint(write_as("splits", tmp_path), tmp_path, split="validation")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(0, 3), st.sampled_from(['{"prompt": "a"', "{'prompt': 1}", "nonsense", '{"a": 1} x']))
def test_malformed_json_names_its_line(tmp_path_factory, good, blank, bad):
    folder = tmp_path_factory.mktemp("lines")
    path = write_lines(folder / "rows.jsonl", [*[ROWS[0]] * good, *["\n"] * blank, bad + "\n", ROWS[0]])
    assert f"line {good + blank + 1}: expected one JSON object, found malformed JSON" in complaint(path, folder)


def test_malformed_json_array_names_its_line(tmp_path):
    (tmp_path / "rows.json").write_text('[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a" "completion": "b"}\n]')
    assert "line 3" in complaint(tmp_path / "rows.json", tmp_path)


def test_bytes_that_are_not_utf8_name_their_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt": "caf\xe9", "completion": "b"}\n')
    assert "line 2: expected UTF-8 text, found byte 0xe9" in complaint(tmp_path / "rows.jsonl", tmp_path)
    (tmp_path / "rows.json").write_bytes(b'[\n{"prompt": "caf\xe9", "completion": "b"}]')
    assert "line 2: expected UTF-8 text, found byte 0xe9" in complaint(tmp_path / "rows.json", tmp_path)
    (tmp_path / "rows.csv").write_bytes(b"prompt,completion\ncaf\xe9,b\n")
    assert "expected UTF-8 text" in complaint(tmp_path / "rows.csv", tmp_path)


def test_lines_that_are_no_objects(tmp_path):
    assert 'line 2: expected an object with columns, found "text"' in complaint(
        write_lines(tmp_path / "rows.jsonl", [ROWS[0], '"text"\n']), tmp_path)


@pytest.mark.parametrize("row", ["only one", "one,two,three", 'a,"b" c'])
def test_malformed_csv_names_its_line(row, tmp_path):
    (tmp_path / "rows.csv").write_text(f"prompt,completion\na,b\n{row}\n")
    assert "line 3" in complaint(tmp_path / "rows.csv", tmp_path)


def test_csv_values_stay_as_they_are_written(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,weight\nIs it NA?,NA,2\n007,1.50,\n")
    records = load(tmp_path / "rows.csv", tmp_path)
    assert spoken(records) == [[("user", "Is it NA?"), ("assistant", "NA")], [("user", "007"), ("assistant", "1.50")]]
    assert records["weight"] == [2.0, 1.0]


def test_wrong_columns_name_expected_found_and_the_remedy(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "Q", "answer": "A"}])
    message = complaint(path, tmp_path)
    assert "prompt+completion" in message and "found question, answer" in message and "columns: {prompt: question" in message
    assert "expected the columns instruction+output, found" in complaint(path, tmp_path, format="alpaca")
    assert "expected query in the file, found the columns question, answer" in complaint(
        path, tmp_path, columns={"prompt": "query", "completion": "answer"})
    assert "found question" in complaint(path, tmp_path, columns={"question": "prompt"})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_empty_data_sets(name, tmp_path):
    (tmp_path / name).write_text("")
    assert "empty data set" in complaint(tmp_path / name, tmp_path)
    header = {"rows.jsonl": "\n\n", "rows.json": "[]", "rows.csv": "prompt,completion\n"}[name]
    (tmp_path / name).write_text(header)
    assert "empty data set" in complaint(tmp_path / name, tmp_path)


def chat(*turns) -> dict:
    return {"messages": [dict(zip(("role", "content"), turn)) for turn in turns]}


BAD = [
    ([ROWS[0], {"prompt": "a", "completion": ""}], "line 2: completion: expected text, found an empty string"),
    ([ROWS[0], {"prompt": " \n", "completion": "b"}], "line 2: prompt: expected text, found an empty string"),
    ([ROWS[0], ROWS[0], {"prompt": "a"}], "line 3: completion: expected text, found none"),
    ([ROWS[0], {"prompt": "a", "completion": {"x": 1}}], 'line 2: completion: expected text, found {"x": 1}'),
    ([ROWS[0] | {"weight": -1}], "line 1: weight: expected a number above 0, found -1"),
    ([ROWS[0] | {"weight": 1e-9}], "line 1: weight: expected a weight from 1e-06 to 1,000,000, found 1e-09"),
    ([ROWS[0] | {"weight": 1e39}], "line 1: weight: expected a weight from 1e-06 to 1,000,000, found 1e+39"),
    ([chat(("user", "Q"), ("robot", "A"))], 'observation, function_call, or another name of one), found "robot"'),
    ([chat(("user", "Q"), ("robot", "A"))], "line 1: turn 2: expected a role (system, developer, user, human, assistant,"),
    ([chat(("user", "Q"), ("assistant", None))], "line 1: turn 2: expected text, found none"),
    ([chat(("user", "Q"), ("assistant", [{"type": "image", "url": "u"}]))], "line 1: turn 2: expected text, found"),
    ([{"messages": []}], "line 1: expected a list of messages in 'messages', found []"),
    ([{"messages": ["hello"]}], 'line 1: turn 1: expected a message with role and content, found "hello"'),
]


@pytest.mark.parametrize("rows, expected", BAD, ids=[expected for _, expected in BAD])
def test_a_bad_record_names_its_line_and_turn(rows, expected, tmp_path):
    assert expected in complaint(write_lines(tmp_path / "rows.jsonl", rows), tmp_path)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "x"]), inner),
    max_leaves=8))
def test_any_value_is_read_or_refused_with_a_reason(value):
    for fields in ({"messages": value}, {"prompt": value, "completion": "A"}):
        try:
            record = choose_format(fields, "auto", None).record(fields)
        except ValueError as error:
            assert str(error)
        else:
            assert all(isinstance(m["content"], str) and m["role"] for m in record["messages"])


REAL = [
    ("gsm8k_train.jsonl", {"prompt": "question", "completion": "answer"}, 7473),
    ("self_instruct_seed_tasks.jsonl", {"input": "instances.0.input", "output": "instances.0.output"}, 175),
    ("pubmedqa_ori_pqal.json", {"instruction": "QUESTION", "input": "CONTEXTS", "output": "LONG_ANSWER"}, 1000),
]


@pytest.mark.parametrize("name, columns, count", REAL)
def test_real_data(name, columns, count, tmp_path):
    if not (SHARED / name).exists():
        pytest.skip(f"real data is not there: {SHARED / name}")
    records = load(SHARED / name, tmp_path, columns=columns)
    assert len(records) == count
    assert all(len(messages) == 2 and all(m["content"].strip() for m in messages) for messages in records["messages"])


@pytest.mark.parametrize(("limit", "value", "sizes"), [("RECORDS_PER_BATCH", 4, [4, 4, 2]), ("CHARACTERS_PER_BATCH", 70, [5, 5])])
def test_batches_hold_some_records_or_some_characters(tmp_path, monkeypatch, limit, value, sizes):
    monkeypatch.setattr(sources, limit, value)
    rows = [{"prompt": f"What is {n}?", "completion": f"{n}" * (1 + 99 * (n == 4))} for n in range(10)]
    records = load(write_lines(tmp_path / "rows.jsonl", rows), tmp_path)
    assert [chat[1][1] for chat in spoken(records)] == [row["completion"] for row in rows]
    assert [len(chunk) for chunk in records.data.column("weight").chunks] == sizes
