"""The suite's setting is the one it states, and its agreement check can fail."""

import json

import numpy as np
import pytest

from benchmarks import training
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


def test_losses_agree_with_both_baselines(setting, few_steps):
    assert training.agreement(setting, "fp32", training.plain_loop(setting)) < 1e-5
    assert training.agreement(setting, "fp32", training.trl(setting, training.packed_batches(1024))) < 1e-5


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
