"""CPU forms of the operations beside stock code: equal results, a row for each contender and dtype, and a table."""

from importlib.util import find_spec

import pytest
import torch

from benchmarks.harness import show
from benchmarks.harness.model_shapes import ModelShape
from benchmarks.speed import kernels_cpu
from benchmarks.speed.kernel_cases import Source
from benchmarks.speed.kernels_cpu import BITSANDBYTES, OPERATIONS, OURS, PEFT, VIEW, Case, measure

TINY = ModelShape("tiny", 64, 128, 4, 2, 16, 257, 2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernels_cpu, "SMALL", TINY)
    monkeypatch.setattr(kernels_cpu, "TOKENS", 64)
    monkeypatch.setattr(kernels_cpu, "DOCUMENT", 16)


def needs(operation):
    return pytest.mark.skipif(find_spec(kernels_cpu.NEEDS.get(operation, "torch")) is None, reason="needs bitsandbytes")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("operation", [pytest.param(name, marks=needs(name)) for name in OPERATIONS])
def test_every_operation_agrees_with_stock_code(operation, dtype):
    rows, differences, raw = measure(operation, dtype, rounds=2, sample_seconds=0.0)
    assert max(differences.values()) <= kernels_cpu.TOLERANCE[dtype]
    names = {row["contender"] for row in rows}
    assert {OURS, f"{OURS} (A/A)"} < names and len(names) == 2 + len(differences) and len(raw) == len(rows)
    assert all(row["ms"]["value"] > 0 for row in rows)


def test_stock_layers_compute_in_the_stated_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        case = OPERATIONS["LoRA MLP"](Source(torch.device("cpu"), dtype), TINY)
        assert {t.dtype for t in case.inputs} == {dtype} and case.forwards[PEFT](*case.inputs).dtype == dtype


def test_results_that_differ_are_an_error(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "GLU", lambda source, shape: Case(
        (source(4, 4, grad=True),), {OURS: lambda x: x * 2, "torch": lambda x: x * 2.01}))
    with pytest.raises(AssertionError, match="GLU, fp32: results differ from stock's, more than 1e-03"):
        measure("GLU", "fp32", rounds=2)


@pytest.mark.slow
def test_record_table_and_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels_cpu, "fast_bf16", lambda: True)
    monkeypatch.setattr(kernels_cpu, "find_spec", lambda name: None)
    made = kernels_cpu.run(["GLU", "RoPE", "NF4, one matrix"], quick=True)
    assert made["suite"] == "kernels-cpu" and {(row["operation"], row["dtype"]) for row in made["summary"]} == {
        (operation, dtype) for operation in ("GLU", "RoPE") for dtype in ("fp32", "bf16")}
    rows = [row for row in show.markdown(made, VIEW).splitlines() if row.startswith("|")]
    assert len(rows) == 2 + 2 + 1 and rows[2].startswith("| GLU | transformers | ") and rows[-1].startswith("| all (A/A) |")
    assert f"NF4, one matrix ({BITSANDBYTES} is not installed)" in show.markdown(made, VIEW)
    assert show.draw(made, VIEW, tmp_path / "a.png").read_bytes() == show.draw(made, VIEW, tmp_path / "b.png").read_bytes()
