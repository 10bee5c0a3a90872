"""Two heads and their divergence, against torch's kl_div of the whole logits in fp64."""

import importlib
import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from kernels._kl_rows import DIVERGENCES
from kernels.linear_kl import linear_kl, linear_kl_chunks
from tests.helpers.allocations import Allocations
from tests.helpers.kernels import error, given, settings, st
from tests.helpers.kl_cases import (
    D_REF,
    EVERY_OPTION,
    ROW,
    D,
    S,
    V,
    assert_same,
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


def test_no_chunk_of_few_rows_reads_the_whole_heads(monkeypatch):
    x, weight = torch.randn(130, 8), torch.randn(50, 8)
    read, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: read.append(len(a)) or mm(a, b, out=out))
    linear_kl(x, weight, x + 1, weight, chunk_bytes=129 * 2 * 50 * 4)
    assert read == [65] * 4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_values_and_gradients_match_full_logits(divergence, reduction, trained, shared, full):
    x, weight, bias, x_ref, weight_ref, bias_ref = inputs(trained=trained)
    token_weight, keep = weights_and_mask()
    call = dict(divergence=divergence, reduction=reduction)
    if full:
        call |= EVERY_OPTION | dict(bias=bias, token_weight=token_weight, keep=keep)
    if shared:
        x_ref, weight_ref, bias_ref = torch.randn_like(x), None, None
    elif full:
        call["bias_ref"] = bias_ref
    leaves = [x] + ([weight] + [bias] * full if trained else [])
    ours = linear_kl(x, weight, x_ref, weight_ref, chunk_bytes=4 * ROW, **call)
    assert_same(ours, stock(x, weight, x_ref, weight_ref, **call), leaves)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_gradcheck_with_every_option(divergence, trained, reduction):
    x, weight, bias, x_ref, weight_ref, bias_ref = inputs(trained=trained, rows=5, width=3, vocabulary=4)
    token_weight, keep = weights_and_mask(5)

    def loss(x, weight, bias, token_weight):
        return linear_kl(x, weight, x_ref, weight_ref, divergence=divergence, bias=bias, bias_ref=bias_ref, token_weight=token_weight,
                         keep=keep, reduction=reduction, chunk_bytes=2 * 2 * 4 * 8, **EVERY_OPTION)

    assert gradcheck(loss, (x, weight, bias, token_weight.requires_grad_()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_masked_target_is_left_out_of_both_sides(divergence, reduction, trained, shared, full):
    x, weight, bias, x_ref, weight_ref, bias_ref = inputs(trained=trained)
    token_weight, keep = weights_and_mask()
    call = dict(divergence=divergence, reduction=reduction, bias=bias, masked_target=masked_targets())
    if full:
        call |= EVERY_OPTION | dict(token_weight=token_weight, keep=keep)
    if shared:
        x_ref, weight_ref, bias_ref = torch.randn_like(x), None, None
    else:
        call["bias_ref"] = bias_ref
    ours = linear_kl(x, weight, x_ref, weight_ref, chunk_bytes=4 * ROW, **call)
    assert_same(ours, stock(x, weight, x_ref, weight_ref, **call), [x, weight, bias] if trained else [x])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("options", [{}, EVERY_OPTION])
def test_gradcheck_with_masked_targets(divergence, trained, options):
    x, weight, bias, x_ref, weight_ref, bias_ref = inputs(trained=trained, rows=5, width=3, vocabulary=4)
    token_weight, keep = weights_and_mask(5)

    masked = masked_targets(5, 4)

    def loss(x, weight, bias):
        return linear_kl(x, weight, x_ref, weight_ref, divergence=divergence, bias=bias, bias_ref=bias_ref, token_weight=token_weight,
                         keep=keep, masked_target=masked, reduction="none", chunk_bytes=2 * 2 * 4 * 8, **options)

    assert gradcheck(loss, (x, weight, bias))


def test_masking_none_changes_no_bit():
    x, weight, bias, x_ref, weight_ref, _ = inputs(torch.float32, trained=True)
    plain, masked = (linear_kl(x, weight, x_ref, weight_ref, bias=bias, softcap=5.0, masked_target=masked)
                     for masked in (None, torch.full((S,), -1)))
    assert torch.equal(plain, masked)
    assert all(map(torch.equal, gradients(plain, [x, weight, bias]), gradients(masked, [x, weight, bias])))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_one_trained_tensor_alone(wanted, reduction):
    x, weight, bias, x_ref, weight_ref, _ = (t.detach() for t in inputs())
    leaf = dict(x=x, weight=weight, bias=bias)[wanted].requires_grad_()
    ours, theirs = (f(x, weight, x_ref, weight_ref, bias=bias, reduction=reduction) for f in (linear_kl, stock))
    assert_same(ours, theirs, [leaf])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("trained", [False, True])
def test_a_shared_head_is_two_equal_heads_of_which_one_is_frozen(divergence, trained):
    x, weight, bias, *_ = inputs(trained=trained)
    x_ref = torch.randn_like(x)
    leaves = [x, weight, bias] if trained else [x]
    shared = linear_kl(x, weight, x_ref, bias=bias, divergence=divergence)
    separate = linear_kl(x, weight, x_ref, weight.detach(), bias=bias, bias_ref=bias.detach(), divergence=divergence)
    assert_same(shared, separate, leaves, 1e-13)


def test_the_reference_gets_no_gradient():
    x, weight, _, x_ref, weight_ref, bias_ref = inputs()
    loss = linear_kl(x, weight, x_ref.requires_grad_(), weight_ref.requires_grad_(), bias_ref=bias_ref.requires_grad_())
    loss.backward()
    assert x.grad is not None and x_ref.grad is weight_ref.grad is bias_ref.grad is None
    assert not linear_kl(x.detach(), weight, x_ref, weight_ref, bias_ref=bias_ref).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_error_is_at_most_twice_that_of_torch(dtype, divergence):
    x, weight, bias, x_ref, weight_ref, _ = inputs(dtype, True, rows=70, width=64, vocabulary=1000, scale=0.4)
    leaves, call = [x, weight, bias], dict(divergence=divergence, softcap=20.0, logit_scale=0.5)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = stock(*doubles[:2], x_ref.double(), weight_ref.double(), bias=doubles[2], **call)
    ours = linear_kl(x, weight, x_ref, weight_ref, bias=bias, chunk_bytes=40 * 4000, **call)
    theirs = stock(x, weight, x_ref, weight_ref, bias=bias, **call)
    truth = [exact, *torch.autograd.grad(exact, doubles)]
    for mine, other, true in zip([ours, *torch.autograd.grad(ours, leaves)], [theirs, *torch.autograd.grad(theirs, leaves)], truth):
        assert error(mine, true) <= 2 * error(other, true) + (1e-6 if dtype == torch.float32 else 1e-5)


def test_results_are_fp32_and_gradients_have_the_dtype_of_their_tensor():
    x, weight, bias, x_ref, weight_ref, _ = inputs(torch.bfloat16, trained=True)
    loss = linear_kl(x, weight, x_ref, weight_ref, bias=bias)
    loss.backward()
    assert loss.dtype == torch.float32 and {t.grad.dtype for t in (x, weight, bias)} == {torch.bfloat16}


@settings(max_examples=25, deadline=None)
@given(rows=st.sampled_from([1, 2, 7, 8, 9, 31]), chunk_rows=st.integers(1, 40), trained=st.booleans(), shared=st.booleans(),
       reduction=st.sampled_from(["sum", "mean", "none"]), divergence=st.sampled_from(DIVERGENCES))
def test_chunk_size_changes_nothing_but_rounding(rows, chunk_rows, trained, shared, reduction, divergence):
    x, weight, _, x_ref, weight_ref, _ = inputs(trained=trained, rows=rows)
    side = (torch.randn_like(x),) if shared else (x_ref, weight_ref)
    losses = [linear_kl(x, weight, *side, divergence=divergence, reduction=reduction, chunk_bytes=size * ROW)
              for size in (chunk_rows, rows)]
    assert_same(*losses, [x, weight] if trained else [x], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wanted, products", [((False, False), 2), ((True, False), 3), ((True, True), 4)])
def test_no_tensor_is_larger_than_a_chunk_and_products_are_few(dtype, divergence, shared, wanted, products):
    rows, width, vocabulary, chunk_rows = 96, D_REF, 500, 16
    x, weight, _, x_ref, weight_ref, _ = (t.detach() for t in inputs(dtype, rows=rows, width=width, vocabulary=vocabulary))
    keep = weights_and_mask(rows)[1]
    chunk_bytes = chunk_rows * 2 * vocabulary * 4
    with Allocations() as seen:
        linear_kl_chunks(x, weight, x_ref, None if shared else weight_ref, None, None, None, keep, None,
                         **flags(*wanted, False, chunk_bytes, divergence=divergence, softcap=5.0, logit_scale=0.5))
    assert chunk_bytes // 2 <= seen.largest <= chunk_bytes
    assert seen.flop == products * 2 * int(keep.sum()) * width * vocabulary


@pytest.mark.parametrize("differentiate, products", [("nothing", 2), ("no_grad", 2), ("x", 3), ("all", 4), ("all, none", 6)])
def test_products_behind_the_public_function(monkeypatch, differentiate, products):
    """Counts two matmuls per call for the divergences and one per large gradient."""
    calls = []

    def recorded(*tensors, **flags):
        calls.append(2 + flags["want_x"] + flags["want_weight"])
        return linear_kl_chunks(*tensors, **flags)

    # `kernels.linear_kl` may be the function; only an import by name gives the module.
    monkeypatch.setattr(importlib.import_module("kernels.linear_kl"), "linear_kl_chunks", recorded)
    x, weight, _, x_ref, weight_ref, _ = inputs(trained=differentiate.startswith("all"))
    if differentiate == "nothing":
        x = x.detach()
    with torch.set_grad_enabled(differentiate != "no_grad"):
        loss = linear_kl(x, weight, x_ref, weight_ref, reduction="none" if differentiate.endswith("none") else "sum").sum()
    if loss.requires_grad:
        loss.backward()
    assert sum(calls) == products


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_nothing_kept_is_a_differentiable_zero(rows, trained, reduction):
    x, weight, bias, x_ref, weight_ref, _ = inputs(trained=trained, rows=rows)
    keep = torch.zeros(rows, dtype=torch.bool)
    loss = linear_kl(x, weight, x_ref, weight_ref, bias=bias, keep=keep if rows else None, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == ((rows,) if reduction == "none" else ()) and (loss == 0).all()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in ((x, weight, bias) if trained else (x,)))


def test_dropped_rows_are_never_read():
    x, weight, _, x_ref, weight_ref, _ = inputs()
    keep = weights_and_mask()[1]
    clean = linear_kl(x, weight, x_ref, weight_ref, keep=keep)
    spoilt = torch.where(keep[:, None], x.detach(), math.nan).requires_grad_()
    loss = linear_kl(spoilt, weight, torch.where(keep[:, None], x_ref, math.nan), weight_ref, keep=keep)
    assert torch.equal(loss, clean)
    assert torch.equal(torch.autograd.grad(loss, spoilt)[0], torch.autograd.grad(clean, x)[0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extremes(divergence):
    check_extremes(divergence, "cpu")
    check_masked_extremes(divergence, "cpu")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_small_divergences_keep_their_digits(divergence):
    check_small_divergences_keep_their_digits(divergence, "cpu")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bitwise_repeatable_twice_backward_and_inputs_unchanged(trained, reduction):
    tensors = x, weight, bias, x_ref, weight_ref, bias_ref = inputs(torch.float32, trained)
    before = [t.detach().clone() for t in tensors]
    leaves = [x, weight, bias] if trained else [x]
    loss, again = (linear_kl(x, weight, x_ref, weight_ref, bias=bias, bias_ref=bias_ref, divergence="reverse", softcap=5.0,
                             reduction=reduction) for _ in range(2))
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in
               zip(gradients(loss, leaves), gradients(loss, leaves), gradients(again, leaves)))
    assert all(torch.equal(t, old) for t, old in zip(tensors, before))


def test_strided_inputs():
    wide = torch.randn(S, 2 * D, dtype=torch.float64).requires_grad_()
    weight, wide_ref = torch.randn(D, V, dtype=torch.float64).t(), torch.randn(S, 2 * D, dtype=torch.float64)
    keep = weights_and_mask(2 * S)[1]
    for mask in (None, keep[::2]):
        assert_same(*(f(wide[:, ::2], weight, wide_ref[:, 1::2], keep=mask) for f in (linear_kl, stock)), [wide])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(trained, reduction, reentrant):
    x, weight, _, x_ref, weight_ref, _ = inputs(trained=trained)
    leaves = [x, weight] if trained else [x]

    def run(wrap):
        for leaf in leaves:
            leaf.grad = None
        wrap(lambda x: linear_kl(x, weight, x_ref, weight_ref, reduction=reduction).sum(), x).backward()
        return [leaf.grad for leaf in leaves]

    assert all(map(torch.equal, run(lambda f, x: f(x)), run(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_changes_nothing(reduction):
    x, weight, _, x_ref, weight_ref, _ = inputs(torch.float32, trained=True)
    plain = linear_kl(x, weight, x_ref, weight_ref, reduction=reduction)
    with torch.autocast("cpu"):
        cast = linear_kl(x, weight, x_ref, weight_ref, reduction=reduction)
        slopes = gradients(cast, [x, weight])
    assert torch.equal(plain, cast) and all(map(torch.equal, gradients(plain, [x, weight]), slopes))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph_with_dropped_rows(trained, reduction):
    torch._dynamo.reset()
    x, weight, _, x_ref, weight_ref, _ = inputs(torch.float32, trained)
    token_weight, keep = weights_and_mask(dtype=torch.float32)

    def loss(x, weight):
        return linear_kl(x, weight, x_ref, weight_ref, token_weight=token_weight, keep=keep, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, weight), loss(x, weight), [x, weight] if trained else [x], 1e-5)


@pytest.mark.parametrize("wants", [(False, False, False), (True, False, False), (True, True, True)])
@pytest.mark.parametrize("shared", [False, True])
def test_op_schema_and_fake_kernel(wants, shared):
    x, weight, bias, x_ref, weight_ref, bias_ref = (t.detach() for t in inputs(torch.bfloat16))
    token_weight, keep = weights_and_mask(dtype=torch.float32)
    side = (torch.randn_like(x), None, bias, None) if shared else (x_ref, weight_ref, bias, bias_ref)
    torch.library.opcheck(linear_kl_chunks.node, (x, weight, *side, token_weight, keep, masked_targets()),
                          flags(*wants, divergence="reverse", softcap=3.0))


@pytest.mark.parametrize("change, message", [
    (dict(weight=torch.zeros(V, D + 1)), r"expected x \[S, D\] and weight \[V, D\], got \(2, 6\) and \(17, 7\)"),
    (dict(x_ref=torch.zeros(3, D)), r"expected x_ref \(2, D'\) and the reference's weight \(17, D'\), got \(3, 6\) and \(17, 6\)"),
    (dict(weight_ref=torch.zeros(V + 1, D)), r"expected x_ref \(2, D'\) .* \(17, D'\), got \(2, 6\) and \(18, 6\)"),
    (dict(weight=torch.zeros(V, D).bfloat16()), "one floating dtype on one device, got torch.float32 on cpu, torch.bfloat16 on cpu"),
    (dict(x_ref=torch.zeros(2, D, device="meta")), "one floating dtype on one device, got .*torch.float32 on meta"),
    (dict(bias=torch.zeros(3)), r"expected bias torch.float32 of shape \(17,\) on cpu, got torch.float32 \(3,\) on cpu"),
    (dict(bias_ref=torch.zeros(V)), "expected no bias_ref where both sides share one head, got bias_ref without weight_ref"),
    (dict(token_weight=torch.zeros(3)), r"expected token_weight of shape \(2,\) on cpu, got torch.float32 \(3,\)"),
    (dict(keep=torch.zeros(2)), r"expected keep torch.bool of shape \(2,\) on cpu, got torch.float32 \(2,\)"),
    (dict(masked_target=torch.zeros(2)), r"expected masked_target torch.int64 of shape \(2,\) on cpu, got torch.float32 \(2,\)"),
    (dict(masked_target=torch.tensor([-1, V])), r"expected masked_target in \[-1, 17\), got -1 to 17"),
    (dict(weight=torch.zeros(1, D), masked_target=torch.tensor([0, 0])), "expected a vocabulary of at least two tokens beside .*, got 1"),
    (dict(divergence="js"), "expected divergence in .*, got 'js'"),
    (dict(divergence="jensen_shannon", beta=1.0), "expected beta between 0 and 1 .*, got 1.0"),
    (dict(softcap=0.0), "expected softcap > 0 or None, got 0.0"),
    (dict(temperature=-1.0), "expected temperature > 0, got -1.0"),
    (dict(reduction="avg"), "expected reduction in .*, got 'avg'"),
])
def test_mistakes_are_named(change, message):
    call = dict(x=torch.zeros(2, D), weight=torch.zeros(V, D), x_ref=torch.zeros(2, D)) | change
    with pytest.raises(ValueError, match="linear_kl: .*" + message):
        linear_kl(**call)
