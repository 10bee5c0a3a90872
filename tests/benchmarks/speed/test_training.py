"""The suite's setting is the one it states, and its agreement check can fail."""

import argparse
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import plot
from benchmarks.speed import training
from trainer.errors import UserError


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    training.quiet()
    return training.make_setting(tmp_path_factory.mktemp("setting"), None)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(training, "AGREEMENT_STEPS", 2)


def test_synthetic_chats_have_the_stated_lengths(setting):
    lengths = np.array([len(ids) for ids, _ in setting.samples])
    supervised = sum(mask.sum() for _, mask in setting.samples) / lengths.sum()
    assert len(lengths) == 500 and abs(lengths.mean() - 122) < 1.5 and abs(supervised - 0.45) < 0.01
    batches = lengths[:496].reshape(62, 8)
    assert 0.48 < 1 - batches.sum() / (8 * batches.max(1)).sum() < 0.58  # padding, at batches of 8
    assert lengths.max() <= training.TOKENS_PER_STEP


def test_tokens_and_mask_of_a_chat(setting):
    ids, supervised = training.tokenized(setting.tokenizer, "w1 w2", "w3")
    assert setting.tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>", "user", "w1", "w2", "<|im_end|>", "<|im_start|>", "assistant", "w3", "<|im_end|>"]
    assert supervised.tolist() == [False] * 7 + [True] * 2


def test_the_trainer_makes_the_same_tokens(setting):
    training.check_tokens(setting)
    ids, supervised = setting.samples[3]
    setting.samples[3] = ids, ~supervised
    with pytest.raises(AssertionError, match="chat 3"):
        training.check_tokens(setting)
    setting.samples[3] = ids, supervised


@pytest.mark.parametrize("name", [training.PLAIN, "HF loop, like lengths", "HF loop, packed", "HF loop, checkpointing",
                                  training.TRL_PADDED, training.TRL_PACKED])
def test_losses_agree_with_the_other_lines(setting, few_steps, name):
    assert training.agreement(setting, "fp32", training.OTHERS[name](setting)) < 1e-5


def test_chats_of_equal_lengths(tmp_path):
    made = training.make_setting(tmp_path, None, "equal")
    lengths = {len(ids) for ids, _ in made.samples}
    assert lengths == {training.PROMPT_TOKENS + training.ANSWER_TOKENS + 6} and "equal" in made.data
    assert 8 * lengths.pop() <= training.TOKENS_PER_STEP  # a padded batch and a pack hold as many


def test_the_record_of_a_short_run(monkeypatch, tmp_path):
    """Every row says what it is measured against: the lines that tables always show, and the fastest of the others."""
    monkeypatch.setattr(training, "AGREEMENT_STEPS", 1)
    monkeypatch.setattr(training, "CHATS", 24)
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    monkeypatch.setattr(training, "fast_bf16", lambda: False)
    names = [training.PLAIN, "HF loop, packed"]
    made = training.run(parser.parse_args(["--lengths", "equal", "--rounds", "2", "--steps", "1", "--lines", *names]))
    assert made["suite"] == "training-cpu-equal" and set(made["agreement"]) >= {f"{training.FP32} / {name}" for name in names}
    rows = {row["line"]: row for row in made["summary"]}
    fastest = max(names, key=lambda name: rows[name]["tokens_per_cpu_second"]["value"])
    assert set(rows[training.FP32]["ratio"]) == {training.PLAIN, fastest} and set(names) < set(rows)
    assert rows["HF loop, packed"]["padding"] == rows[training.FP32]["padding"] == 0
    table = plot.markdown(made)
    assert "| HF loop, packed |" in table and f"× {training.PLAIN}" in table and "× TRL" not in table
    for name in (training.PLAIN, training.FP32):
        spent = made["conditions"]["phases"][name]
        assert set(spent) == {"data", "forward", "backward", "optimizer"} and sum(spent.values()) == pytest.approx(1)
        assert spent["forward"] + spent["backward"] > 0.5
    assert "Time by phase, wall: plain HF loop: data " in table
    assert "No line of TRL packed, Liger: liger-kernel is not installed." in table


def test_the_larger_model_is_as_large_as_it_says():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(vocab_size=training.VOCABULARY, **shape)).parameters())
                 for name, shape in training.MODELS.items()}
    assert sizes == {"7m": 7_145_728, "100m": pytest.approx(101e6, rel=0.01)}


def test_unknown_lines_and_contradictions():
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    with pytest.raises(UserError, match="--lines: expected names of plain HF loop, .* got other"):
        training.run(parser.parse_args(["--lines", "other"]))
    with pytest.raises(UserError, match="--compared: expected 1 step or more, got 0"):
        training.run(parser.parse_args(["--compared", "0"]))
    with pytest.raises(UserError, match="--lengths equal: a real set's chats have lengths of their own"):
        training.run(parser.parse_args(["--lengths", "equal", "--data", "x.jsonl"]))


def test_a_different_model_is_noticed(setting, few_steps):
    other = training.plain_loop(setting)
    for parameter in other.trained:
        parameter.data.add_(0.02)
    with pytest.raises(AssertionError, match="differ by"):
        training.agreement(setting, "fp32", other)


def test_real_chats(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHATS", 3)
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"What is {i}?", "answer": f"It is {i}."}) for i in range(5)))
    made = training.make_setting(tmp_path / "made", path)
    text = made.tokenizer.decode(made.samples[0][0])
    assert text.startswith("<|im_start|>user\nWhat is ") and text.endswith("<|im_end|>\n")
    training.check_tokens(made)
    for content, complaint in (("{}\n" * 5, "question and answer"), (json.dumps({"question": "a", "answer": "b"}), "at least 3")):
        path.write_text(content)
        with pytest.raises(UserError, match=complaint):
            training.real_chats(path, 0)
    with pytest.raises(UserError, match="found no file"):
        training.real_chats(tmp_path / "absent.jsonl", 0)
