"""Head and cross entropy, against torch's cross entropy of the whole logits in fp64."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.linear_cross_entropy import Settings, _op, linear_cross_entropy, linear_cross_entropy_reference, linear_log_prob
from tests.kernels import given, settings, st

S, D, V = 13, 6, 17
ROW = V * 8  # bytes of one fp64 row of logits


def inputs(dtype=torch.float64, trained=False, rows=S, width=D, vocabulary=V, scale=1.0):
    x = (torch.randn(rows, width) * scale).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_(trained)
    bias = torch.randn(vocabulary).to(dtype).requires_grad_(trained)
    target = torch.randint(vocabulary, (rows,))
    target[1::3] = -100
    return x, weight, bias, target, torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32)) + 0.1


def stock(x, weight, target, *, bias=None, token_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
          softcap=None, logit_scale=1.0, reduction="sum"):
    """The formula over full logits; the statistics follow the dtype of x."""
    z = F.linear(x, weight, bias) * logit_scale
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    losses = F.cross_entropy(z, torch.where(kept, target, -1), ignore_index=-1, reduction="none",
                             label_smoothing=label_smoothing)
    losses = losses + torch.where(kept, z_loss * z.logsumexp(-1) ** 2, 0.0)
    scale = torch.ones_like(losses) if token_weight is None else token_weight.to(losses.dtype)
    if reduction == "none":
        return losses * scale
    total = (losses * scale).sum()
    return total / scale[kept].sum() if reduction == "mean" else total


def gradients(loss, tensors):
    """Gradients under an uneven upstream, which a backward that ignores it would not survive."""
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view_as(loss)
    return torch.autograd.grad(loss, tensors, upstream)


OPTIONS = [dict(zip(("label_smoothing", "z_loss", "softcap", "logit_scale"), values))
           for values in itertools.product((0.0, 0.2), (0.0, 0.05), (None, 3.0), (1.0, 0.7))]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_match_full_logits(trained, reduction, weighted):
    for options, biased in itertools.product(OPTIONS, (False, True)):
        x, weight, bias, target, token_weight = inputs(trained=trained)
        call = dict(options, reduction=reduction, bias=bias if biased else None,
                    token_weight=token_weight if weighted else None)
        leaves = [x] + ([weight] + [bias] * biased if trained else [])
        ours = linear_cross_entropy(x, weight, target, chunk_bytes=4 * ROW, **call)
        theirs = stock(x, weight, target, **call)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(ours, leaves), gradients(theirs, leaves), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("ignore_index", [-100, None])
def test_gradcheck_with_every_option(trained, reduction, ignore_index):
    x, weight, bias, target, token_weight = inputs(trained=trained, rows=5, width=3, vocabulary=4)
    if ignore_index is None:
        target = target.clamp_min(0)
    token_weight.requires_grad_()

    def loss(x, weight, bias, token_weight):
        return linear_cross_entropy(
            x, weight, target, bias=bias, token_weight=token_weight, ignore_index=ignore_index, label_smoothing=0.1,
            z_loss=0.01, softcap=2.0, logit_scale=0.8, reduction=reduction, chunk_bytes=2 * 4 * 8)

    assert gradcheck(loss, (x, weight, bias, token_weight))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_one_trained_tensor_alone(wanted, reduction):
    x, weight, bias, target, _ = (t.detach() for t in inputs())
    leaf = dict(x=x, weight=weight, bias=bias)[wanted].requires_grad_()
    ours, theirs = (f(x, weight, target, bias=bias, reduction=reduction) for f in (linear_cross_entropy, stock))
    torch.testing.assert_close(gradients(ours, [leaf]), gradients(theirs, [leaf]))


def test_log_prob():
    x, weight, bias, target, _ = inputs()
    ours = linear_log_prob(x, weight, target, bias=bias, softcap=4.0, logit_scale=0.5)
    theirs = -stock(x, weight, target, bias=bias, softcap=4.0, logit_scale=0.5, reduction="none")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, [x]), gradients(theirs, [x]))
    assert (ours[1::3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1, z_loss=1e-3, softcap=20.0, logit_scale=0.5)])
def test_error_is_at_most_twice_that_of_torch(dtype, trained, options):
    x, weight, bias, target, _ = inputs(dtype, trained, rows=150, width=64, vocabulary=1000, scale=0.4)
    leaves = [x, weight, bias] if trained else [x]
    exact_leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
    exact = stock(exact_leaves[0], exact_leaves[1], target, bias=exact_leaves[2], **options)
    exact = [exact, *torch.autograd.grad(exact, exact_leaves[: len(leaves)])]

    def errors(loss):
        values = [loss, *torch.autograd.grad(loss, leaves)]
        return [(value.double() - true).norm() / true.norm() for value, true in zip(values, exact)]

    ours = errors(linear_cross_entropy(x, weight, target, bias=bias, chunk_bytes=40 * 4000, **options))
    theirs = errors(stock(x, weight, target, bias=bias, **options))
    tiny = 1e-6 if dtype == torch.float32 else 1e-5
    assert all(mine <= 2 * other + tiny for mine, other in zip(ours, theirs)), (ours, theirs)


def test_results_are_fp32_and_gradients_have_the_dtype_of_their_tensor():
    x, weight, bias, target, _ = inputs(torch.bfloat16, trained=True)
    loss = linear_cross_entropy(x, weight, target, bias=bias)
    loss.backward()
    assert loss.dtype == torch.float32 and linear_log_prob(x, weight, target).dtype == torch.float32
    assert {t.grad.dtype for t in (x, weight, bias)} == {torch.bfloat16}


@settings(max_examples=25, deadline=None)
@given(rows=st.sampled_from([1, 2, 7, 8, 9, 31]), chunk_rows=st.integers(1, 40), trained=st.booleans(),
       reduction=st.sampled_from(["sum", "mean", "none"]))
def test_chunk_size_changes_nothing_but_rounding(rows, chunk_rows, trained, reduction):
    x, weight, _, target, token_weight = inputs(trained=trained, rows=rows)
    leaves = [x, weight] if trained else [x]
    losses = [linear_cross_entropy(x, weight, target, token_weight=token_weight, reduction=reduction,
                                   chunk_bytes=size * ROW) for size in (chunk_rows, rows)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(gradients(loss, leaves) for loss in losses), rtol=1e-12, atol=1e-12)


class Allocations(TorchDispatchMode):
    """Sizes in bytes of every tensor an op returns, and the products computed."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted, products", [("", 1), ("x", 2), ("x weight", 3)])
def test_no_tensor_is_larger_than_a_chunk_and_products_are_few(dtype, wanted, products):
    rows, width, vocabulary, chunk_rows = 96, 4, 500, 16
    tensors = inputs(dtype, rows=rows, width=width, vocabulary=vocabulary)
    x, weight, _, target, token_weight = (t.detach() for t in tensors)
    choices = Settings(-100, 0.1, 0.01, 5.0, 0.5, chunk_rows * vocabulary * 4)
    with Allocations() as seen:
        linear_cross_entropy_reference(x, weight, target, None, token_weight, choices, "x" in wanted,
                                       "weight" in wanted, False)
    assert seen.largest == chunk_rows * vocabulary * 4
    kept = int((target >= 0).sum())
    assert kept == 64 and seen.products == products * kept // chunk_rows


@pytest.mark.parametrize("differentiate, products",
                         [("nothing", 1), ("no_grad", 1), ("x", 2), ("all", 3), ("all, none", 4)])
def test_products_behind_the_public_function(monkeypatch, differentiate, products):
    """Counts what each call of the op asks for: one product for the losses and one for each large gradient."""
    asked = []

    def counted(*args):
        asked.append(1 + args[-3] + args[-2])
        return _op(*args)

    # The package lends the module's name to the function, so the module is asked for by import.
    monkeypatch.setattr(importlib.import_module("kernels.linear_cross_entropy"), "_op", counted)
    x, weight, _, target, _ = inputs(trained=differentiate.startswith("all"))
    if differentiate == "nothing":
        x = x.detach()
    with torch.set_grad_enabled(differentiate != "no_grad"):
        reduction = "none" if differentiate.endswith("none") else "sum"
        loss = linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    if loss.requires_grad:
        loss.backward()
    assert sum(asked) == products


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_nothing_supervised_is_a_differentiable_zero(rows, trained, reduction):
    x, weight, bias, target, _ = inputs(trained=trained, rows=rows)
    loss = linear_cross_entropy(x, weight, torch.full_like(target, -100), bias=bias, z_loss=0.1, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == ((rows,) if reduction == "none" else ()) and (loss == 0).all()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in ((x, weight, bias) if trained else (x,)))


def test_all_weights_zero_is_a_differentiable_zero():
    x, weight, _, target, token_weight = inputs()
    loss = linear_cross_entropy(x, weight, target, token_weight=torch.zeros_like(token_weight), reduction="mean")
    loss.backward()
    assert loss == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_ignored_rows_are_never_read():
    x, weight, _, target, token_weight = inputs()
    clean = linear_cross_entropy(x, weight, target, token_weight=token_weight)
    poisoned = x.detach().clone()
    poisoned[1::3] = float("nan")
    poisoned.requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, target, token_weight=token_weight)
    assert torch.equal(loss, clean)
    assert torch.equal(torch.autograd.grad(loss, poisoned)[0], torch.autograd.grad(clean, x)[0])


def test_large_logits_stay_finite():
    x, weight, _, target, _ = inputs(torch.float32, trained=True, scale=1e4)
    loss = linear_cross_entropy(x, weight, target)
    loss.backward()
    torch.testing.assert_close(loss, stock(x, weight, target))
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bitwise_repeatable_twice_backward_and_inputs_unchanged(trained, reduction):
    x, weight, bias, target, token_weight = tensors = inputs(torch.float32, trained)
    before = [t.detach().clone() for t in tensors]
    leaves = [x, weight, bias] if trained else [x]
    loss, again = (linear_cross_entropy(x, weight, target, bias=bias, token_weight=token_weight, label_smoothing=0.1,
                                        softcap=5.0, logit_scale=0.5, reduction=reduction) for _ in range(2))
    upstream = torch.full_like(loss, 0.3)
    first, second = (torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for _ in range(2))
    third = torch.autograd.grad(again, leaves, upstream)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third))
    assert all(torch.equal(t, old) for t, old in zip(tensors, before))


def test_strided_inputs():
    wide = torch.randn(S, 2 * D, dtype=torch.float64).requires_grad_()
    weight, target = torch.randn(D, V, dtype=torch.float64).t(), torch.randint(V, (2 * S,))[::2]
    ours, theirs = (f(wide[:, ::2], weight, target) for f in (linear_cross_entropy, stock))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, [wide]), gradients(theirs, [wide]))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(trained, reduction, reentrant):
    x, weight, _, target, _ = inputs(trained=trained)
    leaves = [x, weight] if trained else [x]

    def run(wrap):
        for leaf in leaves:
            leaf.grad = None
        wrap(lambda x: linear_cross_entropy(x, weight, target, reduction=reduction).sum(), x).backward()
        return [leaf.grad for leaf in leaves]

    direct = run(lambda f, x: f(x))
    assert all(map(torch.equal, direct, run(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph_with_ignored_rows(trained, reduction):
    torch._dynamo.reset()
    x, weight, _, target, token_weight = inputs(torch.float32, trained)
    leaves = [x, weight] if trained else [x]

    def loss(x, weight):
        return linear_cross_entropy(x, weight, target, token_weight=token_weight, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), loss(x, weight))
    torch.testing.assert_close(gradients(compiled(x, weight), leaves), gradients(loss(x, weight), leaves))


@pytest.mark.parametrize("wants", [(False, False, False), (True, False, False), (True, True, True)])
def test_op_schema_and_fake_kernel(wants):
    x, weight, bias, target, token_weight = (t.detach() for t in inputs(torch.bfloat16))
    torch.library.opcheck(_op, (x, weight, target, bias, token_weight, -100, 0.1, 0.0, None, 1.0, None, *wants))


@pytest.mark.parametrize("change, message", [
    (dict(target=torch.tensor([0, V])), rf"expected targets in \[0, {V}\) or ignore_index -100, got {V} at row 1"),
    (dict(target=torch.tensor([-1, 0])), r"got -1 at row 0"),
    (dict(target=torch.tensor([-100, 0]), ignore_index=None), rf"expected targets in \[0, {V}\), got -100 at row 0"),
    (dict(target=torch.tensor([0])), r"expected target int64 of shape \(2,\), got torch.int64 \(1,\)"),
    (dict(weight=torch.zeros(V, D + 1)), r"expected x \[S, D\] and weight \[V, D\], got \(2, 6\) and \(17, 7\)"),
    (dict(weight=torch.zeros(V, D).bfloat16()), "one floating dtype, got torch.float32 and torch.bfloat16"),
    (dict(bias=torch.zeros(3)), r"expected bias torch.float32 of shape \(17,\), got torch.float32 \(3,\)"),
    (dict(token_weight=torch.zeros(3)), r"expected token_weight of shape \(2,\), got \(3,\)"),
    (dict(reduction="avg"), "expected reduction 'sum', 'mean' or 'none', got 'avg'"),
    (dict(softcap=0.0), "expected softcap > 0 or None, got 0.0"),
])
def test_mistakes_are_named(change, message):
    call = dict(x=torch.zeros(2, D), weight=torch.zeros(V, D), target=torch.zeros(2, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match="linear_cross_entropy: .*" + message):
        linear_cross_entropy(**call)
