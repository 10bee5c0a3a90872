"""How every kernel is tested: against the formula in fp64, judged by the error that plain torch makes in the same dtype.

On a machine with a GPU the compiled kernels run there; elsewhere Triton's interpreter runs them on the CPU.
"""

import contextlib
import functools
import inspect

import pytest
import torch
from torch import Tensor

from kernels import _launch
from kernels._dispatch import backend_mode

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:  # the GPU check runs wherever torch, Triton and pytest are

    class st:
        """Stands in for hypothesis.strategies: any strategy of any arguments."""

        booleans = data = floats = integers = just = lists = none = permutations = sampled_from = tuples = staticmethod(
            lambda *args, **kwargs: None)

    def given(*args, **kwargs):
        """Skips the test by name; what hypothesis would have given is taken from its signature, fixtures stay."""

        def absent(test):
            @functools.wraps(test)
            def skipped(**_): ...

            names = [name for name in inspect.signature(test).parameters if name not in kwargs]
            names = names[:len(names) - len(args)]
            skipped.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names])
            return pytest.mark.skip(reason="needs hypothesis")(skipped)

        return absent

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
    """`with triton_mode():` the kernels serve, compiled on a GPU or interpreted."""
    return backend_mode("triton")


def error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in fp64; values that are not finite, or a zero truth missed, are an infinite error."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, (value.shape, truth.shape)
    if not torch.isfinite(value).all():
        return float("inf")
    distance, size = (value - truth).norm().item(), truth.norm().item()
    return distance / size if size else (float("inf") if distance else 0.0)


def value_and_gradients(op, inputs: list[Tensor], upstreams: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """op(*inputs)'s results and the gradients of those inputs that are floating and require one, for the given upstreams (1 if None)."""
    results = op(*inputs)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    upstreams = [torch.ones_like(r) for r in results] if upstreams is None else upstreams
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not wanted:
        return results, []
    return results, list(torch.autograd.grad(results, wanted, [u.to(r.dtype) for u, r in zip(upstreams, results, strict=True)]))


def to(inputs, dtype: torch.dtype | None = None, device=DEVICE) -> list:
    """Copies of the inputs as leaves: floating tensors in `dtype`, everything on `device`, requires_grad kept."""
    return [t if not isinstance(t, Tensor) else
            t.detach().to(device, dtype if t.is_floating_point() and dtype else t.dtype, copy=True).requires_grad_(t.requires_grad)
            for t in inputs]


def assert_as_exact_as_torch(ours, stock, inputs, dtype: torch.dtype, tiny: float = 1e-6, upstreams=None) -> None:
    """err(ours) <= 2 err(stock) + tiny for every result and every gradient; the truth is `stock` in fp64 on the same rounded inputs.

    `inputs` are fp64 tensors, rounded to `dtype` first. What `ours` runs are Triton kernels, twice, on poisoned memory: both runs must
    agree bit for bit, and no input may change.
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
    """torch.empty and its kin hand out NaN (integers: the largest), so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
