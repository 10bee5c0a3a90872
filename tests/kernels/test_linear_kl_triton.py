"""The Triton kernels of two heads' divergence, against torch's kl_div of the whole logits in fp64."""

import math

import pytest
import torch

from kernels._dispatch import backend_mode
from kernels._kl_rows import DIVERGENCES, Rule, kl_rows
from kernels.linear_kl import linear_kl, linear_kl_chunks
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, error, poisoned, runs_triton, triton_mode
from tests.helpers.kl_cases import (
    EVERY_OPTION,
    check_extremes,
    check_masked_extremes,
    check_small_divergences_keep_their_digits,
    flags,
    gradients,
    inputs,
    masked_targets,
    stock,
    weights_and_mask,
)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rows, vocabulary, options", [
    (0, 7, {}), (1, 1, {}), (5, 31, EVERY_OPTION), (13, 512, {}), (7, 3001, EVERY_OPTION)])
def test_kernels_are_as_exact_as_torch(divergence, rows, vocabulary, options, dtype):
    """Frozen head, per-token upstream."""
    x, weight, _, x_ref, weight_ref, _ = inputs(rows=rows, vocabulary=vocabulary)

    def with_(op):
        return lambda *tensors: op(*tensors, divergence=divergence, reduction="none", **options)

    assert_as_exact_as_torch(with_(linear_kl), with_(stock), [x, weight, x_ref, weight_ref], dtype)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rows, vocabulary, options", [(1, 2, {}), (5, 31, EVERY_OPTION), (4, 3001, {})])
def test_kernels_leave_masked_targets_out(divergence, rows, vocabulary, options, dtype):
    x, weight, _, x_ref, weight_ref, _ = inputs(rows=rows, vocabulary=vocabulary)

    def with_(op):
        return lambda *tensors: op(*tensors[:-1], masked_target=tensors[-1], divergence=divergence, reduction="none", **options)

    tensors = [x, weight, x_ref, weight_ref, masked_targets(rows, vocabulary)]
    assert_as_exact_as_torch(with_(linear_kl), with_(stock), tensors, dtype)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_under_a_trained_shared_head(divergence, reduction, dtype):
    x, weight, bias, *_ = inputs(trained=True, rows=7, vocabulary=33)
    token_weight, keep = weights_and_mask(7)

    def with_(op, **chunk):
        return lambda x, weight, bias, x_ref, token_weight, keep: op(
            x, weight, x_ref, bias=bias, token_weight=token_weight, keep=keep, divergence=divergence, reduction=reduction,
            **EVERY_OPTION, **chunk)

    tensors = [x, weight, bias, torch.randn_like(x), token_weight.requires_grad_(), keep]
    assert_as_exact_as_torch(with_(linear_kl, chunk_bytes=3 * 2 * 33 * 4), with_(stock), tensors, dtype)


@runs_triton
def test_kernels_take_an_expanded_upstream():
    x, weight, _, x_ref, weight_ref, _ = inputs(torch.float32, trained=True, device=DEVICE)
    with triton_mode():
        ours = torch.autograd.grad(linear_kl(x, weight, x_ref, weight_ref, reduction="none").sum() * 3, (x, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(stock(x, weight, x_ref, weight_ref) * 3, (x, weight)), rtol=1e-4, atol=1e-5)


@runs_triton
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kernel_extremes(divergence):
    with triton_mode(), poisoned():
        check_extremes(divergence, DEVICE)
        check_masked_extremes(divergence, DEVICE)
        check_small_divergences_keep_their_digits(divergence, DEVICE)


@runs_triton
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kernel_and_reference_agree_on_rows_that_start_masked(divergence):
    """A whole block of −∞ before the first logit, a few, a whole block after the last; and rows that are not padded."""
    u, u_ref = torch.randn(2, 3, 4080, device=DEVICE)
    for side in u, u_ref:
        side[0, :2050] = side[1, :4] = side[2, 2048:] = -math.inf
    rule, scale = Rule(divergence, 0.3, None, 1.0, 1.0), torch.rand(3, device=DEVICE)
    results = []
    for mode in ("triton", "reference"):
        with backend_mode(mode):
            buffers = u.clone(), u_ref.clone()
            results.append((kl_rows(*buffers, scale, None, rule, True), buffers[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)


@runs_triton
def test_kernel_softcap_keeps_the_digits_of_small_logits():
    u, u_ref = torch.randn(2, 8, 64, dtype=torch.float64).mul(0.01).float()
    rule, slopes = Rule("forward", 0.5, 50.0, 1.0, 1.0), []
    for mode, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        with backend_mode(mode):
            buffer = u.to(DEVICE, dtype, copy=True)
            kl_rows(buffer, u_ref.to(DEVICE, dtype, copy=True), None, None, rule, True)
            slopes.append(buffer)
    assert error(slopes[0], slopes[2]) <= 2 * error(slopes[1], slopes[2]) + 1e-6


@runs_triton
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_compile_in_one_graph(reduction):
    torch._dynamo.reset()
    x, weight, _, x_ref, weight_ref, _ = inputs(torch.float32, trained=True, device=DEVICE)

    def loss(x, weight):
        return linear_kl(x, weight, x_ref, weight_ref, divergence="reverse", reduction=reduction)

    with triton_mode():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weight)
        slopes = gradients(compiled, [x, weight])
        torch.library.opcheck(linear_kl_chunks.node, (*(t.detach() for t in (x, weight, x_ref, weight_ref)), None, None, None, None, None),
                              flags(True, True, False, divergence="reverse"))
    theirs = stock(x, weight, x_ref, weight_ref, divergence="reverse", reduction=reduction)
    torch.testing.assert_close(compiled, theirs)
    torch.testing.assert_close(slopes, gradients(theirs, [x, weight]))
