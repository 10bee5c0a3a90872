"""Predicted times: the arithmetic against figures made elsewhere, and the table that measured ones go into."""

import json

import pytest

from benchmarks.harness import record
from benchmarks.speed import kernel_predictions
from benchmarks.speed.kernel_predictions import (
    ARCHS,
    MODELS,
    OPERATIONS,
    TARGETS,
    TOKENS,
    newest_measured,
    predicted_cell,
    product,
    seconds,
    table,
)

LLAMA, QWEN, SMALL = MODELS
H200 = ARCHS[0]
NDV = 2.0 * TOKENS * LLAMA.width * LLAMA.vocabulary


def totals(operation, model=LLAMA, tokens=TOKENS):
    kernels = [k for part in OPERATIONS[operation](model, tokens)[:2] for k in part]
    return sum(k.flops for k in kernels), sum(k.bytes for k in kernels), sum(k.launches for k in kernels)


def test_one_product_of_the_head_takes_what_the_floor_says():
    """8.6 TFLOP: 11.6, 36.8 and 69.6 ms at three quarters of the stated rates."""
    for part, expected in zip(ARCHS, (11.6, 36.8, 69.6), strict=True):
        assert 1e3 * seconds([product(TOKENS, LLAMA.width, LLAMA.vocabulary)], part) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("operation", "products"), [
    ("linear CE, frozen head", 2), ("linear CE, half ignored", 1), ("linear CE, trained head", 3), ("linear KL, frozen head", 3)])
def test_products_of_the_head(operation, products):
    assert totals(operation)[0] == products * NDV


def test_a_kernel_takes_the_longer_of_products_and_bytes_and_its_launches():
    slow, fast = H200.product_rate * H200.product_share, H200.bandwidth * H200.bandwidth_share
    assert seconds([kernel_predictions.Kernel(slow, 0.5 * fast, 3)], H200) == pytest.approx(1 + 3 * H200.launch)
    both = [kernel_predictions.Kernel(0.5 * slow, fast), kernel_predictions.Kernel(0, fast)]
    assert seconds(both, H200) == pytest.approx(2 + 2 * H200.launch)
    assert seconds([kernel_predictions.Kernel(slow, 0, attention=True)], H200) > 2


@pytest.mark.parametrize(("operation", "passes", "width", "launches"), [
    ("RMSNorm", 5, LLAMA.width, 2), ("add + RMSNorm", 8, LLAMA.width, 2), ("RoPE", 4, 40 * 128, 2), ("QK-norm + RoPE", 5, 40 * 128, 2),
    ("GLU", 8, LLAMA.mlp, 2)])
def test_passes_of_what_is_bound_by_memory(operation, passes, width, launches):
    assert totals(operation) == (0, 2 * passes * width * TOKENS, launches)


def test_lora_adds_to_the_base_products_what_its_kernels_move():
    work = OPERATIONS["LoRA QKV"](LLAMA, TOKENS)
    assert sum(k.launches for k in work.forward) == 1 + 3 and sum(k.launches for k in work.backward) == 2 + 3 + 1
    base = 2 * 2.0 * TOKENS * LLAMA.width * (4096 + 2 * 1024)
    assert sum(k.flops for k in work.base) == base
    narrow = 3 * 2.0 * TOKENS * kernel_predictions.RANK * (3 * LLAMA.width + 4096 + 2 * 1024)
    assert totals("LoRA QKV")[0] == base + narrow
    assert all(0.02 < row["overhead"]["H200"] < 0.3 for row in kernel_predictions.predict() if row["overhead"])


def test_weights_of_known_models():
    assert LLAMA.linear_weights == 6_979_321_856 and SMALL.linear_weights == 973_078_528
    assert totals("NF4, all layers")[1] == pytest.approx(17.6e9, rel=5e-3)


def test_attention_is_half_of_each_documents_square():
    pairs = TOKENS * kernel_predictions.DOCUMENT / 2
    assert totals("packed attention")[0] == 3.5 * 4 * pairs * 32 * 128


def test_a_row_for_each_operation_of_each_model_and_faster_parts_are_faster():
    rows = kernel_predictions.predict()
    assert len(rows) == 3 * len(OPERATIONS) - 2  # two of the models have no norms on queries and keys
    assert len({row["line"] for row in rows}) == len(rows)
    for row in rows:
        forward_and_backward = [sum(row["ms"][part.name].values()) for part in ARCHS]
        assert forward_and_backward == sorted(forward_and_backward), row["line"]
    assert TARGETS.keys() <= OPERATIONS.keys()
    assert {operation for operation, _ in kernel_predictions.PUBLISHED} <= OPERATIONS.keys()


# ---------------------------------------------------------------- the table

PREDICTED = {"summary": kernel_predictions.predict(),
             "conditions": {"parts": [vars(arch) for arch in ARCHS], "models": [vars(model) for model in MODELS], "tokens": 1, "rank": 1,
                            "document": 1}}


def measured_record(*rows, device="NVIDIA H200"):
    return {"device": device, "time": "2026-01-01", "summary": [
        {"operation": operation, "model": LLAMA.name, "contender": contender, "outcome": outcome, "ms": ms}
        for operation, contender, outcome, ms in rows]}


def row_of(rows, operation):
    return next(row for row in rows if row[0] == operation)


def test_a_gpus_record_fills_the_measured_column_and_nothing_else_does():
    measured = measured_record(("GLU", "torch eager", "timed", {"value": 9.0}), ("GLU", "Steadfast", "timed", {"value": 0.5123}),
                               ("LoRA MLP", "Steadfast", "out of memory", None))
    rows = table(PREDICTED, measured, (LLAMA.name,))
    assert "measured on NVIDIA H200" in rows[0]
    assert row_of(rows, "GLU")[4] == "0.512" and row_of(rows, "LoRA MLP")[4] == "out of memory" and row_of(rows, "RoPE")[4] == ""
    assert "measured on a GPU" in table(PREDICTED)[0] and len(table(PREDICTED, None, (LLAMA.name,))) == 1 + 13


def test_what_lora_adds_stands_in_brackets():
    row = next(row for row in PREDICTED["summary"] if row["line"] == f"LoRA linear, {LLAMA.name}")
    assert predicted_cell(row, "H200").endswith(f"(+{row['overhead']['H200']:.1%})")


def test_the_newest_measurement_of_a_gpu(monkeypatch):
    alone, inside, cpu = ({"suite": "kernels-cuda", "time": "2026-02-01"}, {"suite": "kernels-cuda", "time": "2026-03-01"},
                          {"suite": "kernels-cpu", "time": "2026-04-01"})
    found = {"kernels-cpu": cpu}
    monkeypatch.setattr(record, "newest", lambda: found)
    assert newest_measured() is None
    found["kernels-cuda"] = alone
    assert newest_measured() is alone
    found["gpu"] = {"parts": {"kernels": {"outcome": "out of time", "record": inside}}}
    assert newest_measured() is inside
    found["gpu"] = {"parts": {"tests": {}}}
    assert newest_measured() is alone


def test_the_committed_prediction_is_what_the_code_predicts():
    assert record.newest()["kernels-predicted"]["summary"] == json.loads(json.dumps(kernel_predictions.predict()))
