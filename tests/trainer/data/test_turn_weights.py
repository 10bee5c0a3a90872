"""Flags of turns: one weight in every spelling, in the mask, in the loss of a pack, and in what a run prints."""

import json

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from tests.helpers.chat_templates import read, tokenizer_for
from trainer.config import Config, Data
from trainer.data.batch import collate
from trainer.data.prepare import data_summary, note_lines, prepare_data
from trainer.errors import UserError
from trainer.training.loader import supervised_weight

TALK = [("user", "Name a colour."), ("assistant", "Seven."), ("user", "No, a colour."), ("assistant", "Blue.")]


def chat(first: dict | None = None, last: dict | None = None, **row) -> dict:
    messages = [{"role": role, "content": content} for role, content in TALK]
    messages[1] |= first or {}
    messages[3] |= last or {}
    return {"messages": messages, **row}


def prepared(rows, tmp_path, tokenizer=None, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Data(train=str(path), cache_dir=str(tmp_path / "cache"), num_proc=1, **data)
    return prepare_data(Config(data=options), tokenizer or tiny.tokenizer())


def answers(training, i: int = 0) -> list[str]:
    return [text for text, on in training.template.segments(*training.samples[i]) if on]


def notes(training) -> list[str]:
    return note_lines(data_summary(training, Config())["sources"])


OFF = [{"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"train": "false"}, {"trainable": False}, {"loss": False},
       {"loss": 0}, {"loss_mask": 0}, {"loss_weight": 0}, {"loss_scale": 0}, {"supervised": False}, {"weight": 0, "train": False}]


@pytest.mark.parametrize("flags", OFF, ids=json.dumps)
def test_a_turn_that_is_not_to_be_learnt_is_not_supervised(flags, tmp_path):
    training = prepared([chat(flags)], tmp_path)
    assert answers(training) == ["Blue.<|im_end|>"]
    assert "rows: weights of turns: 1 assistant turns are not trained on, 0 have another weight than 1" in notes(training)


@pytest.mark.parametrize("row", [{"loss_mask": [0, 0, 0, 1]}, {"loss_mask": [0, 1]}, {"train": [None, False, None, True]},
                                 {"weights": [1, 0, 1, 1]},
                                 {"weight": [0, 1]}, {"trainable": [False, True]}], ids=json.dumps)
def test_lists_of_a_row_are_flags_of_its_messages_or_answers(row, tmp_path):
    assert answers(prepared([chat(**row)], tmp_path)) == ["Blue.<|im_end|>"]


def test_sharegpt_has_them_too(tmp_path):
    row = {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TALK]}
    row["conversations"][1]["weight"] = 0
    assert answers(prepared([row], tmp_path)) == ["Blue.<|im_end|>"]


ON = [{"weight": 1}, {"train": True}, {"loss_mask": 1, "weight": 1.0}, {"weight": None}, {"loss": "1"}, {}]


@pytest.mark.parametrize("flags", ON, ids=json.dumps)
def test_a_turn_that_is_to_be_learnt_weighs_1(flags, tmp_path):
    training = prepared([chat(flags)], tmp_path)
    assert answers(training) == ["Seven.<|im_end|>", "Blue.<|im_end|>"] and training.samples.piece(0).turn_weights is None


BAD = [({"weight": 0, "train": True}, "turn 2: expected flags that agree on whether the turn is trained on, found weight 0, train true"),
       ({"weight": 0.5, "loss": 0}, "turn 2: expected flags that agree"),
       ({"weight": 0.5, "loss_weight": 0.25}, "turn 2: expected flags that agree"),
       ({"weight": -1}, "turn 2: weight: expected true, false or a number of 0 or more, found -1"),
       ({"train": "perhaps"}, 'turn 2: train: expected true, false or a number of 0 or more, found "perhaps"'),
       ({"weight": [1]}, "turn 2: weight: expected true, false or a number"),
       ({"weight": 1e39}, "turn 2: weight: expected a weight from 1e-06 to 1,000,000, found 1e+39"),
       ({"weight": 1e-30}, "turn 2: weight: expected a weight from 1e-06 to 1,000,000, found 1e-30")]


@pytest.mark.parametrize("flags, message", BAD, ids=[message for _, message in BAD])
def test_flags_that_contradict_or_are_none_are_one_line(flags, message, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared([chat(), chat(flags)], tmp_path)
    assert f"line 2: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_lists_that_fit_nothing_or_contradict_are_one_line(tmp_path):
    with pytest.raises(UserError,
                       match="line 1: loss_mask: expected a list of 4 flags, one for each message, or 2, one for each assistant turn"):
        prepared([chat(loss_mask=[0, 1, 1])], tmp_path)
    with pytest.raises(UserError, match="expected flags that agree"):
        prepared([chat({"weight": 0}, loss_mask=[0, 1, 0, 1])], tmp_path)


def test_a_number_of_a_row_is_no_flag(tmp_path):
    training = prepared([chat(loss=2.31, weight=0.5)], tmp_path)
    assert len(answers(training)) == 2 and training.samples.weights.tolist() == [0.5]
    assert "rows: nothing reads loss (1 rows)" in notes(training)


@pytest.mark.parametrize("marked", [False, True])
def test_fractions_weigh_the_loss_of_each_token(marked, tmp_path):
    tokenizer = tokenizer_for(read("qwen2_5_training")) if marked else tiny.tokenizer()
    tokenizer.chat_template = read("qwen2_5_training") if marked else tokenizer.chat_template
    training = prepared([chat({"weight": 0.25}, {"weight": 2}, weight=3.0), chat()], tmp_path, tokenizer)
    samples = training.samples
    batch = collate([samples.piece(0), samples.piece(1)])
    spans = np.split(batch.weights.numpy(), np.flatnonzero(np.diff(batch.weights.numpy())) + 1)
    assert [float(span[0]) for span in spans] == [0.75, 6.0, 1.0]
    assert batch.weight_sum == pytest.approx(supervised_weight(samples, np.array([0, 1])))
    assert torch.equal(batch.targets, collate([samples.piece(1)] * 2).targets)


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_windows_keep_the_weights_of_their_tokens(overlong, tmp_path):
    whole = prepared([chat({"weight": 0.25})], tmp_path).samples
    for limit in range(int(np.flatnonzero(whole[0][1])[0]) + 1, int(whole.lengths[0]), 5):
        samples = prepared([chat({"weight": 0.25})], tmp_path, max_length=limit, on_overlong=overlong).samples
        for i in range(len(samples)):
            assert collate([samples.piece(i)]).weight_sum == pytest.approx(samples.target_weights[i])


def test_masking_tokens_keeps_the_sum_of_weights_right(tmp_path):
    samples = prepared([chat({"weight": 0.25}), chat()], tmp_path).samples
    keep = np.arange(int(samples.supervised.sum())) % 3 != 0
    masked = samples.supervising(np.array([0, 1]), keep)
    for i in range(2):
        assert collate([masked.piece(i)]).weight_sum == pytest.approx(masked.target_weights[i])
    assert len({samples.fingerprint, prepared([chat(), chat()], tmp_path).samples.fingerprint}) == 2


def test_train_on_last_and_all(tmp_path):
    training = prepared([chat({"weight": 0.5}, {"weight": 0.25}), chat({"weight": 0})], tmp_path, train_on="last")
    assert answers(training, 0) == answers(training, 1) == ["Blue.<|im_end|>"]
    training = prepared([chat({"weight": 0}), chat({"weight": 0.5})], tmp_path, train_on="all")
    off, half = (training.template.segments(*training.samples[i]) for i in (0, 1))
    assert [text for text, on in off if not on][1:] == ["Seven.<|im_end|>"] and len(half) == 2
    assert sorted({*training.samples.piece(1).turn_weights}) == [0.0, 0.5, 1.0]
    row = chat()
    row["messages"][0]["weight"] = 0
    with pytest.raises(UserError, match=r"turn 1 \(user\): only the weight of an assistant's turn can be read beside data.train_on=all"):
        prepared([row], tmp_path, train_on="all")


def test_a_users_turn_that_is_to_be_learnt_is_told(tmp_path):
    row = chat()
    row["messages"][0]["train"] = True
    assert any("1 turns of users, tools or the system are marked to be trained on, and are not" in note for note in notes(prepared([row],
                                                                                                                                   tmp_path)))


def test_a_chat_whose_turns_all_weigh_nothing_is_counted(tmp_path):
    training = prepared([chat(), chat({"weight": 0}, {"weight": 0})], tmp_path)
    assert len(training.samples) == 1 and data_summary(training, Config())["sources"][0]["unsupervised"] == 1


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("row", [{"train": False}, {"loss_mask": 0}, {"trainable": "false"}, {"loss": False}, {"loss_weight": 0.0}],
                         ids=json.dumps)
def test_one_flag_of_a_row_is_that_of_all_its_turns(row, train_on, tmp_path):
    training = prepared([chat(), chat(**row)], tmp_path, train_on=train_on)
    assert len(training.samples) == 1 and data_summary(training, Config())["sources"][0]["unsupervised"] == 1


def test_flags_of_a_row_may_be_text_and_weigh(tmp_path):
    assert answers(prepared([chat(loss_mask="[0, 0, 0, 1]")], tmp_path)) == ["Blue.<|im_end|>"]
    assert {*prepared([chat(loss_weight=0.5)], tmp_path).samples.piece(0).turn_weights} == {0.0, 0.5}
    training = prepared([chat(train=True, loss=1)], tmp_path)
    assert len(answers(training)) == 2 and notes(training) == ["rows: nothing reads loss (1 rows)"]
