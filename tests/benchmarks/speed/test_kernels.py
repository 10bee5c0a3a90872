"""The kernel benchmark, run on tiny shapes on a CPU: every case, what is done with lines that fail, and what a record holds."""

import argparse
import importlib.util
import json
import math
import time
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import gpu_timing, show, timing
from benchmarks.harness.gpu_timing import FEWEST, Clock, distance, rounds_of, tried
from benchmarks.harness.model_shapes import MODELS
from benchmarks.harness.suite import view_of
from benchmarks.speed import kernel_cases, kernel_predictions, kernels
from benchmarks.speed.kernel_cases import BARE, CASES, COMPILED, EAGER, IGNORED, OURS, RANDOM, Source
from benchmarks.speed.kernel_predictions import OPERATIONS
from benchmarks.speed.kernels import AGAIN, TINY, TINY_TOKENS, compare, run
from benchmarks.suites import VIEWS
from trainer.errors import UserError

CPU = torch.device("cpu")


def markdown(record):
    return show.markdown(record, view_of(record, VIEWS))


def arguments(*words):
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def measured():
    """A record of every case, and how many rows were kept on the way."""
    kept = []
    done = run(arguments("--device", "cpu", "--smoke", "--no-compile"), keep=lambda record: kept.append(len(record["summary"])))
    return done, kept


def test_every_operation_is_timed_and_agrees_with_plain_torch(measured):
    record, kept = measured
    assert CASES.keys() == OPERATIONS.keys()
    for operation in CASES:
        rows = {row["contender"]: row for row in record["summary"] if row["operation"] == operation}
        assert rows.keys() >= {OURS, EAGER}, operation
        assert rows[OURS]["outcome"] == rows[EAGER]["outcome"] == "timed" and rows[OURS]["ms"]["value"] > 0, rows
        assert record["agreement"][f"{operation}, {TINY.name}: {OURS}"] < 1e-4, operation
        assert (BARE in rows) == (operation in RANDOM) and (AGAIN in rows) == (operation == "RMSNorm")
        assert rows[EAGER]["ratio"][OURS]["low"] <= rows[EAGER]["ratio"][OURS]["value"] <= rows[EAGER]["ratio"][OURS]["high"]
        assert len(record["raw"][f"{operation}, {TINY.name}: {OURS}"]) == 2
    assert kept == sorted(set(kept)) and len(kept) == len(CASES) and kept[-1] == len(record["summary"])
    assert record["device"] == "cpu" and record["suite"] == "kernels-smoke"
    json.dumps(record, allow_nan=False)


def test_the_table_has_every_row(measured):
    record, _ = measured
    table = markdown(record).splitlines()
    assert len([line for line in table if line.startswith("|")]) == 2 + len(record["summary"])
    assert any(line.startswith(f"| RMSNorm | tiny | {OURS} | ") for line in table)


@pytest.mark.slow
def test_records_have_tables_and_pictures(measured, tmp_path):
    record, _ = measured
    whole = record | {"suite": "gpu", "parts": {"tests": {"outcome": "passed", "seconds": 7.0}, "kernels": {"outcome": "out of time",
                                                                                                         "record": record}}}
    cut_short = whole | {"parts": {"tests": {"outcome": "interrupted"}}}
    assert markdown(whole).startswith("| check | outcome |") and "| tests | interrupted (0 s) |" in markdown(cut_short)
    predicted = run(arguments("--predict"))
    full = show.markdown(predicted, kernel_predictions.FULL_VIEW)
    assert markdown(predicted).count("\n| GLU |") == 1 < full.count("\n| GLU |") == 3
    for i, made in enumerate((record, whole, cut_short, predicted)):
        assert show.draw(made, view_of(made, VIEWS), tmp_path / f"{i}.png").stat().st_size > 1000


def test_torch_compile_is_timed_beside_ours_in_rounds_of_its_own(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    record = run(arguments("--device", "cpu", "--smoke", "--operations", "GLU", "LoRA QKV"))
    assert [(r["operation"], r["contender"]) for r in record["summary"]] == [
        ("GLU", OURS), ("GLU", EAGER), ("LoRA QKV", OURS), ("LoRA QKV", EAGER), ("LoRA QKV", BARE), ("GLU", COMPILED),
        ("LoRA QKV", COMPILED)]
    assert len(compiled) == 4  # for comparing, without dropout, and for timing
    assert f"GLU, {TINY.name}: {OURS} beside torch.compile" in record["raw"]


def test_cases_that_do_not_fit_the_time_are_named():
    record = run(arguments("--device", "cpu", "--smoke", "--operations", "GLU", "RoPE", "--budget", "0"))
    assert record["conditions"]["skipped"] == [f"{name}, tiny{how}" for how in ("", ", torch.compile") for name in ("GLU", "RoPE")]
    assert not record["summary"] and "Not reached in the time given: GLU, tiny" in markdown(record)


@pytest.mark.parametrize(("words", "message"), [
    (("--operations", "GRU", "--device", "cpu"), "--operations: expected names of .*, got GRU"),
    (("--operations", "GLU", "GRU", "--device", "cpu", "--smoke"), "--operations: expected names of .*, got GRU"),
])
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        run(arguments(*words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys, tmp_path):
    assert kernels.main(["--device", "cuda", "--out", str(tmp_path / "record.json")]) == 2
    assert capsys.readouterr().err == ("benchmarks.speed.kernels: kernels: expected a GPU, found none; --predict says what to expect of "
                                       "one\n")


def test_unknown_models_are_named():
    with pytest.raises(UserError, match="--models: expected names of Llama-3.1-8B; .*, got GPT-2"):
        kernels.chosen_models(["GPT-2"])
    assert kernels.chosen_models([MODELS[1].name]) == (MODELS[1],)


def test_predictions_need_no_gpu():
    record = run(arguments("--predict"))
    assert record["suite"] == "kernels-predicted" and "Qwen3-4B" in show.markdown(record, kernel_predictions.FULL_VIEW)


# ---------------------------------------------------------------- inputs


def test_hidden_states_are_as_sure_of_themselves_as_a_trained_models():
    source = Source(CPU, torch.float32)
    weight, target = source(8192, 64, scale=64**-0.5), source.integers(8192, 400)
    loss = F.cross_entropy(kernel_cases.hidden_states(source, weight, target) @ weight.T, target)
    uniform = F.cross_entropy(source(400, 64) @ weight.T, target)
    assert 0.3 < loss < 3 and uniform > 0.9 * math.log(8192)


def test_one_seed_gives_the_same_inputs_and_half_are_ignored():
    first, second = (CASES["linear CE, half ignored"](Source(CPU, torch.float32), TINY, 400) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.inputs, second.inputs, strict=True))
    gradient, = torch.autograd.grad(first.forwards[EAGER](*first.inputs), first.inputs[0])
    assert 140 < (gradient == 0).all(1).sum() < 260


@pytest.mark.parametrize("operation", CASES)
def test_no_contender_writes_what_the_next_one_reads(operation):
    setup = CASES[operation](Source(CPU, torch.float32), TINY, TINY_TOKENS)
    before = [t.detach().clone() for t in setup.inputs]
    upstream = []
    for forward in setup.forwards.values():
        kernels.results_and_gradients(forward, setup.inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(before, setup.inputs, strict=True))


# ---------------------------------------------------------------- libraries


def test_libraries_are_called_as_they_are_meant_to_be(monkeypatch):
    """Stand-ins with the signatures of Liger 0.8 and CCE 25.9, which compute what those do."""
    class Liger:
        def __init__(self, ignore_index=-100, reduction="mean"):
            self.reduction = reduction

        def __call__(self, lin_weight, _input, target, bias=None):
            return F.cross_entropy(F.linear(_input, lin_weight), target, reduction=self.reduction)

    class LigerNorm:
        @staticmethod
        def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
            assert not in_place, "would write over the upstream gradient"
            return kernel_cases.plain_norm(X, W)

    def cce(e, c, targets, bias=None, ignore_index=IGNORED, softcap=None, reduction="mean"):
        return F.cross_entropy(F.linear(e, c), targets, ignore_index=ignore_index, reduction=reduction)

    stand_ins = {"liger_kernel.transformers": types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Liger),
                 "liger_kernel.ops.rms_norm": types.SimpleNamespace(LigerRMSNormFunction=LigerNorm),
                 "cut_cross_entropy": types.SimpleNamespace(linear_cross_entropy=cce)}
    monkeypatch.setattr(kernel_cases, "library", stand_ins.get)
    operations = ["linear CE, half ignored", "linear CE, trained head", "RMSNorm"]
    record = run(arguments("--device", "cpu", "--smoke", "--no-compile", "--operations", *operations))
    timed = {(r["operation"], r["contender"]) for r in record["summary"] if r["outcome"] == "timed"}
    assert timed >= {*((o, "Liger") for o in operations), *((o, "CCE") for o in operations[:2])}, record["summary"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_bitsandbytes_dequantises_the_same_weights(measured):
    record, _ = measured
    assert record["agreement"][f"NF4, all layers, {TINY.name}: bitsandbytes"] == 0


def test_a_library_that_is_missing_is_no_contender(measured, monkeypatch):
    assert kernel_cases.library("nothing_of.the_kind") is None and kernel_cases.library("torch.nn") is torch.nn
    monkeypatch.setattr(kernel_cases, "library", lambda name: None)
    setup = CASES["NF4, all layers"](Source(CPU, torch.float32), TINY, TINY_TOKENS)
    assert setup.forwards.keys() == {OURS, EAGER} and setup.calls == TINY.layers
    ours, plain = (setup.forwards[name]() for name in (OURS, EAGER))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


# ---------------------------------------------------------------- lines that fail


def exhausted():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


def broken():
    raise RuntimeError("no kernel image\nfor this GPU")


def test_contenders_that_fail_or_disagree_keep_their_reason():
    right, wrong = torch.ones(5), torch.ones(5) * 1.2
    lines = {OURS: lambda: [right], "Liger": exhausted, "CCE": broken, EAGER: lambda: [right], "mad": lambda: [wrong], "nan": lambda: [
        right * float("nan")]}
    differences, outcomes = compare(lines, 1e-2)
    assert outcomes == {"Liger": "out of memory", "CCE": "failed: RuntimeError: no kernel image",
                        "mad": "disagrees: 2.0e-01 from the others", "nan": "disagrees: nan from the others"}
    assert differences[OURS] == 0 and differences["mad"] == pytest.approx(0.2)


def test_where_plain_torch_runs_out_of_memory_the_others_are_compared_with_ours():
    differences, outcomes = compare({EAGER: exhausted, OURS: lambda: [torch.ones(3)], "CCE": lambda: [torch.full((3,), 1.5)]}, 1e-2)
    assert outcomes == {EAGER: "out of memory", "CCE": "disagrees: 5.0e-01 from the others"} and differences.keys() == {"CCE"}


def test_a_contender_without_a_time_keeps_its_row(monkeypatch):
    monkeypatch.setitem(CASES, "GLU", lambda source, model, tokens: kernel_cases.Setup(
        (source(4, 4, grad=True),), {OURS: lambda x: x * 2, EAGER: lambda x: x * 2, "Liger": lambda x: exhausted()}))
    record = run(arguments("--device", "cpu", "--smoke", "--no-compile", "--operations", "GLU"))
    row = next(r for r in record["summary"] if r["contender"] == "Liger")
    assert row["outcome"] == "out of memory" and row["ms"] is None
    assert "| GLU | tiny | Liger | out of memory |" in markdown(record)


def test_distance():
    a = torch.randn(100)
    assert distance(a, a) == 0 and distance(a * 1.5, a) == pytest.approx(0.5)
    assert math.isnan(distance(a, a[:50])) and math.isnan(distance(a * float("nan"), a))


def test_tried_hands_on_results():
    assert tried(lambda: [1]) == ([1], None) and tried(broken) == (None, "failed: RuntimeError: no kernel image")


# ---------------------------------------------------------------- timing


def test_rounds_run_every_contender_once_in_changing_order():
    calls = []
    lines = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = rounds_of(lines, Clock(CPU), seconds=0.0, most=30)
    assert {name: len(line) for name, line in samples.items()} == dict.fromkeys("abc", FEWEST)
    rounds = [calls[i:i + 3] for i in range(0, len(calls), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len({tuple(r) for r in rounds}) > 1
    assert len(rounds_of(lines, Clock(CPU), seconds=60.0, most=9)["a"]) == 9


def test_a_slower_contender_is_seen_to_be_slower():
    lines = {"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.005)}
    samples = rounds_of(lines, Clock(CPU), seconds=60.0, most=15)
    ratio = timing.ratio(samples["long"], samples["short"], lambda s: s[0])
    assert 2 < ratio.value < 4.5 and ratio.low <= ratio.value <= ratio.high


def test_rates_are_those_of_a_product_and_a_copy():
    rates = gpu_timing.measured_rates(CPU, Clock(CPU))
    assert 1e8 < rates["product_flops"] < 1e14 and 1e8 < rates["copy_bytes"] < 1e14
