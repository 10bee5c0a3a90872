"""Head and cross entropy, against torch's cross entropy of the whole logits in fp64."""

import importlib
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from kernels._cross_entropy_rows import Loss
from kernels.linear_cross_entropy import (
    even_chunks,
    linear_cross_entropy,
    linear_cross_entropy_chunks,
    linear_cross_entropy_statistics,
    linear_log_prob,
    rows_per_chunk,
)
from kernels.lora import Lora
from tests.helpers.allocations import Allocations
from tests.helpers.cross_entropy_cases import FLAGS, ROW, D, S, V, adapter, entropy_weights, gradients, inputs, stock
from tests.helpers.kernels import error, given, settings, st

OPTIONS = [dict(zip(("label_smoothing", "z_loss", "softcap", "logit_scale", "temperature"), values))
           for values in itertools.product((0.0, 0.2), (0.0, 0.05), (None, 3.0), (1.0, 0.7), (1.0, 0.6))]


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
            z_loss=0.01, softcap=2.0, logit_scale=0.8, temperature=0.7, reduction=reduction, chunk_bytes=2 * 4 * 8)

    assert gradcheck(loss, (x, weight, bias, token_weight))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_gradcheck_with_lora(trained, reduction):
    x, weight, bias, target, token_weight = inputs(trained=trained, rows=5, width=3, vocabulary=4)
    lora = adapter(rank=2, width=3, vocabulary=4)

    def loss(x, weight, bias, A, B):
        return linear_cross_entropy(x, weight, target, bias=bias, lora=Lora(A, B, 0.6), token_weight=token_weight, label_smoothing=0.1,
                                    softcap=2.0, reduction=reduction, chunk_bytes=2 * 4 * 8)

    assert gradcheck(loss, (x, weight, bias, lora.A, lora.B))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("vocabulary", [17, 20, 61])
def test_entropies_weight_rows_and_are_held_constant(trained, reduction, vocabulary):
    for options, adapted in itertools.product(OPTIONS[::5], (False, True)):
        x, weight, bias, target, token_weight = inputs(trained=trained, vocabulary=vocabulary)
        chosen, lora = torch.rand(S) < 0.6, adapter(vocabulary=vocabulary) if adapted else None
        call = dict(options, reduction=reduction, bias=bias, lora=lora, token_weight=token_weight, entropy_weighted=chosen)
        leaves = [x] + [weight, bias] * trained + ([lora.A, lora.B] if adapted else [])
        ours = linear_cross_entropy(x, weight, target, chunk_bytes=4 * vocabulary * 8, **call)
        theirs = stock(x, weight, target, **call)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(ours, leaves), gradients(theirs, leaves), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_gradcheck_of_entropy_weighted_rows(trained, reduction):
    """The weights are constants, so the loss with these weights given is what the gradient belongs to."""
    x, weight, bias, target, token_weight = inputs(trained=trained, rows=5, width=3, vocabulary=4)
    total = token_weight[target != -100].sum()
    held = token_weight * entropy_weights(F.linear(x, weight, bias))

    def with_weights(x, weight, bias):
        loss = linear_cross_entropy(x, weight, target, bias=bias, token_weight=held, reduction="none")
        return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / total}[reduction]

    ours = linear_cross_entropy(x, weight, target, bias=bias, token_weight=token_weight, entropy_weighted=torch.ones(5, dtype=torch.bool),
                                reduction=reduction)
    leaves = [x, weight, bias] if trained else [x]
    assert gradcheck(with_weights, (x, weight, bias))
    torch.testing.assert_close(gradients(ours, leaves), gradients(with_weights(x, weight, bias), leaves), rtol=1e-12, atol=1e-12)


def test_entropies_of_sure_and_unsure_rows():
    """All equal: 1; one certain: 0; two equal beside nothing, in a wide row: log 2 / log 20; weighting no row changes no bit."""
    logits = torch.zeros(4, 50)
    logits[1, 7], logits[2, [3, 40]], logits[3, 20:] = 200.0, 200.0, -1e4
    target = torch.full((4,), 7)
    losses = linear_cross_entropy(torch.eye(4), logits.t().contiguous(), target, reduction="none")
    found = linear_cross_entropy(torch.eye(4), logits.t().contiguous(), target, reduction="none", entropy_weighted=target > 0)
    torch.testing.assert_close(found, losses * torch.tensor([1.0, 0.0, math.log(2) / math.log(20), 1.0]))
    x, weight, bias, target, token_weight = inputs(torch.float32, trained=True)
    plain, none = (linear_cross_entropy(x, weight, target, bias=bias, token_weight=token_weight, entropy_weighted=chosen)
                   for chosen in (None, target > V))
    assert torch.equal(plain, none) and all(map(torch.equal, *(gradients(loss, [x, weight, bias]) for loss in (plain, none))))


@pytest.mark.parametrize("wanted", ["x", "weight", "A", "B", "x A B", "x weight A B"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_lora_matches_full_logits(reduction, wanted):
    x, weight, bias, target, token_weight = inputs()
    lora = adapter()
    leaves = dict(x=x, weight=weight, A=lora.A, B=lora.B)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted.split())
    leaves = [leaves[name] for name in wanted.split()]
    call = dict(bias=bias, lora=lora, token_weight=token_weight, reduction=reduction, z_loss=0.05, temperature=0.8)
    ours, theirs = linear_cross_entropy(x, weight, target, chunk_bytes=4 * ROW, **call), stock(x, weight, target, **call)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours, leaves), gradients(theirs, leaves), rtol=1e-11, atol=1e-11)


def test_lora_of_another_dtype_gets_gradients_of_its_own():
    x, weight, _, target, _ = inputs(torch.bfloat16, rows=60, width=16, vocabulary=100)
    lora = adapter(torch.float32, width=16, vocabulary=100)
    loss = linear_cross_entropy(x, weight, target, lora=lora, chunk_bytes=8 * 400)
    grads = torch.autograd.grad(loss, [x, lora.A, lora.B])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in (x, lora.A, lora.B)]
    truth = torch.autograd.grad(stock(exact[0], weight.double(), target, lora=Lora(*exact[1:], lora.scaling)), exact)
    theirs = torch.autograd.grad(stock(x, weight, target, lora=lora), [x, lora.A, lora.B])
    assert all(error(g, t) <= 2 * error(other, t) + 1e-6 for g, other, t in zip(grads, theirs, truth))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_one_trained_tensor_alone(wanted, reduction):
    x, weight, bias, target, _ = (t.detach() for t in inputs())
    leaf = dict(x=x, weight=weight, bias=bias)[wanted].requires_grad_()
    ours, theirs = (f(x, weight, target, bias=bias, reduction=reduction) for f in (linear_cross_entropy, stock))
    torch.testing.assert_close(gradients(ours, [leaf]), gradients(theirs, [leaf]))


def distribution(x, weight, **options):
    """softmax's logarithm over full logits, token by token."""
    return torch.stack([-stock(x, weight, torch.full_like(x[:, 0], v, dtype=torch.int64), reduction="none", **options)
                        for v in range(weight.shape[0])], 1)


STATISTICS_OPTIONS = [{}, dict(softcap=3.0, temperature=0.7, logit_scale=0.9)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("options", STATISTICS_OPTIONS)
def test_statistics(trained, reduction, options):
    x, weight, bias, target, token_weight = inputs(trained=trained)
    target[0] = distribution(x, weight, bias=bias)[0].argmax()
    call = dict(options, bias=bias, token_weight=token_weight, label_smoothing=0.1, z_loss=0.01, reduction=reduction, chunk_bytes=4 * ROW)
    ours, plain = linear_cross_entropy_statistics(x, weight, target, **call), linear_cross_entropy(x, weight, target, **call)
    leaves = [x, weight, bias] if trained else [x]
    assert torch.equal(ours.loss, plain) and all(map(torch.equal, gradients(ours.loss, leaves), gradients(plain, leaves)))

    log_p, kept = distribution(x, weight, bias=bias, **options), target != -100
    truth = dict(log_prob=log_p.gather(1, target.clamp_min(0)[:, None])[:, 0], entropy=-(log_p.exp() * log_p).sum(1),
                 correct=log_p.argmax(1) == target)
    assert truth["correct"][0]
    for name, true in truth.items():
        value = getattr(ours, name)
        torch.testing.assert_close(value, torch.where(kept, true, torch.zeros_like(true)), rtol=1e-12, atol=1e-12)
        assert not value.requires_grad and value.grad_fn is None


def test_of_equal_logits_the_first_is_the_argmax():
    target = torch.tensor([0, 1, 2])
    correct = linear_cross_entropy_statistics(torch.ones(3, 1), torch.tensor([[0.0], [1.0], [1.0]]), target).correct
    assert correct.tolist() == [False, True, False]


def test_log_prob():
    x, weight, bias, target, _ = inputs()
    ours = linear_log_prob(x, weight, target, bias=bias, softcap=4.0, logit_scale=0.5, temperature=0.9)
    theirs = -stock(x, weight, target, bias=bias, softcap=4.0, logit_scale=0.5, temperature=0.9, reduction="none")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted, products", [("", 1), ("x", 2), ("x weight", 3)])
def test_no_tensor_is_larger_than_a_chunk_and_products_are_few(dtype, wanted, products):
    rows, width, vocabulary, chunk_rows = 96, 4, 500, 16
    tensors = inputs(dtype, rows=rows, width=width, vocabulary=vocabulary)
    x, weight, _, target, token_weight = (t.detach() for t in tensors)
    with Allocations() as seen:
        flags = FLAGS | Loss(0.1, 0.01, 5.0, 0.5, 1.0)._asdict() | dict(chunk_bytes=chunk_rows * vocabulary * 4)
        linear_cross_entropy_chunks(x, weight, None, None, None, target, token_weight, None, **flags,
                                    wanted=["x" in wanted, "weight" in wanted, False, False, False])
    assert seen.largest == chunk_rows * vocabulary * 4
    kept = int((target >= 0).sum())
    assert kept == 64 and seen.products == products * kept // chunk_rows


@pytest.mark.parametrize("differentiate, products", [("nothing", 1), ("no_grad", 1), ("x", 2), ("all", 3), ("all, none", 4),
                                                     ("lora", 2), ("lora, none", 3), ("all, statistics", 3), ("x, statistics", 2),
                                                     ("all, entropies", 3), ("x, entropies", 2)])
def test_products_behind_the_public_function(monkeypatch, differentiate, products):
    """Counts one matmul per call for the losses and one per large gradient."""
    calls = []

    def recorded(*tensors, wanted, **flags):
        calls.append(1 + wanted[0] + wanted[1])
        return linear_cross_entropy_chunks(*tensors, wanted=wanted, **flags)

    # `kernels.linear_cross_entropy` is the function; only an import by name gives the module.
    monkeypatch.setattr(importlib.import_module("kernels.linear_cross_entropy"), "linear_cross_entropy_chunks", recorded)
    x, weight, _, target, _ = inputs(trained=differentiate.startswith("all"))
    if differentiate == "nothing":
        x = x.detach()
    with torch.set_grad_enabled(differentiate != "no_grad"):
        reduction = "none" if differentiate.endswith("none") else "sum"
        lora = adapter() if differentiate.startswith("lora") else None
        op = linear_cross_entropy_statistics if differentiate.endswith("statistics") else linear_cross_entropy
        more = dict(entropy_weighted=target > 3) if differentiate.endswith("entropies") else {}
        result = op(x, weight, target, lora=lora, reduction=reduction, **more)
        loss = (result.loss if differentiate.endswith("statistics") else result).sum()
    if loss.requires_grad:
        loss.backward()
    assert sum(calls) == products


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


@pytest.mark.parametrize("wanted", [[False] * 5, [True] + [False] * 4, [True] * 5])
@pytest.mark.parametrize("statistics", [False, True])
def test_op_schema_and_fake_kernel(wanted, statistics):
    x, weight, bias, target, token_weight = (t.detach() for t in inputs(torch.bfloat16))
    A, B = torch.randn(2, D), torch.randn(V, 2)
    flags = FLAGS | dict(lora_scaling=2.0, label_smoothing=0.1, temperature=0.7, statistics=statistics, wanted=wanted)
    torch.library.opcheck(linear_cross_entropy_chunks.node, (x, weight, bias, A, B, target, token_weight, target > 3), flags)


def test_autocast_is_not_consulted():
    x, weight, bias, target, token_weight = inputs(torch.float32, trained=True)
    lora = adapter(torch.float32)
    leaves = [x, weight, bias, lora.A, lora.B]
    for reduction in ("sum", "none"):
        call = dict(bias=bias, lora=lora, token_weight=token_weight, reduction=reduction)
        plain = linear_cross_entropy(x, weight, target, **call)
        with torch.autocast("cpu", torch.bfloat16):
            cast = linear_cross_entropy(x, weight, target, **call)
            assert all(map(torch.equal, gradients(cast, leaves), gradients(plain, leaves))) and torch.equal(cast, plain)


def test_tokens_that_the_head_rules_out():
    x, weight, bias, target, _ = inputs(trained=True)
    bias.detach()[(target[0] + 1) % V] = -torch.inf
    ours, theirs = linear_cross_entropy(x, weight, target, bias=bias), stock(x, weight, target, bias=bias)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, [x, weight, bias]), gradients(theirs, [x, weight, bias]))
    assert linear_cross_entropy_statistics(x, weight, target, bias=bias).entropy.isfinite().all()


@pytest.mark.parametrize("vocabulary", [257, 32000, 128256, 151936, 262144])
def test_rows_of_a_chunk(vocabulary):
    """At least 2048 on a GPU, whole tiles, and no more than half a gigabyte beyond that; a stated budget is kept."""
    rows = rows_per_chunk(vocabulary, torch.bfloat16, "cuda")
    assert rows % 128 == 0 and rows >= 2048 and (rows == 2048 or rows * vocabulary * 4 <= 1 << 30)
    assert rows_per_chunk(vocabulary, torch.bfloat16, "cpu", 10 * vocabulary * 4 + 1) == 10
    assert rows_per_chunk(vocabulary, torch.float64, "cpu", vocabulary * 4) == 1


@pytest.mark.parametrize("count", [0, 1, 127, 2048, 2049, 4098, 16 * 2048 + 2])
@pytest.mark.parametrize("most", [1, 10, 256, 2048, 4224])
def test_chunks_are_equal_and_in_whole_tiles(count, most):
    chunks = even_chunks(count, most)
    sizes, tile = [stop - start for start, stop in chunks], 128 if most % 128 == 0 else 1
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(count))
    assert len(sizes) == -(-count // most) and max(sizes, default=0) <= most
    assert max(sizes, default=0) - min(sizes, default=0) < 2 * tile and all(size % tile == 0 for size in sizes[:-1])


def test_no_chunk_of_few_rows_reads_the_whole_head(monkeypatch):
    """258 rows took a chunk of 256 and one of 2, each of which reads all of W."""
    x, weight, target = torch.randn(258, 8), torch.randn(50, 8), torch.randint(50, (258,))
    read, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: read.append(len(a)) or mm(a, b, out=out))
    linear_cross_entropy(x, weight, target, reduction="sum", chunk_bytes=256 * 50 * 4)
    assert read == [128, 130]


TORCHS_OWN = """
import sys, types, unittest
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
import torch
from torch.testing._internal.common_methods_invocations import sample_inputs_linear_cross_entropy as samples
from torch.testing._internal.common_nn import linear_cross_entropy_loss_reference as reference
cases = []
for s in samples(None, "cpu", torch.float64, True):
    weight, target = s.args
    if weight.dim() == 2 and not target.is_floating_point():
        loss = reference(s.input, weight, target, **s.kwargs)
        leaves = [s.input, weight, *(value for name, value in s.kwargs.items() if name == "linear_bias")]
        cases.append((s.input, weight, target, s.kwargs, loss.detach(), torch.autograd.grad(loss.sum(), leaves)))
torch.save(cases, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13's linear_cross_entropy and its sample inputs")
def test_torchs_own_sample_inputs(tmp_path):
    """In another process: that import changes torch's global flags. A class weight is a token's weight by its target."""
    subprocess.run([sys.executable, "-c", TORCHS_OWN, str(tmp_path / "cases")], check=True)
    cases = torch.load(tmp_path / "cases")
    assert len(cases) >= 30
    for x, weight, target, options, loss, grads in cases:
        by_class, bias = options.pop("weight", None), options.pop("linear_bias", None)
        rows = target.reshape(-1)
        options.setdefault("ignore_index", None)
        token_weight = None if by_class is None else by_class[rows]
        options.setdefault("reduction", "mean")
        ours = linear_cross_entropy(x.reshape(len(rows), -1), weight, rows, bias=bias, token_weight=token_weight, **options)
        torch.testing.assert_close(ours.reshape(loss.shape), loss)
        leaves = [x, weight] + [bias] * (bias is not None)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), leaves), grads)


META = torch.device("meta")


@pytest.mark.parametrize("change, message", [
    (dict(target=torch.tensor([0, V])), rf"expected targets in \[0, {V}\) or ignore_index -100, got {V} at row 1"),
    (dict(target=torch.tensor([-1, 0])), r"got -1 at row 0"),
    (dict(target=torch.tensor([-100, 0]), ignore_index=None), rf"expected targets in \[0, {V}\), got -100 at row 0"),
    (dict(target=torch.tensor([0])), r"expected target torch.int64 of shape \(2,\) on cpu, got torch.int64 \(1,\) on cpu"),
    (dict(target=torch.tensor([0, 1], dtype=torch.int32)), r"expected target torch.int64 of shape .*, got torch.int32 \(2,\)"),
    (dict(target=torch.zeros(2, dtype=torch.int64, device=META)), "expected target .* on cpu, got .* on meta"),
    (dict(weight=torch.zeros(V, D + 1)), r"expected x \[S, D\] and weight \[V, D\], got \(2, 6\) and \(17, 7\)"),
    (dict(x=torch.zeros(1, 2, D)), r"expected x \[S, D\] and weight \[V, D\], got \(1, 2, 6\) and \(17, 6\)"),
    (dict(weight=torch.zeros(V, D).bfloat16()), "one floating dtype, got torch.float32 and torch.bfloat16"),
    (dict(weight=torch.zeros(V, D, device=META)), "expected weight .* on cpu, got .* on meta"),
    (dict(weight=torch.zeros(0, D)), "expected a vocabulary of at least one token, got 0"),
    (dict(bias=torch.zeros(3)), r"expected bias torch.float32 of shape \(17,\) on cpu, got torch.float32 \(3,\)"),
    (dict(bias=torch.zeros(V).double()), r"expected bias torch.float32 of shape \(17,\) on cpu, got torch.float64 \(17,\)"),
    (dict(token_weight=torch.zeros(3)), r"expected token_weight floating of shape \(2,\) on cpu, got torch.float32 \(3,\)"),
    (dict(token_weight=torch.zeros(2, dtype=torch.int64)), r"expected token_weight floating .*, got torch.int64 \(2,\)"),
    (dict(token_weight=torch.zeros(2, device=META)), "expected token_weight .* on cpu, got .* on meta"),
    (dict(lora=Lora(torch.zeros(2, D + 1), torch.zeros(V, 2), 1.0)), r"expected lora.A floating of shape \(2, 6\) .*, got .* \(2, 7\)"),
    (dict(lora=Lora(torch.zeros(()), torch.zeros(V, 2), 1.0)), r"expected lora.A floating of shape \(6,\) .*, got .* \(\)"),
    (dict(lora=Lora(torch.zeros(2, D), torch.zeros(V, 3), 1.0)), r"expected lora.B floating of shape \(17, 2\) .*, got .* \(17, 3\)"),
    (dict(lora=Lora(torch.zeros(2, D), torch.zeros(V, 2), 1.0, 0.1)), "expected a lora without dropout on the head, got 0.1"),
    (dict(lora=Lora(torch.zeros(2, D), torch.zeros(V, 2), 1.0, 0.0, torch.zeros(V))), "expected a lora without magnitude on the head"),
    (dict(reduction="avg"), "expected reduction 'sum', 'mean' or 'none', got 'avg'"),
    (dict(softcap=0.0), "expected softcap > 0 or None, got 0.0"),
    (dict(label_smoothing=1.0), r"expected label_smoothing in \[0, 1\), got 1.0"),
    (dict(label_smoothing=-0.1), r"expected label_smoothing in \[0, 1\), got -0.1"),
    (dict(temperature=0.0), "expected temperature > 0, got 0.0"),
    (dict(chunk_bytes=0), "expected chunk_bytes > 0 or None, got 0"),
])
def test_mistakes_are_named(change, message):
    call = dict(x=torch.zeros(2, D), weight=torch.zeros(V, D), target=torch.zeros(2, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match="linear_cross_entropy: .*" + message):
        linear_cross_entropy(**call)


@pytest.mark.parametrize("op", [linear_log_prob, linear_cross_entropy_statistics])
def test_each_function_names_itself(op):
    with pytest.raises(ValueError, match=f"{op.__name__}: expected temperature > 0, got -1"):
        op(torch.zeros(2, D), torch.zeros(V, D), torch.zeros(2, dtype=torch.int64), temperature=-1)
