"""Two heads and their divergence, against torch's kl_div of the whole logits in fp64."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels._cross_entropy_rows import new_logits
from kernels._dispatch import backend_mode
from kernels._kl_rows import DIVERGENCES, Rule, kl_rows
from kernels.linear_kl import linear_kl, linear_kl_chunks
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, error, given, poisoned, runs_triton, settings, st, triton_mode

S, D, D_REF, V = 13, 6, 5, 17
ROW = 2 * V * 8  # bytes of both sides' fp64 logits of one row
EVERY_OPTION = dict(softcap=3.0, logit_scale=0.7, temperature=1.5, beta=0.3)


def inputs(dtype=torch.float64, trained=False, rows=S, width=D, vocabulary=V, scale=1.0, device="cpu"):
    """x, weight, bias of the student, x_ref, weight_ref, bias_ref of the reference."""

    def normal(*shape, requires_grad=False):
        return torch.randn(shape, dtype=torch.float64).mul(scale).to(device, dtype).requires_grad_(requires_grad)

    return (normal(rows, width, requires_grad=True), normal(vocabulary, width, requires_grad=trained),
            normal(vocabulary, requires_grad=trained), normal(rows, D_REF), normal(vocabulary, D_REF), normal(vocabulary))


def weights_and_mask(rows=S, dtype=torch.float64):
    keep = torch.ones(rows, dtype=torch.bool)
    keep[1::3] = False
    return torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32)) + 0.1, keep


def divergence_of(z, z_ref, divergence, beta):
    """Per row, from full logits, by torch's own kl_div; the mixture as TRL's GKDTrainer makes it."""
    log_p, log_q = z.log_softmax(-1), z_ref.log_softmax(-1)

    def kl(of, to):
        return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if divergence == "forward":
        return kl(log_q, log_p)
    if divergence == "reverse":
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def stock(x, weight, x_ref, weight_ref=None, *, divergence="forward", beta=0.5, bias=None, bias_ref=None, token_weight=None, keep=None,
          softcap=None, logit_scale=1.0, temperature=1.0, reduction="sum"):
    """Return the loss from full logits, statistics in fp32 or better, the reference detached."""
    if weight_ref is None:
        weight_ref, bias_ref = weight.detach(), None if bias is None else bias.detach()
    exact = torch.promote_types(x.dtype, torch.float32)
    z, z_ref = (F.linear(*side).to(exact) * logit_scale for side in ((x, weight, bias), (x_ref, weight_ref, bias_ref)))
    if softcap is not None:
        z, z_ref = (softcap * torch.tanh(t / softcap) for t in (z, z_ref))
    losses = divergence_of(z / temperature, z_ref / temperature, divergence, beta)
    scale = torch.ones_like(losses) if token_weight is None else token_weight.to(exact)
    scale = scale if keep is None else torch.where(keep, scale, 0.0)
    if reduction == "none":
        return losses * scale
    total = (losses * scale).sum()
    return total / scale.sum() if reduction == "mean" else total


def gradients(loss, tensors):
    """Gradients under an uneven upstream, which a backward that ignores it would not survive."""
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return torch.autograd.grad(loss, tensors, upstream, retain_graph=True)


def assert_same(ours, theirs, leaves, tolerance=1e-11):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients(ours, leaves), gradients(theirs, leaves), rtol=tolerance, atol=tolerance)


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


def flags(want_x, want_weight, want_bias, chunk_bytes=None, **rule):
    """Return the operator's keyword arguments."""
    rule = dict(divergence="forward", beta=0.5, softcap=None, logit_scale=1.0, temperature=1.0) | rule
    return rule | dict(chunk_bytes=chunk_bytes, want_x=want_x, want_weight=want_weight, want_bias=want_bias)


class Allocations(TorchDispatchMode):
    """The size in bytes of the largest tensor an op returns, and the FLOP of the products computed."""

    def __init__(self):
        super().__init__()
        self.largest, self.flop = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.out):
            *_, a, b = args
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result


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
        linear_kl_chunks(x, weight, x_ref, None if shared else weight_ref, None, None, None, keep,
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


def check_extremes(divergence, device):
    """Check a student that equals its reference, huge logits, a common shift and logits of −∞."""
    x, weight, _, x_ref, weight_ref, _ = inputs(torch.float32, rows=5, vocabulary=300, scale=2.0, device=device)
    call = dict(divergence=divergence, reduction="none", beta=0.3)

    same = linear_kl(x, weight, x.detach(), **call)
    assert (same == 0).all() and torch.autograd.grad(same.sum(), x)[0].abs().max() <= 1e-5

    near = linear_kl(x, weight, x.detach() + 1e-3 * torch.randn_like(x), **call)
    assert (near > -1e-7).all() and (near < 1e-3).all() and near.sum() > 0

    huge = linear_kl(x * 1e4, weight, x_ref * 1e4, weight_ref, **call)
    slope, = torch.autograd.grad(huge.sum(), x)
    exact = stock(*(t.double() for t in (x * 1e4, weight, x_ref * 1e4, weight_ref)), **call)
    torch.testing.assert_close(huge.double(), exact, rtol=1e-5, atol=1e-5)
    assert slope.isfinite().all()

    shift = torch.full((300,), 8192.0, device=device)  # of logits that are whole numbers, so that the sum rounds nothing away
    bias = torch.zeros_like(shift)
    moved, still = (linear_kl(x.detach().round(), weight.round(), x_ref.round(), weight_ref.round(), bias=b, **call) for b in (shift, bias))
    torch.testing.assert_close(moved, still, rtol=1e-5, atol=1e-6)

    masked = torch.zeros(300, device=device)
    masked[::2] = -math.inf
    loss = linear_kl(x, weight, x_ref, weight_ref, bias=masked, bias_ref=masked, **call)
    rest = linear_kl(x, weight[1::2], x_ref, weight_ref[1::2], **call)
    torch.testing.assert_close(loss, rest, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (loss, rest)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extremes(divergence):
    check_extremes(divergence, "cpu")


def check_small_divergences_keep_their_digits(divergence, device):
    """Check logits 0.004 apart in fp32, where adding Σ(p − q) reduces the rounding error of kl_div."""
    z = torch.randn(32, 1000).mul(3).to(device)
    z_ref = z + torch.randn(32, 1000).mul(4e-3).to(device)
    truth = divergence_of(z.double(), z_ref.double(), divergence, 0.5)
    u, u_ref = (new_logits(32, 1000, z).copy_(t) for t in (z, z_ref))
    loss = kl_rows(u, u_ref, None, Rule(divergence, 0.5, None, 1.0, 1.0), False)
    assert (loss - truth).abs().max() <= 1.2e-7 and loss.min() > 0


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
    torch.library.opcheck(linear_kl_chunks.node, (x, weight, *side, token_weight, keep), flags(*wants, divergence="reverse", softcap=3.0))


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


# ---------------------------------------------------------------- Triton


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
            results.append((kl_rows(*buffers, scale, rule, True), buffers[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)


@runs_triton
def test_kernel_softcap_keeps_the_digits_of_small_logits():
    u, u_ref = torch.randn(2, 8, 64, dtype=torch.float64).mul(0.01).float()
    rule, slopes = Rule("forward", 0.5, 50.0, 1.0, 1.0), []
    for mode, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        with backend_mode(mode):
            buffer = u.to(DEVICE, dtype, copy=True)
            kl_rows(buffer, u_ref.to(DEVICE, dtype, copy=True), None, rule, True)
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
        torch.library.opcheck(linear_kl_chunks.node, (*(t.detach() for t in (x, weight, x_ref, weight_ref)), None, None, None, None),
                              flags(True, True, False, divergence="reverse"))
    theirs = stock(x, weight, x_ref, weight_ref, divergence="reverse", reduction=reduction)
    torch.testing.assert_close(compiled, theirs)
    torch.testing.assert_close(slopes, gradients(theirs, [x, weight]))
