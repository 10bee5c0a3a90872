"""The training suite compares contenders with those of their dtype, and its agreement check can fail."""

import argparse

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import show
from benchmarks.harness.model_shapes import CPU_MODELS
from benchmarks.harness.suite import view_of
from benchmarks.harness.synthetic_models import model_config, quiet
from benchmarks.speed import training
from benchmarks.speed.chat_task import make_task, steadfast
from benchmarks.speed.contenders import agreement
from benchmarks.suites import VIEWS
from trainer.errors import UserError
from trainer.runtime.device import fast_bf16

PLAIN, PACKED = training.PLAIN, "HF loop, packed, fp32"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    quiet()
    return make_task(tmp_path_factory.mktemp("task"), count=40)


def arguments(*words):
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, kind in training.OTHERS.items() if kind.dtype == "fp32" and "compile" not in name])
def test_losses_agree_with_the_other_contenders(task, name):
    assert agreement(steadfast(task, "fp32", 2), training.OTHERS[name].make(task), 2, "fp32", name) < 1e-5


@pytest.mark.skipif(not fast_bf16(), reason="bf16 is slow on this CPU")
@pytest.mark.parametrize("name", [name for name, kind in training.OTHERS.items() if kind.dtype == "bf16"])
def test_losses_in_bf16_agree_with_the_other_contenders(task, name):
    assert agreement(steadfast(task, "bf16", 2), training.OTHERS[name].make(task), 2, "bf16", name) < 2e-2


@pytest.mark.slow
def test_the_record_of_a_short_run():
    """Every row has ratios to the loops of its own dtype, and no other."""
    made = training.run(arguments("--chats", "equal", "--quick", "--compared", "1", "--dtypes", "fp32", "--contenders", PLAIN, PACKED))
    ours = training.ours("fp32")
    assert made["suite"] == "training-cpu-equal" and made["agreement"].keys() == {PLAIN, PACKED}
    rows = {row["contender"]: row for row in made["summary"]}
    assert rows[ours]["ratio"].keys() == {"plain", "packed"} and rows[PLAIN]["ratio"].keys() == {"packed"}
    assert rows[ours + " (A/A)"]["ratio"].keys() == {"Steadfast"} and rows[ours]["ratio_fp32"] is None
    assert rows[PACKED]["padding"] == rows[ours]["padding"] == 0
    for name in (PLAIN, ours):
        spent = made["conditions"]["phases"][name]
        assert set(spent) == {"data", "forward", "backward", "optimizer"} and sum(spent.values()) == pytest.approx(1)
        assert spent["forward"] + spent["backward"] > 0.5
    text = show.markdown(made, view_of(made, VIEWS))
    assert f"| {PACKED} |" in text and "| × plain | × packed |" in text and "TRL packed, Liger (liger-kernel is not installed)" in text


def test_a_row_is_compared_with_the_faster_loop_of_its_dtype():
    rates = {"plain HF loop, fp32": 1.0, "plain HF loop, bf16": 3.0, "plain HF loop, autocast": 2.0, "HF loop, packed, bf16": 1.5,
             "HF loop, packed, autocast": 4.0, "Steadfast, bf16": 9.0, "HF loop, checkpointing, fp32": 7.0}
    assert training.bases_of(rates) == {
        "fp32": {"plain": "plain HF loop, fp32"}, "bf16": {"plain": "plain HF loop, bf16", "packed": "HF loop, packed, autocast"}}


@pytest.mark.parametrize(("method", "name", "left_out"), [("full", "plain HF loop, bf16", True), ("lora", "plain HF loop, bf16", False),
                                                          ("full", "plain HF loop, fp32", False)])
def test_only_bf16_weights_without_masters_may_drift(task, monkeypatch, method, name, left_out):
    def differ(*_):
        raise AssertionError("losses differ by 0.5, more than 0.1")

    monkeypatch.setattr(training, "agreement", differ)
    monkeypatch.setattr(training, "steadfast", lambda *_: None)
    monkeypatch.setitem(training.OTHERS, name, training.Kind(lambda task: None, training.OTHERS[name].dtype, "plain"))
    monkeypatch.setattr(task, "method", method)
    if left_out:
        assert training.agreements(task, [name], 1) == ({}, {name: "losses differ by 0.5"})
    else:
        with pytest.raises(AssertionError):
            training.agreements(task, [name], 1)


def test_the_models_are_as_large_as_they_say():
    with torch.device("meta"):
        sizes = {name: AutoModelForCausalLM.from_config(model_config(shape)).num_parameters() for name, shape in CPU_MODELS.items()}
    assert sizes == {"7m": 7_145_728, "100m": pytest.approx(101e6, rel=0.01)}


@pytest.mark.parametrize(("words", "complaint"), [
    (["--contenders", "other"], "--contenders: expected names of plain HF loop, fp32; .* got other"),
    (["--compared", "0"], "--compared: expected at least 1 step, got 0"),
    (["--data", "x.jsonl"], "--data: expected --chats gsm8k beside it, got --chats tailed")])
def test_mistakes_are_named(words, complaint):
    with pytest.raises(UserError, match=complaint):
        training.run(arguments(*words))


@pytest.mark.slow
def test_a_different_model_is_noticed(task):
    other = training.OTHERS[PLAIN].make(task)
    for parameter in other.trained:
        parameter.data.add_(0.02)
    with pytest.raises(AssertionError, match="differ by"):
        agreement(steadfast(task, "fp32", 2), other, 2, "fp32", PLAIN)
