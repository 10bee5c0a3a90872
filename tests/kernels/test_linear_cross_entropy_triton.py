"""The Triton kernels of head and cross entropy, against torch's cross entropy of the whole logits in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels._cross_entropy_rows import LAUNCH, Loss, cross_entropy_rows, new_logits
from kernels._launch import ANY
from kernels._top_entropy_rows import top_entropy_weights
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_chunks, linear_cross_entropy_statistics
from kernels.lora import Lora
from tests.helpers.allocations import Allocations
from tests.helpers.cross_entropy_cases import FLAGS, D, V, adapter, entropy_weights, inputs, stock
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, error, poisoned, runs_triton, to, triton_mode

PLAIN, EVERYTHING = {}, dict(label_smoothing=0.1, z_loss=1e-3, softcap=20.0, logit_scale=0.8, temperature=0.7)


def triton_inputs(vocabulary, trained=False, rows=12, width=16, scale=1.0):
    x, weight, bias, target, token_weight = inputs(trained=trained, rows=rows, width=width, vocabulary=vocabulary, scale=scale)
    target[0], target[-1] = 0, vocabulary - 1
    return [x, weight, bias, target, token_weight]


def both(**call):
    """linear_cross_entropy and stock as functions of `triton_inputs`, in chunks of five rows."""

    def ours(x, weight, bias, target, token_weight):
        size = 5 * (weight.shape[0] + 15) * x.element_size()
        return linear_cross_entropy(x, weight, target, bias=bias, token_weight=token_weight, chunk_bytes=size, **call)

    return ours, lambda x, weight, bias, target, token_weight: stock(x, weight, target, bias=bias, token_weight=token_weight, **call)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [257, 4093])
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING])
@pytest.mark.parametrize("trained", [False, True])
def test_kernel_is_as_exact_as_torch(trained, options, vocabulary, dtype):
    reduction = "none" if trained and options else "sum"
    assert_as_exact_as_torch(*both(reduction=reduction, **options), triton_inputs(vocabulary, trained), dtype)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options, trained", [(PLAIN, True), (EVERYTHING, False)])
def test_kernel_weights_rows_by_entropy(options, trained, dtype):
    chosen = torch.tensor([True, False, True])

    def bind(op):
        def run(x, weight, bias, target, token_weight):
            return op(x, weight, target, bias=bias, token_weight=token_weight, entropy_weighted=chosen.to(x.device), **options)

        return run

    assert_as_exact_as_torch(bind(linear_cross_entropy), bind(stock), triton_inputs(257, trained, rows=3), dtype)


@runs_triton
@pytest.mark.parametrize("dtype, vocabulary, loss", [
    (torch.float32, 33, Loss(0.0, 0.0, 5.0, -0.7, 0.8)), (torch.bfloat16, 2, Loss()), (torch.bfloat16, 700, Loss())])
def test_top_entropies_find_neighbours_far_ends_and_ties(dtype, vocabulary, loss):
    """The largest logits side by side, a block apart in one group's columns, all equal; and fewer than 20 that count."""
    logits = torch.randn(4, vocabulary).to(DEVICE, dtype)
    logits[0, :25], logits[1, ::512], logits[1, 1::512], logits[2] = 6.0, 7.0, 6.5, 1.0
    logits[3, 5:] = -1e4
    with triton_mode():
        found = top_entropy_weights(new_logits(4, vocabulary, logits).copy_(logits), loss)
    z = logits.double() * loss.logit_scale
    z = (z if loss.softcap is None else torch.tanh(z / loss.softcap) * loss.softcap) / loss.temperature
    torch.testing.assert_close(found.double(), entropy_weights(z), rtol=2e-6, atol=2e-6)


@runs_triton
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 129])
def test_kernel_on_few_rows(vocabulary, rows):
    """A vocabulary of one has loss and gradients 0."""
    assert_as_exact_as_torch(*both(reduction="mean"), triton_inputs(vocabulary, True, rows=rows), torch.float32)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING])
def test_kernel_loops_over_wide_rows(options, dtype):
    """Two blocks of the widest, the last with one logit."""
    blocks = LAUNCH[ANY, None].blocks["BLOCK"]
    assert_as_exact_as_torch(*both(reduction="mean", **options), triton_inputs(blocks + 1, rows=3, width=4), dtype)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True])
def test_kernel_survives_huge_logits(trained, dtype):
    tensors = triton_inputs(257, trained, scale=2e3)
    assert 1e4 < F.linear(tensors[0], tensors[1]).abs().max() < torch.finfo(torch.float16).max
    assert_as_exact_as_torch(*both(), tensors, dtype)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_kernel_with_lora(reduction, dtype):
    lora = adapter(width=16, vocabulary=257)

    def bind(op):
        def run(x, weight, target, A, B):
            loss = op(x, weight, target, lora=Lora(A, B, 0.6), reduction=reduction)
            # The logits are rounded in other places than torch's, and of two sums of roundings either may be lucky: only gradients count.
            return loss - loss.detach() if reduction == "sum" else loss

        return run

    x, weight, _, target, _ = triton_inputs(257)
    assert_as_exact_as_torch(bind(linear_cross_entropy), bind(stock), [x, weight, target, lora.A, lora.B], dtype)


@runs_triton
def test_mean_over_many_rows_does_not_underflow_in_fp16():
    assert_as_exact_as_torch(*both(reduction="mean"), triton_inputs(1000, True, rows=30), torch.float16)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING])
@pytest.mark.parametrize("vocabulary", [257, 4093])
def test_kernel_statistics(vocabulary, options, dtype):
    x, weight, bias, target, _ = to([t.detach() for t in triton_inputs(vocabulary, rows=7)], dtype)
    weight[200] = weight[5] = 3 * weight[5]  # two that no other reaches
    bias[200] = bias[5]
    target[2], target[3] = 200, 5
    x[2] = x[3] = weight[5]
    with triton_mode(), poisoned():
        ours = linear_cross_entropy_statistics(x, weight, target, bias=bias, **options)
        again = linear_cross_entropy_statistics(x, weight, target, bias=bias, **options)
    assert all(map(torch.equal, ours, again))
    exact = linear_cross_entropy_statistics(x.double(), weight.double(), target, bias=bias.double(), **options)
    z = F.linear(x, weight, bias).float()
    z = torch.tanh(z * 0.8 / 20.0) * 20.0 / 0.7 if options else z
    p = z.log_softmax(1)
    kept = target != -100
    theirs = p.gather(1, target.clamp_min(0)[:, None])[:, 0] * kept, -(p.exp() * p).sum(1) * kept
    for mine, other, true in zip(ours[1:3], theirs, exact[1:3]):
        assert error(mine, true) <= 2 * error(other, true) + 1e-6
    assert torch.equal(ours.correct, (z.argmax(1) == target) & kept)
    assert ours.correct.dtype == torch.bool and ours.correct[3] and not ours.correct[2]


@runs_triton
def test_kernel_statistics_cost_nothing_to_the_loss():
    x, weight, bias, target, token_weight = (t.to(DEVICE).detach() for t in triton_inputs(257))
    leaves = [t.float().requires_grad_() for t in (x, weight)]
    with triton_mode():
        results = [op(*leaves, target, reduction="sum") for op in (linear_cross_entropy, linear_cross_entropy_statistics)]
        assert torch.equal(results[0], results[1].loss)
        assert all(map(torch.equal, *(torch.autograd.grad(loss, leaves) for loss in (results[0], results[1].loss))))


@runs_triton
def test_kernel_with_tokens_that_the_head_rules_out():
    tensors = triton_inputs(257, trained=True)
    tensors[2].detach()[100:200] = -torch.inf
    assert_as_exact_as_torch(*both(), tensors, torch.float32)
    x, weight, bias, target, _ = to([t.detach() for t in tensors], torch.float32)
    with triton_mode():
        entropy = linear_cross_entropy_statistics(x, weight, target, bias=bias).entropy
    p = F.linear(x, weight, bias).log_softmax(1)[:, bias.isfinite()]
    torch.testing.assert_close(entropy, -(p.exp() * p).sum(1) * (target != -100))


@runs_triton
@pytest.mark.parametrize("options", [Loss(), Loss(0.1, 1e-3, 20.0, 1.0, 0.7)])
def test_a_target_outside_the_vocabulary_is_nan_and_touches_no_other_row(options):
    rows, vocabulary = 4, 257
    target = torch.tensor([3, vocabulary, -1, vocabulary - 1], device=DEVICE)
    losses = torch.empty(rows, device=DEVICE)
    with triton_mode():
        logits = new_logits(rows, vocabulary, losses).normal_()
        gradient = cross_entropy_rows(logits, slice(0, rows), target, None, losses, None, options, True)
    assert losses.isnan().tolist() == gradient.isnan().all(1).tolist() == [False, True, True, False]
    assert gradient[[0, 3]].isfinite().all()


@runs_triton
def test_offsets_beyond_31_bits():
    """Rows 2^30 elements apart, with room for the third to be sought where 32 bits would put it."""
    stride, vocabulary = 2**30 + 16, 300
    try:
        storage = torch.empty(2**32 + 4096, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as exception:
        pytest.skip(f"needs 8.6 GB of address space: {exception}")
    logits = storage.as_strided((3, vocabulary), (stride, 1), 2**31)
    values = torch.randn(3, vocabulary, device=DEVICE).bfloat16()
    logits.copy_(values)
    target, losses = torch.tensor([1, 2, 299], device=DEVICE), torch.empty(3, device=DEVICE)
    with triton_mode():
        gradient = cross_entropy_rows(logits, slice(0, 3), target, None, losses, None, Loss(), True)
    truth = values.double().requires_grad_()
    true = F.cross_entropy(truth, target, reduction="none")
    torch.testing.assert_close(losses.double(), true.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(true.sum(), truth)[0], rtol=1e-2, atol=1e-4)


@runs_triton
@pytest.mark.parametrize("vocabulary", [256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_keeps_to_the_chunk(dtype, vocabulary):
    """The largest tensor is one chunk's logits in x's dtype, at 16-byte boundaries; gradients take no second one."""
    chunk_rows, rows = 4, 24
    x, weight, _, target, _ = (t.detach().to(DEVICE) for t in inputs(dtype, rows=rows, width=4, vocabulary=vocabulary))
    width = 256 if vocabulary == 256 else 272
    size = chunk_rows * width * dtype.itemsize
    with triton_mode(), Allocations() as seen:
        flags = FLAGS | dict(chunk_bytes=size + 1, wanted=[True] + [False] * 4)
        linear_cross_entropy_chunks(x, weight, None, None, None, target, None, None, **flags)
    assert seen.largest == size and seen.products == 2 * 16 // chunk_rows
    with triton_mode():
        assert new_logits(3, vocabulary, x).stride() == (width, 1)


@runs_triton
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_kernel_with_nothing_supervised(rows, trained, reduction):
    x, weight, bias, target, _ = (t.to(DEVICE).detach() for t in inputs(torch.bfloat16, rows=rows))
    leaves = [x, weight, bias] if trained else [x]
    for leaf in leaves:
        leaf.requires_grad_()
    with triton_mode(), poisoned():
        loss = linear_cross_entropy(x, weight, torch.full_like(target, -100), bias=bias, z_loss=0.1, reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), leaves)
    assert (loss == 0).all() and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@runs_triton
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernel_compiles_in_one_graph_with_ignored_rows(trained, reduction):
    torch._dynamo.reset()
    x, weight, bias, target, token_weight = (t.detach().to(DEVICE) for t in inputs(torch.float32))
    leaves = [x, weight, bias] if trained else [x]
    for leaf in leaves:
        leaf.requires_grad_()

    def values(x, weight, bias):
        return linear_cross_entropy_statistics(x, weight, target, bias=bias, token_weight=token_weight, reduction=reduction)

    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
    with triton_mode():
        ours, plain = compiled(x, weight, bias), values(x, weight, bias)
        grads, plain_grads = (torch.autograd.grad(v.loss.sum(), leaves) for v in (ours, plain))
    torch.testing.assert_close(tuple(ours), tuple(plain))
    torch.testing.assert_close(grads, plain_grads)
    assert not ours.log_prob.requires_grad


@runs_triton
@pytest.mark.parametrize("wanted", [[True] + [False] * 4, [True] * 5])
def test_kernel_schema(wanted):
    x, weight, bias, target, token_weight = (t.detach().to(DEVICE) for t in inputs(torch.bfloat16))
    A, B = torch.randn(2, D, device=DEVICE), torch.randn(V, 2, device=DEVICE)
    with triton_mode():
        flags = FLAGS | dict(lora_scaling=2.0, label_smoothing=0.1, temperature=0.7, statistics=True, wanted=wanted)
        torch.library.opcheck(linear_cross_entropy_chunks.node, (x, weight, bias, A, B, target, token_weight, target > 3), flags)


@runs_triton
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_kernel_under_checkpointing_and_autocast(trained, reduction):
    x, weight, _, target, _ = (t.detach().to(DEVICE) for t in inputs(torch.float32))
    leaves = [x, weight] if trained else [x]
    for leaf in leaves:
        leaf.requires_grad_()

    def loss(x):
        return linear_cross_entropy(x, weight, target, reduction=reduction).sum()

    with triton_mode():
        direct = torch.autograd.grad(loss(x), leaves)
        assert all(map(torch.equal, direct, torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), leaves)))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            cast = loss(x)
        assert all(map(torch.equal, direct, torch.autograd.grad(cast, leaves)))
