"""grouped_lora_linear against weights with the adapter added, expert by expert."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import grouped_lora_linear
from kernels.grouped_lora import grouped_lora_backward, grouped_lora_by_torch, grouped_lora_forward
from tests.helpers.kernels import DEVICE, assert_as_exact_as_torch

SIZES = [[3, 0, 5, 1], [0, 0, 4, 0], [1, 1, 1, 1]]


def make(sizes, k=6, n=5, r=2, dtype=torch.float64, device="cpu", transposed=False):
    """x [S, K], weight [E, N, K], A, B and ends; `transposed` weights are views of [E, K, N]."""
    def normal(*shape):
        return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).to(device, dtype)

    e = len(sizes)
    weight = normal(e, k, n).transpose(1, 2) if transposed else normal(e, n, k)
    ends = torch.tensor(sizes).cumsum(0).to(device, torch.int32)
    return [t.requires_grad_() for t in (normal(sum(sizes), k), weight, normal(e, r, k), normal(e, n, r))], ends


def formula(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, sizes) -> Tensor:
    weights = weight + scaling * (B @ A).to(weight.dtype)
    return torch.cat([linear(rows, w) for rows, w in zip(x.split(sizes), weights)])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(sizes, transposed):
    inputs, ends = make(sizes, transposed=transposed)
    assert torch.autograd.gradcheck(lambda *tensors: grouped_lora_linear(*tensors, 0.7, ends), inputs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("compute", [grouped_lora_linear, grouped_lora_by_torch])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients(sizes, compute, transposed):
    inputs, ends = make(sizes, 16, 24, 3, dtype=torch.float32, transposed=transposed)
    ours, expected = compute(*inputs, 0.7, ends), formula(*inputs, 0.7, sizes)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    got, wanted = (torch.autograd.grad(y, inputs, upstream) for y in (ours, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_an_expert_without_rows_gets_exactly_zero():
    inputs, ends = make([3, 0, 5])
    with torch.no_grad():
        for tensor in inputs[1:]:
            tensor[1] = float("nan")
    grads = torch.autograd.grad(grouped_lora_linear(*inputs, 1.0, ends).sum(), inputs)
    assert all(torch.equal(grad[1], torch.zeros_like(grad[1])) for grad in grads[1:]) and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(wanted):
    inputs, ends = make(SIZES[0])
    expected = torch.autograd.grad(formula(*inputs, 0.7, SIZES[0]).sum(), inputs[wanted])
    inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    torch.testing.assert_close(torch.autograd.grad(grouped_lora_linear(*inputs, 0.7, ends).sum(), inputs[wanted]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_torch(dtype):
    inputs, ends = make(SIZES[0], 32, 48, 4)
    assert_as_exact_as_torch(lambda *t: grouped_lora_linear(*t, 0.7, ends.to(DEVICE)), lambda *t: formula(*t, 0.7, SIZES[0]), inputs, dtype)


def test_adapters_in_fp32_get_gradients_in_fp32():
    (x, weight, A, B), ends = make(SIZES[0], dtype=torch.bfloat16)
    A, B = (t.detach().float().requires_grad_() for t in (A, B))
    grads = torch.autograd.grad(grouped_lora_linear(x, weight, A, B, 0.7, ends).sum(), (x, A, B))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_bits_do_not_change():
    inputs, ends = make(SIZES[0], 16, 24, 3, dtype=torch.float32)
    runs = [[y, *torch.autograd.grad(y.sum(), inputs)] for y in (grouped_lora_linear(*inputs, 0.7, ends) for _ in range(2))]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("rank", [4, 8, 13])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gpus_grouped_product_takes_every_rank(rank, transposed):
    """Shapes and strides are those that its kernels accept, in both directions: the meta device makes their checks."""
    (x, weight, A, B), ends = make([8] * 4, 64, 32, rank, dtype=torch.bfloat16, device="meta", transposed=transposed)
    y = grouped_lora_linear(x, weight.detach(), A, B, 2.0, ends)
    grads = torch.autograd.grad(y, (x, A, B), torch.empty_like(y))
    assert [grad.shape for grad in grads] == [x.shape, A.shape, B.shape]


def test_the_compiler_sees_the_operation_as_one():
    (x, weight, A, B), ends = make(SIZES[0], dtype=torch.float32)
    tensors = [t.detach() for t in (x, weight, A, B)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(grouped_lora_forward.node, (*tensors, 0.7, ends), test_utils=checks)
    _, U = grouped_lora_forward(*tensors, 0.7, ends)
    dy = torch.randn(len(x), weight.shape[1])
    torch.library.opcheck(grouped_lora_backward.node, (dy, *tensors, U, 0.7, ends, True, False, True, True), test_utils=checks)


def test_mistakes_are_told():
    (x, weight, A, B), ends = make(SIZES[0])
    with pytest.raises(ValueError, match=r"grouped_lora_linear: expected x \[S, 6\]"):
        grouped_lora_linear(x[:, :5], weight, A, B, 1.0, ends)
    with pytest.raises(ValueError, match="of torch.float64"):
        grouped_lora_linear(x.float(), weight, A, B, 1.0, ends)
