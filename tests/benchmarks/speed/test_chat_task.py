"""The training benchmarks' task is as stated, and its tokens are the trainer's."""

import json

import numpy as np
import pytest

from benchmarks.harness.synthetic_models import quiet
from benchmarks.speed import chat_task
from benchmarks.speed.chat_task import ANSWER_TOKENS, PROMPT_TOKENS, TOKENS_PER_STEP, check_tokens, make_task
from trainer.errors import UserError


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    quiet()
    return make_task(tmp_path_factory.mktemp("task"))


def test_synthetic_chats_have_the_stated_lengths(task):
    lengths = np.array([len(ids) for ids, _ in task.samples])
    supervised = sum(mask.sum() for _, mask in task.samples) / lengths.sum()
    assert len(lengths) == 500 and abs(lengths.mean() - 122) < 1.5 and abs(supervised - 0.45) < 0.01
    batches = lengths[:496].reshape(62, 8)
    assert 0.48 < 1 - batches.sum() / (8 * batches.max(1)).sum() < 0.58  # padding, at batches of 8
    assert lengths.max() <= TOKENS_PER_STEP


def test_tokens_and_mask_of_a_chat(task):
    ids, supervised = chat_task.tokenized(task.tokenizer, "w1 w2", "w3")
    assert task.tokenizer.convert_ids_to_tokens(ids) == [
        "<|im_start|>", "user", "w1", "w2", "<|im_end|>", "<|im_start|>", "assistant", "w3", "<|im_end|>"]
    assert supervised.tolist() == [False] * 7 + [True] * 2


def test_the_trainer_makes_the_same_tokens(task):
    check_tokens(task)
    ids, supervised = task.samples[3]
    task.samples[3] = ids, ~supervised
    with pytest.raises(AssertionError, match="chat 3"):
        check_tokens(task)
    task.samples[3] = ids, supervised


def test_chats_of_equal_lengths(tmp_path):
    made = make_task(tmp_path, "equal", count=24)
    lengths = {len(ids) for ids, _ in made.samples}
    assert lengths == {PROMPT_TOKENS + ANSWER_TOKENS + 6} and "equal" in made.description
    assert 8 * lengths.pop() <= TOKENS_PER_STEP  # a padded batch and a pack hold as many


def problems(path, count=5):
    path.write_text("\n".join(json.dumps({"question": f"What is {i}?", "answer": f"It is {i}."}) for i in range(count)))
    return path


def test_gsm8k_from_a_file(tmp_path):
    made = make_task(tmp_path / "made", "gsm8k", path=problems(tmp_path / "set.jsonl"), count=3)
    text = made.tokenizer.decode(made.samples[0][0])
    assert text.startswith("<|im_start|>user\nWhat is ") and text.endswith("<|im_end|>\n")
    check_tokens(made)
    for content, complaint in (("{}\n" * 5, "question and answer"), (json.dumps({"question": "a", "answer": "b"}), "at least 3")):
        (tmp_path / "set.jsonl").write_text(content)
        with pytest.raises(UserError, match=complaint):
            chat_task.gsm8k_chats(tmp_path / "set.jsonl", 3, 0)
    with pytest.raises(UserError, match="found no file"):
        chat_task.gsm8k_chats(tmp_path / "absent.jsonl", 3, 0)


def test_gsm8k_from_the_hub(monkeypatch):
    import datasets

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: calls.append((words, options)) or [
        {"question": f"What is {i}? ", "answer": "It."} for i in range(4)])
    chats, texts = chat_task.gsm8k_chats(None, 2, 0)
    assert calls == [(("openai/gsm8k", "main"), {"split": "train"})] and len(chats) == 2 and "What is 3?" in texts

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"--data: cannot load openai/gsm8k from the hub \(no route\); give --data a file"):
        chat_task.gsm8k_chats(None, 2, 0)
