"""Test a kernel against its formula in fp64, relative to the error of plain torch in the same dtype.

On a machine with a GPU the compiled kernels run there; elsewhere Triton's interpreter runs them on the CPU.
"""

import contextlib
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from kernels import _launch
from kernels._dispatch import backend_mode

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:  # `make gpu` needs only torch, Triton and pytest: without hypothesis its tests are skipped
    st = MagicMock()  # any strategy of any arguments

    def given(*args, **kwargs):
        return pytest.mark.skip(reason="needs hypothesis")  # a skipped test needs none of its arguments

    def settings(*args, **kwargs):
        return lambda test: test

__all__ = ["DEVICE", "DTYPES", "assert_as_exact_as_torch", "error", "given", "poisoned", "runs_triton", "settings", "st", "to",
           "triton_mode", "value_and_gradients"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
runs_triton = pytest.mark.skipif(
    _launch.triton is None or (DEVICE.type == "cpu" and not _launch.INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1")


def triton_mode():
    """Let the kernels serve inside `with triton_mode():`, compiled on a GPU or interpreted."""
    return backend_mode("triton")


def error(value: Tensor, truth: Tensor) -> float:
    """Return ‖value − truth‖ / ‖truth‖ in fp64.

    It is infinite for values that are not finite or differ from a truth of zero.
    """
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, (value.shape, truth.shape)
    if not torch.isfinite(value).all():
        return float("inf")
    distance, size = (value - truth).norm().item(), truth.norm().item()
    return distance / size if size else (float("inf") if distance else 0.0)


def value_and_gradients(op, inputs: list[Tensor], upstreams: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results of op(*inputs) and the gradients of the inputs that require one.

    `upstreams` are the results' gradients, 1 if None.
    """
    results = op(*inputs)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    upstreams = [torch.ones_like(r) for r in results] if upstreams is None else upstreams
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not wanted:
        return results, []
    return results, list(torch.autograd.grad(results, wanted, [u.to(r.dtype) for u, r in zip(upstreams, results, strict=True)]))


def to(inputs, dtype: torch.dtype | None = None, device=DEVICE) -> list:
    """Return copies of the inputs as leaves on `device`, floating tensors in `dtype`, requires_grad kept."""
    return [t if not isinstance(t, Tensor) else
            t.detach().to(device, dtype if t.is_floating_point() and dtype else t.dtype, copy=True).requires_grad_(t.requires_grad)
            for t in inputs]


def assert_as_exact_as_torch(ours, stock, inputs, dtype: torch.dtype, tiny: float = 1e-6, upstreams=None) -> None:
    """Assert err(ours) <= 2 err(stock) + tiny for every result and every gradient.

    The truth is `stock` in fp64 on the same inputs, which are fp64 tensors rounded to `dtype` first. `ours` runs Triton kernels twice on
    memory filled with NaN: both runs must be bit-identical, and no input may change.
    """
    rounded = to(inputs, dtype)
    exact = to(rounded, torch.float64, "cpu")
    truth_values, _ = value_and_gradients(stock, exact)
    upstreams = [torch.randn(v.shape, dtype=torch.float64) for v in truth_values] if upstreams is None else upstreams
    upstreams = [u.to(dtype).to(torch.float64) for u in upstreams]
    truth = sum(value_and_gradients(stock, exact, upstreams), [])
    theirs = sum(value_and_gradients(stock, rounded, [u.to(DEVICE) for u in upstreams]), [])
    before = to(rounded)
    with triton_mode(), poisoned():
        first, second = (sum(value_and_gradients(ours, rounded, [u.to(DEVICE) for u in upstreams]), []) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    assert all(torch.equal(a, b) for a, b in zip(before, rounded) if isinstance(a, Tensor)), "an input was written"
    for i, (mine, other, true) in enumerate(zip(first, theirs, truth, strict=True)):
        assert error(mine, true) <= 2 * error(other, true) + tiny, f"result {i}: {error(mine, true):.2e}, torch {error(other, true):.2e}"


@contextlib.contextmanager
def poisoned():
    """Fill new memory with NaN (integers: the largest value), to expose reads of unwritten memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
