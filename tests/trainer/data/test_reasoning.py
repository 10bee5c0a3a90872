"""Reasoning: under the key that a template prints, dropped where it drops it, and told where it is missing or not printed."""

import json

import pytest

from tests.helpers.chat_templates import read, tokenizer_for
from trainer.config import Config, Data
from trainer.data.prepare import data_summary, note_lines, prepare_data

USER = {"role": "user", "content": "2+2?"}
THOUGHT = "two and two"


def answer(content: str = "4", **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def prepared(name, tmp_path, *chats, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = tokenizer_for(read(name))
    tokenizer.chat_template = read(name)
    training = prepare_data(Config(data=Data(train=str(path), cache_dir=str(tmp_path / "cache"), num_proc=1, **data)), tokenizer)
    trained = [[text for text, on in training.template.segments(*training.samples[i]) if on] for i in range(len(training.samples))]
    return trained, " ".join(note_lines(data_summary(training, Config())["sources"]))


PRINTED = {
    "qwen3": f"<think>\n{THOUGHT}\n</think>\n\n4<|im_end|>", "qwen3_6": f"<think>\n{THOUGHT}\n</think>\n\n4<|im_end|>",
    "gptoss": f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
    "gemma4_v5": f"<|channel>thought\n{THOUGHT}\n<channel|>4<turn|>",
}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("name", PRINTED)
def test_reasoning_is_printed_whatever_its_key(name, key, tmp_path):
    trained, notes = prepared(name, tmp_path, [USER, answer(**{key: THOUGHT})])
    assert trained == [[PRINTED[name]]] and notes == "rows: reasoning: in 1 turns of 1 chats"


def test_reasoning_that_no_template_prints_is_told(tmp_path):
    trained, notes = prepared("llama3_1", tmp_path, [USER, answer(thinking=THOUGHT)])
    assert trained == [["4<|eot_id|>"]]
    assert "WARNING: the template does not print the reasoning of the last turn of 1 chats, which train on their answers alone" in notes


@pytest.mark.parametrize("name", PRINTED)
def test_earlier_reasoning_is_left_out_as_the_template_does_it(name, tmp_path):
    trained, notes = prepared(name, tmp_path, [USER, answer("3", reasoning="an early thought"), USER, answer(reasoning=THOUGHT)])
    first, last = trained[0]
    assert last == PRINTED[name] and "early" not in first and "3" in first
    assert "reasoning: in 2 turns of 1 chats; the template leaves out that of 1 earlier turns, as it does when the model is used" in notes


@pytest.mark.parametrize("name, warns", [("qwen3", True), ("qwen3_6", True), ("gptoss", True), ("gemma4_v5", False), ("llama3_1", False),
                                         ("qwen2_5", False), ("qwen3_instruct_2507", False)])
def test_answers_without_reasoning_are_told_where_the_model_reasons(name, warns, tmp_path):
    _, notes = prepared(name, tmp_path, [USER, answer()])
    assert ("the last answer of 1 chats has none" in notes) == warns
    if name in ("qwen3", "qwen3_6"):
        assert "the empty block before it is trained on (data.empty_reasoning=train)" in notes
        assert prepared(name, tmp_path, [USER, answer()], template_kwargs={"enable_thinking": False})[1] == ""
        assert prepared(name, tmp_path, [USER, answer("<think>\nso\n</think>\n\n4")])[1] == ""


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "qwen3_6_training"])
def test_the_empty_block_is_supervised_or_not(name, tmp_path):
    assert prepared(name, tmp_path, [USER, answer()])[0] == [["<think>\n\n</think>\n\n4<|im_end|>" + ("\n" if "training" in name else "")]]
    masked, notes = prepared(name, tmp_path, [USER, answer()], empty_reasoning="mask")
    assert [[text.strip() for text in masked[0]]] == [["4<|im_end|>"]] and "is not trained on (data.empty_reasoning=mask)" in notes
    assert "two and two" in prepared(name, tmp_path, [USER, answer(reasoning=THOUGHT)], empty_reasoning="mask")[0][0][0]


def test_a_template_that_refuses_a_question_alone_still_serves(tmp_path):
    tokenizer = tokenizer_for(read("qwen3"))
    tokenizer.chat_template = "{% if messages|length < 2 %}{{ raise_exception('too short') }}{% endif %}" + read("qwen3_training")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, answer()]}) + "\n")
    assert len(prepare_data(Config(data=Data(train=str(path), cache_dir=str(tmp_path / "cache"))), tokenizer).samples) == 1


def test_a_developers_message_is_the_systems_where_a_template_knows_no_other(tmp_path):
    for name, printed in (("qwen3", "<|im_start|>system\nBe brief."), ("gemma4_v5", "<|turn>system\nBe brief."),
                          ("llama3_1", "developer<|end_header_id|>\n\nBe brief.")):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"messages": [{"role": "developer", "content": "Be brief."}, USER, answer()]}) + "\n")
        tokenizer = tokenizer_for(read(name))
        tokenizer.chat_template = read(name)
        training = prepare_data(Config(data=Data(train=str(path), cache_dir=str(tmp_path / "cache"))), tokenizer)
        assert printed in tokenizer.decode(training.samples[0][0])
