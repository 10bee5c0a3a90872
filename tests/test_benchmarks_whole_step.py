"""The whole-step checks: what a CPU can run of them here, all of it on a GPU."""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
from benchmarks import whole_step
from benchmarks.predict import Model
from benchmarks.whole_step import check_capture, check_compile, fill, packed, packed_loss, padded, patched, random_samples, same_shapes
from tests.kernels import DEVICE, runs_triton, triton_mode

TINY = Model("tiny", 64, 112, 4, 2, 16, 257, 2)
CPU = torch.device("cpu")


@runs_triton
def test_one_step_of_the_kernels_compiles_into_one_graph():
    torch._dynamo.reset()
    with triton_mode():
        outcome = check_compile(DEVICE, torch.float32, dataclasses.replace(TINY, layers=1), backend="aot_eager", packs=([5, 7], [9, 3, 4]))
    assert outcome["passed"], outcome
    assert outcome["differences"]["loss"] < 1e-5 and outcome["differences"]["gradients"] < 1e-4


def test_a_compiled_step_that_is_wrong_does_not_pass(monkeypatch):
    """The second loss of each pair, the eager one, is made slightly larger."""
    losses = iter([1.0, 1.001] * 2)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(whole_step, "packed_loss", lambda model, batch: packed_loss(model, batch) * next(losses))
    assert not check_compile(CPU, torch.float32, TINY)["passed"]


def test_both_loops_train_alike_and_their_rates_are_compared():
    outcome = whole_step.throughput(CPU, torch.float32, TINY, mean=30, rounds=2)
    assert outcome["passed"] and outcome["difference"] < 1e-5
    rates = {name: rate["value"] for name, rate in outcome["tokens_per_second"].items()}
    assert outcome["ratio"]["value"] == pytest.approx(rates["Steadfast"] / rates["plain HF loop"])
    assert outcome["padding"]["Steadfast"] == 0 < outcome["padding"]["plain HF loop"]


def test_losses_that_differ_do_not_pass(monkeypatch):
    monkeypatch.setattr(whole_step, "packed_loss", lambda model, batch: 1.001 * packed_loss(model, batch))
    assert not whole_step.throughput(CPU, torch.float32, TINY, mean=20, rounds=2)["passed"]


def test_rivals_are_compared_before_they_are_timed():
    """On a CPU there is no line with Liger's kernels, and the outcome says why."""
    outcome = whole_step.rivals(CPU, torch.float32, TINY, mean=20, rounds=2)
    timed = ["Steadfast", "HF loop, packed", "TRL packed"]
    assert outcome["passed"] and set(outcome["tokens_per_second"]) == set(timed) and set(outcome["ratio"]) == set(timed[1:])
    assert max(outcome["differences"].values()) < 1e-5
    assert outcome["outcomes"] == dict.fromkeys(timed, "timed") | {"TRL packed, Liger": outcome["outcomes"]["TRL packed, Liger"]}
    assert outcome["outcomes"]["TRL packed, Liger"] in ("liger-kernel is not installed", "its kernels need a GPU")
    assert {s["padding"] for line in outcome["raw"].values() for s in line} == {0}


def test_a_rival_that_fails_or_disagrees_is_named(monkeypatch):
    class Failing(whole_step.Flat):
        def step(self):
            raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setattr(whole_step, "Flat", Failing)
    monkeypatch.setattr(whole_step, "packed_loss", lambda model, batch: 1.001 * packed_loss(model, batch))  # ours and the reference alike
    outcome = whole_step.rivals(CPU, torch.float32, TINY, mean=20, rounds=2)
    assert not outcome["passed"] and outcome["outcomes"]["HF loop, packed"] == "out of memory"
    assert outcome["outcomes"]["TRL packed"].startswith("disagrees: 1.0e-03") and set(outcome["tokens_per_second"]) == {"Steadfast"}


def test_padded_and_packed_say_the_same():
    samples = random_samples([5, 9], 50, seed=1)
    batch, pack = padded(samples, CPU), packed(samples, CPU)
    assert batch["attention_mask"].sum(1).tolist() == [5, 9] and batch["input_ids"].shape == (2, 9)
    supervised = batch["labels"] != -100
    assert batch["labels"][supervised].tolist() == pack.targets.tolist()
    assert batch["input_ids"][batch["attention_mask"].bool()].tolist() == pack.input_ids.tolist()


def test_packs_for_a_captured_graph_differ_in_contents_alone():
    batches = same_shapes(6, 257, CPU)
    assert len({batch.tokens for batch in batches}) == len({len(b.targets) for b in batches}) == len({b.max_seqlen for b in batches}) == 1
    assert all(batch.cu_seqlens.diff().max() <= batch.max_seqlen for batch in batches)
    assert len({tuple(batch.cu_seqlens.tolist()) for batch in batches}) == 4
    static, model = packed(random_samples([128, 128, 128], 257, 9), CPU), patched(whole_step.make_model(TINY, CPU, torch.float32))
    static = dataclasses.replace(
        static, max_seqlen=256, weight_sum=batches[0].weight_sum,
        **{name: getattr(static, name)[: len(batches[0].targets)] for name in ("supervised_rows", "targets", "weights")})
    fill(static, batches[1])
    assert packed_loss(model, static).item() == packed_loss(model, batches[1]).item() != packed_loss(model, batches[0]).item()


def test_lengths_are_long_tailed():
    lengths = np.array(whole_step.long_tailed(4000, 400, 1600, 0))
    assert 330 < lengths.mean() < 410 and np.median(lengths) < 320 and lengths.max() == 1600


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("check", [check_compile, check_capture])
def test_on_a_gpu(check):
    outcome = check(DEVICE, torch.bfloat16)
    assert outcome["passed"], outcome
