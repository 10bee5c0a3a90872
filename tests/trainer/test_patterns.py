"""Patterns that no search ends, of users, rows and adapters, and rules whose arguments no check can use: each one line, in little time."""

import json
import resource
import signal

import peft
import pytest

from tests.helpers import tiny
from trainer import patterns
from trainer.config import Config, Lora, Model
from trainer.errors import UserError
from trainer.evaluation import score_items
from trainer.evaluation.config import Data, Items
from trainer.evaluation.generation import Completion
from trainer.evaluation.items import read_files
from trainer.evaluation.rules.verdicts import make_rule
from trainer.evaluation.tokens import Key, Prompt, Tokens
from trainer.model.loading import meta_model
from trainer.model.lora import add_adapter

ENDLESS = ["((a+)+)$", "((a|a)*)$", "(a*a*a*a*a*a*a*)b", "((?:.*.*.*.*.*.*)*)x"]
LETTERS = "a" * 60 + "!"
SOON = "expected a pattern that is soon found or not"


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    monkeypatch.setattr(score_items, "JUDGING_SECONDS", 0.1)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    yield
    assert resource.getrlimit(resource.RLIMIT_AS) == limits and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def item_file(folder, *rows, **options):
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_files(Data(general=[Items(str(folder / "items.jsonl"), **options)]))


def judged(files, text):
    """The outcome of one answer, and the notes."""
    tokens = Tokens([Prompt(Key(0, 0), [], 1)], [])
    items = {Key(0, 0): score_items.Outcome()}
    notes = score_items._judge_completions(files, tokens, [Completion(text, 1, True)], items, [])
    return items[Key(0, 0)], notes


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_no_answer_ends(pattern, tmp_path):
    with pytest.raises(UserError, match=f"regex: {SOON}.*takes more than 0.1 s"):
        item_file(tmp_path, {"prompt": "q", "answer": LETTERS}, metric="regex", regex=pattern)


def test_a_pattern_that_an_answer_of_the_model_does_not_end(tmp_path):
    files = item_file(tmp_path, {"prompt": "q", "answer": "aaa"}, metric="regex", regex=ENDLESS[0])
    outcome, notes = judged(files, LETTERS)
    assert (outcome.right, outcome.found, outcome.prediction) == (False, None, LETTERS)
    assert notes == ["items: answers counted as wrong, as its pattern or rule took more than 0.1 s or 0.5 GiB on each: 1"]
    outcome, notes = judged(files, "aaa")
    assert (outcome.right, outcome.found, notes) == (True, "aaa", [])


def test_a_rule_that_an_answer_of_the_model_does_not_end(tmp_path):
    row = {"prompt": "q", "rules": ["detectable_format:multiple_sections", "punctuation:no_comma"],
           "kwargs": [{"section_spliter": "(a+)+", "num_sections": 1}, {}]}
    outcome, notes = judged(item_file(tmp_path, row, metric="rules"), LETTERS)
    assert outcome.rules == {"strict": [False, False], "loose": [False, False]} and outcome.right is False and len(notes) == 1


def test_an_answer_of_brackets_is_no_json(tmp_path):
    row = {"prompt": "q", "rules": ["detectable_format:json_format"], "kwargs": [{}]}
    assert judged(item_file(tmp_path, row, metric="rules"), "[" * 100_000)[0].right is False


@pytest.mark.parametrize("name, arguments, expected", [
    ("detectable_format:multiple_sections", {"section_spliter": "(", "num_sections": 1}, "section_spliter to be a regular expr"),
    ("length_constraints:number_words", {"num_words": "many", "relation": "at least"}, "num_words of .* to be a number, found 'many'"),
    ("keywords:existence", {"keywords": "one"}, "keywords of the rule .* to be a list of texts, found 'one'"),
    ("startend:end_checker", {"end_phrase": 5}, "end_phrase of the rule .* to be text, found 5"),
    ("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": []}, "relation of the rule"),
])
def test_arguments_of_rules_that_no_check_can_use(name, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        make_rule(name, arguments)


@pytest.mark.parametrize("pattern, expected", [("(.*.*.*.*.*.*.*.*)*#", SOON), ("(", "is not a regular expression"),
                                               ("a{99999999999999}", "is not a regular expression")])
def test_targets_by_a_pattern_without_an_end(pattern, expected):
    with pytest.raises(UserError, match=f"lora.target_modules: .*{expected}"):
        add_adapter(tiny.model("llama"), Lora(target_modules=pattern))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "exclude_modules", "target_modules", "layers_pattern",
                                   "modules_to_save"])
@pytest.mark.parametrize("pattern", ["(.*.*.*.*.*.*.*.*)*#", "("])
def test_an_adapter_with_a_pattern_without_an_end(field, pattern, tmp_path):
    model = add_adapter(tiny.model("llama"), Lora(rank=2))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    given = {pattern: 3} if field in ("rank_pattern", "alpha_pattern") else [pattern] if field == "modules_to_save" else pattern
    more = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: given} | more))
    assert peft.PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"adapter_config.json: .*({SOON}|is not a regular expression)"):
        add_adapter(tiny.model("llama"), Lora(path=str(tmp_path)))


@pytest.mark.parametrize("field", ["llm_int8_skip_modules", "modules_to_not_convert"])
def test_a_model_in_4_bits_with_a_pattern_without_an_end(field, tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", field: ["lm_head", "(.*.*.*.*.*.*.*.*)*#"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": saved}))
    with pytest.raises(UserError, match=f"quantization_config: {SOON}"):
        meta_model(Config(model=Model(path=str(tmp_path)), method="qlora"))
