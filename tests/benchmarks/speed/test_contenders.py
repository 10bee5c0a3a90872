"""The contender called Steadfast is the trainer: its losses are a run's own, from a configuration and from memory."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness.model_shapes import ModelShape
from benchmarks.harness.synthetic_models import adapted, log_normal_lengths, quiet, random_samples, stock_model
from benchmarks.speed import contenders
from benchmarks.speed.baselines import Batching, padded_loop
from benchmarks.speed.chat_task import make_task, run_options, steadfast
from trainer.config import Logging
from trainer.run import train

TINY = ModelShape("tiny", 64, 112, 4, 2, 16, 257, 2)
CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module", params=["lora", "full"])
def task(request, tmp_path_factory):
    quiet()
    return make_task(tmp_path_factory.mktemp("task"), method=request.param, count=40)


@pytest.mark.slow
def test_its_losses_are_those_of_a_run_bit_for_bit(task):
    config = run_options(task, "fp32", STEPS)
    config = replace(config, logging=Logging(every=1, tensorboard=False, progress=False))
    train(config)
    rows = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    of_the_run = [(row["loss"], row["tokens"], row["supervised"]) for row in rows if row["kind"] == "step"]
    one = steadfast(task, "fp32", STEPS)
    steps = [one.step() for _ in range(STEPS)]
    assert [(float(step.loss), step.tokens, step.supervised) for step in steps] == of_the_run and len(of_the_run) == STEPS


def samples_of(count=24):
    return random_samples(log_normal_lengths(count, 20, np.random.default_rng(0), longest=60), TINY.vocabulary, seed=0)


def test_in_memory_it_trains_on_all_samples_and_its_loss_falls():
    samples = samples_of()
    one = contenders.in_memory(adapted(stock_model(TINY, CPU, torch.float32)), samples, 96, 1e-2)
    steps = [one.step() for _ in range(30)]
    assert all(step.tokens <= 96 and step.padding == 0 for step in steps)
    epoch, seen = sum(len(ids) for ids, _ in samples), np.cumsum([step.tokens for step in steps])
    assert epoch in seen.tolist()
    assert float(steps[-1].loss) < float(steps[0].loss)


def test_in_memory_and_the_plain_loop_agree_over_steps():
    samples = samples_of()
    ours = contenders.in_memory(adapted(stock_model(TINY, CPU, torch.float32)), samples, 96, 1e-3)
    plain = padded_loop(adapted(stock_model(TINY, CPU, torch.float32)), samples, Batching(samples=6), 1e-3)
    assert contenders.agreement(ours, plain, 5, "fp32", "the plain loop") < 1e-5


def test_a_loss_without_a_step_changes_nothing():
    samples = samples_of()
    one = contenders.in_memory(adapted(stock_model(TINY, CPU, torch.float32)), samples, 96, 1e-3)
    first = float(one.loss_on(samples[:3]))
    assert first == float(one.loss_on(samples[:3])) == pytest.approx(float(one.step_on(samples[:3]).loss), rel=1e-6)
    assert first != float(one.loss_on(samples[:3]))


def test_other_samples_take_the_place_of_the_first():
    one = contenders.in_memory(adapted(stock_model(TINY, CPU, torch.float32)), samples_of(), 96, 1e-3)
    one.use(random_samples([70], TINY.vocabulary, 1), 70)
    assert [one.step().tokens for _ in range(3)] == [70] * 3


def test_losses_that_differ_are_an_error():
    with pytest.raises(AssertionError, match="losses of Steadfast and the loop differ by 1.0e-02 in fp32, more than 1e-04"):
        contenders.require_agreement([1.0, 2.02], [1.0, 2.0], "fp32", "the loop")
    with pytest.raises(AssertionError, match="differ by nan"):
        contenders.require_agreement([float("nan")], [1.0], "bf16", "the loop")
    assert contenders.require_agreement([1.01], [1.0], "bf16", "the loop") == pytest.approx(0.01)
