"""Suites by name: their prompts from the hub's rows and from files, and the bundled mini suite.

The hub's rows here are written by hand in its columns. `STEADFAST_SUITES` may name a folder with whole files of the benchmarks.
"""

import json
import os
from pathlib import Path

import pytest

from trainer.config import Items
from trainer.data import sources
from trainer.errors import UserError
from trainer.evaluation import items
from trainer.evaluation.config import Config, Data, validate, with_default_suite
from trainer.evaluation.items import read_files
from trainer.evaluation.rules.verdicts import judge_rules
from trainer.evaluation.scoring import judge
from trainer.evaluation.suites.table import GROUPS, SUITES

FOLDER = os.environ.get("STEADFAST_SUITES")
HUB = {
    "arc_easy": {"question": "What melts?", "choices": {"text": ["1", "Ice", "Ice"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    "piqa": {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Eat the lid.", "label": 0},
    "openbookqa": {"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": " B"},
    "commonsense_qa": {"question": " Where? ", "choices": {"label": list("ABCDE"), "text": ["a", "b", "c", "d", "e"]}, "answerKey": "E"},
    "winogrande": {"sentence": "Sam met Ann because _ was early.", "option1": "Sam", "option2": "Ann", "answer": "2"},
    "boolq": {"passage": "Ice floats.", "question": "does ice float", "label": 1},
    "lambada_openai": {"text": "He said that he was sorry"},
    "gsm8k": {"question": "1 + 1?", "answer": "It is two.\n#### 2"},
    "ifeval": {"key": 7, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
               "kwargs": [{"relation": None, "num_words": None}, {"relation": "at least", "num_words": 3}]},
}
FOUNDRY = {  # in llm-foundry's columns
    "arc_easy": {"query": "Question: What melts?", "choices": ["1", "Ice", "Ice"], "gold": 1},
    "piqa": {"query": "Question: Open a jar\n", "choices": ["Turn the lid.", "Eat the lid."], "gold": 0},
    "openbookqa": {"query": "Ice is", "choices": ["hot", "cold"], "gold": 1},
    "commonsense_qa": {"query": "Question: Where?\nChoices:\nA. a\nB. b\nC. c\nD. d\nE. e\nAnswer:", "choices": list("ABCDE"), "gold": 4},
    "winogrande": {"context_options": ["Sam met Ann because Sam", "Sam met Ann because Ann"], "continuation": "was early.", "gold": 1},
    "boolq": {"query": "Passage: Ice floats.\nQuestion: does ice float?", "choices": ["no", "yes"], "gold": 1},
    "lambada_openai": {"context": "He said that he was", "continuation": "sorry"},
}
PROMPTS = {
    "arc_easy": "Question: What melts?\nAnswer:", "piqa": "Question: Open a jar\nAnswer:", "openbookqa": "Ice is",
    "commonsense_qa": "Question: Where?\nA. a\nB. b\nC. c\nD. d\nE. e\nAnswer:", "boolq": "Ice floats.\nQuestion: does ice float?\nAnswer:",
    "lambada_openai": "He said that he was", "gsm8k": "Question: 1 + 1?\nAnswer:", "ifeval": "Write.",
}
ANSWERS = {"arc_easy": "Ice", "piqa": "Turn the lid.", "openbookqa": "cold", "commonsense_qa": "E", "winogrande": "Sam met Ann because Ann",
           "boolq": "yes", "lambada_openai": "sorry", "gsm8k": "It is two.\n#### 2"}


def read(entry, folder=None):
    return read_files(Data(general=[entry], suite_folder=folder and str(folder)))


def from_folder(folder: Path, name: str, row: dict):
    (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    file, = read(f"suite:{name}", folder)
    return file


def without_places(file) -> list:
    return [(item.prompt, item.answers, item.choices, item.continuation) for item in file.items]


@pytest.mark.parametrize("name", HUB)
def test_a_row_of_the_hub_becomes_the_harness_s_prompt(name, tmp_path):
    if name == "ifeval":
        pytest.importorskip("py3langid")
    file = from_folder(tmp_path, name, HUB[name])
    item, = file.items
    assert (item.prompt[0]["content"] if item.prompt else None) == PROMPTS.get(name)
    assert item.answers == ((ANSWERS[name],) if name in ANSWERS else ())
    assert file.name == name and file.metric == SUITES[name].items.metric


@pytest.mark.parametrize("name", FOUNDRY)
def test_files_of_llm_foundry_have_the_same_prompts(name, tmp_path):
    (tmp_path / "a").mkdir()
    hub, foundry = from_folder(tmp_path, name, HUB[name]), from_folder(tmp_path / "a", name, FOUNDRY[name])
    assert without_places(hub) == without_places(foundry)


def test_rules_of_the_hub_come_without_their_nulls(tmp_path):
    item, = from_folder(tmp_path, "ifeval", HUB["ifeval"]).items
    assert [rule.arguments for rule in item.rules] == [{}, {"relation": "at least", "num_words": 3}] and item.id == "7"


def test_winogrande_s_choices_are_beginnings(tmp_path):
    item, = from_folder(tmp_path, "winogrande", HUB["winogrande"]).items
    assert item.choices == ("Sam met Ann because Sam", "Sam met Ann because Ann") and item.continuation == "was early." and not item.prompt


@pytest.mark.parametrize("said, right", [("It costs $2.", True), ("1 + 1 = 2", True), ("2, so 3", False), ("none", False)])
def test_gsm8k_compares_the_last_number(said, right, tmp_path):
    file = from_folder(tmp_path, "gsm8k", HUB["gsm8k"])
    assert judge(said, file.items[0].answers, file.options)[0] is right


def test_core_reads_the_hub_where_the_folder_has_no_file(monkeypatch, tmp_path):
    opened = []

    def open_source(source):
        opened.append((source.path, source.subset, source.split))
        return sources.open_source(source) if source.path.endswith(".jsonl") else [HUB[by_path[(source.path, source.subset)]]]

    by_path = {(suite.items.path, suite.items.subset): name for name, suite in SUITES.items() if name in HUB}
    by_path[("allenai/ai2_arc", "ARC-Challenge")] = "arc_easy"
    monkeypatch.setattr(items, "open_source", open_source)
    monkeypatch.setattr(items, "rows_of", lambda rows: ((f"record {n}", row) for n, row in enumerate(rows, 1))
                        if isinstance(rows[0], dict) else sources.rows_of(rows))
    (tmp_path / "openbook_qa.jsonl").write_text(json.dumps(FOUNDRY["openbookqa"]))
    files = read("suite:core", tmp_path)
    assert [file.name for file in files] == list(GROUPS["core"]) and all(len(file.items) == 1 for file in files)
    assert (str(tmp_path / "openbook_qa.jsonl"), "main", "test") in opened and ("openai/gsm8k", "main", "test") in opened


def test_options_of_a_suite_are_those_that_are_given(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(2 * (json.dumps(HUB["piqa"]) + "\n"))
    file, = read(Items("suite:piqa", max_records=1, choice_by="tokens"), tmp_path)
    assert len(file.items) == 1 and file.options.choice_by == "tokens" and not file.options.chat


@pytest.mark.parametrize("entry, folder, expected", [
    ("suite:cor", None, r"suite:cor: expected a suite \(core, mini, arc_easy.*\), got cor"),
    ("suite:", None, "got none"),
    ("suite:piqa", "absent", "data.suite_folder: expected a folder with files of suites, such as arc_easy.jsonl, found none at absent"),
])
def test_suites_that_are_not_there(entry, folder, expected):
    with pytest.raises(UserError, match=expected):
        read(entry, folder)


def test_a_row_of_something_else_is_refused_by_its_place(tmp_path):
    with pytest.raises(UserError, match="piqa.jsonl, line 1: expected a row of the suite piqa, found the columns question"):
        from_folder(tmp_path, "piqa", {"question": "?"})


# ---------------------------------------------------------------- the bundled suite


def test_the_mini_suite_is_the_default_and_has_some_two_hundred_items():
    config = with_default_suite(Config())
    assert config.data.general == "suite:mini" and with_default_suite(Config(tasks="a")).data.general == []
    files = read_files(config.data)
    assert tuple(file.name for file in files) == GROUPS["mini"]
    prompts = [str(item.prompt) for file in files for item in file.items]
    assert 200 <= len(prompts) == len(set(prompts)) <= 220
    config.model.path = "a"
    validate(config)


def test_right_answers_of_the_mini_suite_are_right_and_others_wrong():
    by_name = {file.name: file for file in read("suite:mini")}
    for item in by_name["mini_arithmetic"].items:
        assert judge(f"It is 1, no: {item.answers[0]}.", item.answers, by_name["mini_arithmetic"].options)[0]
        assert not judge("It is 31415.", item.answers, by_name["mini_arithmetic"].options)[0]
    for item in by_name["mini_copying"].items:
        assert judge(f"{item.answers[0]}\n", item.answers, by_name["mini_copying"].options)[0]
        assert not judge(f"Sure: {item.answers[0]}", item.answers, by_name["mini_copying"].options)[0]
    for item in by_name["mini_json"].items:
        assert all(judge_rules(item.rules, f"```json\n{json.dumps(item.rules[0].arguments['value'])}\n```").strict)
        assert not any(judge_rules(item.rules, '{"no": 0}').loose)
    for item in by_name["mini_recall"].items:
        wanted = " ".join(item.rules[0].arguments["keywords"])
        told = " ".join(turn["content"] for turn in item.prompt)
        assert all(judge_rules(item.rules, wanted).strict)
        assert len(item.rules) == 1 or not all(judge_rules(item.rules, told).strict), "reciting the whole chat is no recall"


# ---------------------------------------------------------------- whole files


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="STEADFAST_SUITES names no folder with the files of the suites")
@pytest.mark.parametrize("name, count", [("arc_easy", 2376), ("arc_challenge", 1172), ("piqa", 1838), ("openbookqa", 500),
                                         ("commonsense_qa", 1221), ("winogrande", 1267), ("boolq", 3270), ("lambada_openai", 5153),
                                         ("ifeval", 541)])
def test_every_item_of_a_whole_file_is_read(name, count):
    file, = read(f"suite:{name}", FOLDER)
    assert len(file.items) == count and Path(file.options.path).parent == Path(FOLDER)
