"""The whole-step checks: what a CPU can run of them here, all of it on a GPU."""

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
from benchmarks.harness.model_shapes import ModelShape
from benchmarks.harness.synthetic_models import adapted, random_samples, stock_model
from benchmarks.on_gpu import whole_step, whole_step_sizes
from benchmarks.on_gpu.whole_step import OURS, PLAIN, check_capture, check_compile, fill, mean_loss, packed, same_shapes
from benchmarks.on_gpu.whole_step_sizes import CASES, Case, context, lengths_of, sizes, trainable
from benchmarks.speed.baselines import PlainLoop, padded
from benchmarks.speed.contenders import Steadfast, fused
from kernels.nf4 import dequantize_nf4
from tests.helpers.kernels import DEVICE, runs_triton, triton_mode
from trainer.metrics.throughput import model_size
from trainer.model.quantization import nf4_of, quantized_layers

TINY = ModelShape("tiny", 64, 112, 4, 2, 16, 257, 2)
BLOCKY = ModelShape("blocky", 64, 128, 4, 2, 16, 257, 2)  # rows end with a block of 4-bit weights
CPU = torch.device("cpu")


@pytest.mark.slow
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
    monkeypatch.setattr(whole_step, "mean_loss", lambda model, batch: mean_loss(model, batch) * next(losses))
    assert not check_compile(CPU, torch.float32, TINY)["passed"]


@pytest.mark.slow
def test_both_loops_train_alike_and_their_rates_are_compared():
    outcome = whole_step.throughput(CPU, torch.float32, TINY, mean=30, rounds=2)
    plain, ours = outcome["rows"]
    assert outcome["passed"] and ours["difference"] < 1e-5 and (plain["contender"], ours["contender"]) == ("plain HF loop", "Steadfast")
    for figure in ("tokens_per_second", "steps_per_second"):
        assert ours[figure]["low"] <= ours[figure]["value"] <= ours[figure]["high"]
    assert ours["ratio"]["value"] == pytest.approx(ours["tokens_per_second"]["value"] / plain["tokens_per_second"]["value"])
    assert ours["padding"] == 0 < plain["padding"]


def raise_losses(monkeypatch, factor=1.001, when=lambda samples: True):
    """Have Steadfast report larger losses."""
    real = Steadfast.step_on
    monkeypatch.setattr(Steadfast, "step_on", lambda one, samples: dataclasses.replace(
        done := real(one, samples), loss=float(done.loss) * (factor if when(samples) else 1)))
    monkeypatch.setattr(Steadfast, "loss_on", lambda one, samples, real=Steadfast.loss_on: real(one, samples) * factor)


@pytest.mark.slow
def test_losses_that_differ_do_not_pass(monkeypatch):
    raise_losses(monkeypatch)
    outcome = whole_step.throughput(CPU, torch.float32, TINY, mean=20, rounds=2)
    assert not outcome["passed"] and outcome["error"] == "plain HF loop timed; Steadfast disagrees: 1.0e-03 from the plain HF loop"
    assert "tokens_per_second" in outcome["rows"][0] and "tokens_per_second" not in outcome["rows"][1]


@pytest.mark.slow
def test_rivals_are_compared_before_they_are_timed():
    """On a CPU there is no line with Liger's kernels, and the outcome says why."""
    outcome = whole_step.rivals(CPU, torch.float32, TINY, mean=20, rounds=2)
    timed = ["Steadfast", "HF loop, packed", "TRL packed"]
    assert outcome["passed"] and set(outcome["tokens_per_second"]) == set(timed) and set(outcome["ratio"]) == set(timed[1:])
    assert max(outcome["differences"].values()) < 1e-5
    assert outcome["outcomes"] == dict.fromkeys(timed, "timed") | {"TRL packed, Liger": outcome["outcomes"]["TRL packed, Liger"]}
    assert outcome["outcomes"]["TRL packed, Liger"] in ("liger-kernel is not installed", "its kernels need a GPU")
    assert {s["padding"] for line in outcome["raw"].values() for s in line} == {0}


@pytest.mark.slow
def test_a_rival_that_fails_or_disagrees_is_named(monkeypatch):
    def exhausted(*_, **__):
        raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setattr(whole_step, "packed_loop", exhausted)
    raise_losses(monkeypatch)
    outcome = whole_step.rivals(CPU, torch.float32, TINY, mean=20, rounds=2)
    assert not outcome["passed"] and outcome["outcomes"]["HF loop, packed"] == "out of memory"
    assert outcome["outcomes"]["TRL packed"].startswith("disagrees: 1.0e-03") and set(outcome["tokens_per_second"]) == {"Steadfast"}


# ---------------------------------------------------------------- sizes and contexts


def figures(outcome):
    """Rows by case and line."""
    return {(row["case"], row["contender"]): row for row in outcome["rows"]}


@pytest.mark.slow
def test_every_size_is_compared_over_tailed_and_equal_lengths():
    cases = [Case(BLOCKY, "lora", "tailed"), Case(dataclasses.replace(BLOCKY, name="normed", qk_norm=True), "full", "equal")]
    kept = []
    outcome = sizes(CPU, torch.float32, cases, tokens=320, rounds=2, keep=lambda now: kept.append(json.loads(json.dumps(now))))
    rows = figures(outcome)
    assert outcome["passed"] and not outcome["not_reached"] and len(rows) == 4
    assert [len(now["rows"]) for now in kept] == [2, 4] and kept[0]["not_reached"] == ["normed, full, equal"]
    assert {row["outcome"] for row in rows.values()} == {"timed"}
    assert max(row.get("difference", 0) for row in rows.values()) < 1e-4
    for (case, line), row in rows.items():
        spent = [sample["tokens"] / sample["wall"] for sample in outcome["raw"][f"{case}: {line}"]]
        assert row["tokens_per_second"]["value"] == pytest.approx(np.median(spent))
        assert row["mfu"]["value"] == pytest.approx(np.median(
            [s["flops"] / s["wall"] for s in outcome["raw"][f"{case}: {line}"]]) / row["product_flops"])
        assert row["launches"] > 100
    assert rows["normed, full, equal", PLAIN]["padding"] == rows["normed, full, equal", OURS]["padding"] == 0
    assert 0.2 < rows["blocky, lora, tailed", PLAIN]["padding"] < 0.7 and rows["blocky, lora, tailed", OURS]["padding"] == 0


def test_lengths_add_up_to_the_tokens_of_the_planned_steps():
    assert set(lengths_of("equal", 8192)) == {512} and len(lengths_of("equal", 8192)) == 256
    tailed = lengths_of("tailed", 8192)
    assert abs(tailed.sum() / (16 * 8192) - 1) < 0.03 and 2048 >= max(tailed) > 2 * np.median(tailed)


def test_memory_held_counts_weights_states_and_4_bits():
    samples = random_samples([20] * 3, 257, 0)

    def held(method):
        model = trainable(Case(BLOCKY, method, "equal"), CPU, torch.float32)
        loop = whole_step.plain_loop(model, samples, 60, CPU)
        empty = whole_step.resident_mib(loop)
        loop.step()
        return empty, whole_step.resident_mib(loop) - empty, model

    empty, added, model = held("full")
    weights = sum(p.numel() for p in model.parameters())
    assert empty * 2**20 == pytest.approx(4 * weights, rel=1e-2)
    assert added * 2**20 == pytest.approx(8 * weights, rel=1e-2)
    of_4_bit, added, model = held("qlora")
    dense, _, _ = held("lora")
    saved = BLOCKY.linear_weights * (4 - 0.5 - 1 / 64) - 14 * (256 + 1) * 4  # less two tables for each of 14 layers
    assert (dense - of_4_bit) * 2**20 == pytest.approx(saved, rel=0.02)
    assert added * 2**20 == pytest.approx(8 * model_size(model).trainable, rel=1e-2)


def test_memory_held_by_ours_counts_masters_once_and_gradients():
    model = adapted(stock_model(BLOCKY, CPU, torch.float32))
    trained, weights = model_size(model).trainable, sum(p.numel() for p in model.parameters())
    one = whole_step.steadfast(model, random_samples([20] * 3, 257, 0), 60, CPU)
    one.step()
    assert whole_step.resident_mib(one) * 2**20 == pytest.approx(4 * weights + 12 * trained, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_qlora_with_and_without_bitsandbytes(monkeypatch, installed):
    if installed:
        pytest.importorskip("bitsandbytes")
    else:
        monkeypatch.setattr(whole_step_sizes, "no_bitsandbytes", lambda: "bitsandbytes is not installed")
    outcome = sizes(CPU, torch.float32, [Case(BLOCKY, "qlora", "equal")], tokens=160, rounds=2)
    rows = figures(outcome)
    assert outcome["passed"] and rows["blocky, qlora, equal", OURS]["outcome"] == "timed"
    assert rows["blocky, qlora, equal", PLAIN]["outcome"] == ("timed" if installed else "bitsandbytes is not installed")
    assert ("ratio" in rows["blocky, qlora, equal", OURS]) == installed


def test_a_base_of_random_codes_runs_fused_as_it_runs_plainly(monkeypatch):
    monkeypatch.setattr(whole_step_sizes, "no_bitsandbytes", lambda: "bitsandbytes is not installed")
    model = trainable(Case(BLOCKY, "qlora", "equal"), CPU, torch.float32)
    assert len(quantized_layers(model)) == 14
    assert 0.015 < dequantize_nf4(nf4_of(quantized_layers(model)[0])).std() < 0.03
    samples = random_samples([9, 14], 257, 0)
    plain = model(**padded(samples), use_cache=False).loss.item()
    assert mean_loss(fused(model), packed(samples, CPU)).item() == pytest.approx(plain, rel=1e-5)


def limit_memory(monkeypatch, fits):
    """Have the plain loop run out of memory unless `fits` its samples."""
    real = PlainLoop.gradients

    def limited(loop, samples):
        if not fits(loop, samples):
            raise torch.cuda.OutOfMemoryError("too much")
        return real(loop, samples)

    monkeypatch.setattr(PlainLoop, "gradients", limited)


@pytest.mark.slow
def test_the_plain_loop_halves_its_micro_batch_until_it_fits(monkeypatch):
    limit_memory(monkeypatch, lambda loop, samples: loop.micro_batch <= 2)
    rows = figures(sizes(CPU, torch.float32, [Case(BLOCKY, "lora", "tailed")], tokens=160, rounds=2))
    plain = rows["blocky, lora, tailed", PLAIN]
    assert plain["outcome"] == "timed" and plain["micro_batch"] == 2 and rows["blocky, lora, tailed", OURS]["difference"] < 1e-5


@pytest.mark.slow
def test_a_contender_that_runs_out_of_memory_keeps_its_row(monkeypatch):
    limit_memory(monkeypatch, lambda loop, samples: False)
    outcome = sizes(CPU, torch.float32, [Case(BLOCKY, "lora", "equal")], tokens=160, rounds=2)
    rows = figures(outcome)
    assert outcome["passed"] and rows["blocky, lora, equal", PLAIN]["outcome"] == "out of memory"
    assert rows["blocky, lora, equal", OURS]["outcome"] == "timed" and "ratio" not in rows["blocky, lora, equal", OURS]


@pytest.mark.slow
def test_a_size_whose_losses_differ_disagrees(monkeypatch):
    raise_losses(monkeypatch)
    outcome = sizes(CPU, torch.float32, [Case(BLOCKY, "lora", "equal")], tokens=160, rounds=2)
    assert not outcome["passed"] and outcome["error"] == "blocky, lora, equal: Steadfast disagrees: 1.0e-03 from the plain HF loop"


def scripted(monkeypatch, outcomes):
    """Cases that take no time, in the order they were asked for."""
    done = []

    def measure(case, *_):
        done.append(case.name)
        return [{"contender": OURS, "outcome": outcomes.get(case.name, "timed")}], {}

    monkeypatch.setattr(whole_step_sizes, "measure_case", measure)
    return done


def test_no_case_begins_after_the_budget_and_a_later_run_does_the_rest(monkeypatch):
    clock = iter([0.0, 1.0, 9.0, 11.0])
    done = scripted(monkeypatch, {})
    with monkeypatch.context() as patched_clock:
        patched_clock.setattr(whole_step_sizes.time, "monotonic", lambda: next(clock))
        first = sizes(CPU, torch.float32, budget=10.0)
    assert done == ["Llama-3.1-8B, lora, tailed", "Llama-3.1-8B, lora, equal"]
    assert first["passed"] and len(first["not_reached"]) == len(CASES) - 2 and first["not_reached"][0] == "Qwen3-4B, lora, tailed"
    second = sizes(CPU, torch.float32, earlier=json.loads(json.dumps(first)))
    assert len(done) == len(set(done)) == len(CASES) == len(second["rows"]) and not second["not_reached"]


def test_a_case_that_fails_as_a_whole_is_a_row_and_the_next_one_runs(monkeypatch):
    def measure(case, *_):
        if case.lengths == "equal":
            raise RuntimeError("no such thing")
        return [{"contender": OURS, "outcome": "timed"}], {}

    monkeypatch.setattr(whole_step_sizes, "measure_case", measure)
    outcome = sizes(CPU, torch.float32, [Case(BLOCKY, "lora", lengths) for lengths in ("equal", "tailed")])
    assert [row["outcome"] for row in outcome["rows"]] == ["failed: RuntimeError: no such thing", "timed"]
    assert not outcome["passed"] and outcome["error"].startswith("blocky, lora, equal: Steadfast failed")


@pytest.mark.slow
def test_contexts_are_climbed_until_one_does_not_fit(monkeypatch):
    limit_memory(monkeypatch, lambda loop, samples: len(samples[0][0]) <= 32 or loop.model.is_gradient_checkpointing)
    outcome = context(CPU, torch.float32, BLOCKY, lengths=(16, 32, 64, 128))
    climbs = {climb: [(row["tokens"], row["outcome"]) for row in outcome["rows"] if row["climb"] == climb]
              for climb in dict.fromkeys(row["climb"] for row in outcome["rows"])}
    everything = [(tokens, "timed") for tokens in (16, 32, 64, 128)]
    assert climbs == {
        "Steadfast, checkpointing none": everything, "Steadfast, checkpointing full": everything,
        "plain HF loop, checkpointing none": [*everything[:2], (64, "out of memory")], "plain HF loop, checkpointing full": everything}
    assert outcome["longest"] == dict.fromkeys(climbs, 128) | {"plain HF loop, checkpointing none": 32}
    assert outcome["passed"] and not outcome["not_reached"]
    losses = {}
    for row in outcome["rows"]:
        if row["outcome"] == "timed":
            losses.setdefault(row["tokens"], []).append(row["loss"])
            assert row["tokens_per_second"]["value"] == pytest.approx(row["tokens"] * row["steps_per_second"]["value"])
    assert all(max(of_length) - min(of_length) < 1e-4 for of_length in losses.values()) and len(set(map(min, losses.values()))) == 4


@pytest.mark.slow
def test_a_context_whose_losses_differ_ends_its_climb(monkeypatch):
    real = Steadfast.step

    def wrong(one):
        done = real(one)
        return dataclasses.replace(done, loss=float(done.loss) * (1.001 if done.tokens > 16 else 1))

    monkeypatch.setattr(Steadfast, "step", wrong)
    outcome = context(CPU, torch.float32, BLOCKY, lengths=(16, 32, 64))
    ends = {row["case"]: row["outcome"] for row in outcome["rows"] if row["outcome"] != "timed"}
    assert ends == {f"{PLAIN}, checkpointing {mode}, 32 tokens": "disagrees: 1.0e-03 from the contenders before"
                    for mode in ("none", "full")}
    assert not outcome["passed"]


@pytest.mark.slow
def test_activations_of_both_contenders_are_computed_again():
    climber = whole_step_sizes.Climber(BLOCKY, CPU, torch.float32)
    for name in (OURS, PLAIN):
        operations = []
        for mode in ("none", "full"):
            climber.measure(whole_step_sizes.Height(name, mode, 32), [])
            operations.append(whole_step.launches(climber.contender))
        assert operations[0] < 0.9 * operations[1]  # of which loading and updating are the same


def test_the_command_goes_on_with_a_file_and_keeps_it_whatever_happens(tmp_path, monkeypatch, capsys):
    path, given = tmp_path / "sizes.json", []
    assert whole_step_sizes.main(["sizes", "--out", str(path)]) == 2 or torch.cuda.is_available()

    def fake(device, dtype, budget, keep, earlier):
        given.append((budget, earlier))
        outcome = whole_step_sizes.begun(earlier)
        outcome["rows"].append({"case": str(len(outcome["rows"])), "contender": OURS, "outcome": "timed"})
        keep(outcome | {"passed": True})
        if len(given) == 2:
            raise RuntimeError("a fall")
        return outcome | {"passed": True}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(whole_step_sizes.CHECKS, "sizes", fake)
    assert whole_step_sizes.main(["sizes", "--out", str(path), "--seconds", "300"]) == 0
    assert given == [(210.0, None)] and len(json.loads(path.read_text())["rows"]) == 1
    assert whole_step_sizes.main(["sizes", "--out", str(path), "--seconds", "300"]) == 1
    left = json.loads(path.read_text())
    assert left["error"] == "failed: RuntimeError: a fall" and [row["case"] for row in left["rows"]] == ["0", "1"]


def test_launches_on_a_device_are_its_kernels():
    events = [{"cat": "kernel", "name": "gemm"}, {"cat": "gpu_memcpy", "name": "Memcpy"}, {"cat": "kernel", "name": "add"},
              {"cat": "cuda_runtime", "name": "cudaLaunchKernel"}, {"name": "process_name", "ph": "M"}]
    assert whole_step.kernels_in({"traceEvents": events}) == 2


# ---------------------------------------------------------------- data


def test_padded_and_packed_hold_equal_tokens():
    samples = random_samples([5, 9], 50, seed=1)
    batch, pack = padded(samples), packed(samples, CPU)
    assert batch["attention_mask"].sum(1).tolist() == [5, 9] and batch["input_ids"].shape == (2, 9)
    supervised = batch["labels"] != -100
    assert batch["labels"][supervised].tolist() == pack.targets.tolist()
    assert batch["input_ids"][batch["attention_mask"].bool()].tolist() == pack.input_ids.tolist()


def test_packs_for_a_captured_graph_differ_in_contents_alone():
    batches = same_shapes(6, 257, CPU)
    assert len({batch.tokens for batch in batches}) == len({len(b.targets) for b in batches}) == len({b.max_seqlen for b in batches}) == 1
    assert all(batch.cu_seqlens.diff().max() <= batch.max_seqlen for batch in batches)
    assert len({tuple(batch.cu_seqlens.tolist()) for batch in batches}) == 4
    static, model = packed(random_samples([128, 128, 128], 257, 9), CPU), fused(adapted(stock_model(TINY, CPU, torch.float32)))
    static = dataclasses.replace(
        static, max_seqlen=256, weight_sum=batches[0].weight_sum,
        **{name: getattr(static, name)[: len(batches[0].targets)] for name in ("supervised_rows", "targets", "weights")})
    fill(static, batches[1])
    assert mean_loss(model, static).item() == mean_loss(model, batches[1]).item() != mean_loss(model, batches[0]).item()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("check", [check_compile, check_capture])
def test_on_a_gpu(check):
    outcome = check(DEVICE, torch.bfloat16)
    assert outcome["passed"], outcome
