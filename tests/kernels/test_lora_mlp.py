"""lora_mlp against the plain formula, torch's gradcheck and three PEFT modules."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.lora import Lora
from kernels.lora_mlp import lora_mlp
from kernels.nf4 import dequantize_nf4
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, given, runs_triton, settings, st, to, triton_mode
from tests.helpers.lora_cases import DOUBLE, FORMS, Counted, assert_same, formula, lora_of, make, masks, nf4, peft_linear, relative, trained

ACT = {"silu": F.silu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}


def make_mlp(width=4, inner=6, out=4, ranks=(2, 3, 1), **options):
    """(weights, biases, loras) of gate, up and down; rank 0 is no adapter."""
    sizes = ((inner, width), (inner, width), (out, inner))
    made = [make(n, k, r=max(r, 1), **options) for (n, k), r in zip(sizes, ranks, strict=True)]
    weights, biases, loras = zip(*made, strict=True)
    return weights, biases, tuple(lora if r else None for lora, r in zip(loras, ranks, strict=True))


def plain(x, weights, loras, biases, activation="silu", masks=(None, None, None)):
    gate, up = (formula(x, weights[i], loras[i], biases[i], masks[i]).to(x.dtype) for i in (0, 1))
    return formula(ACT[activation](gate) * up, weights[2], loras[2], biases[2], masks[2]).to(x.dtype)


def adapters(loras):
    return [lora for lora in loras if lora is not None]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(activation, dropout):
    weights, biases, loras = make_mlp(dropout=dropout, base_grad=True)
    x = torch.randn(2, 2, 4, dtype=DOUBLE, requires_grad=True)

    def op(*_):
        torch.manual_seed(1)
        return lora_mlp(x, weights, loras, biases, activation)

    assert torch.autograd.gradcheck(op, [x, *trained(*weights, *biases, *loras)])


@given(
    tokens=st.sampled_from([1, 2, 7]), width=st.sampled_from([1, 5, 16]), inner=st.sampled_from([1, 7, 33]),
    ranks=st.tuples(*[st.sampled_from([0, 1, 4])] * 3), dora=st.booleans(), bias=st.booleans(), x_grad=st.booleans(),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
)
@settings(max_examples=50, deadline=None)
def test_any_mlp_equals_the_formula(tokens, width, inner, ranks, dora, bias, x_grad, activation):
    weights, biases, loras = make_mlp(width, inner, 3, ranks, dora=dora)
    biases = biases if bias else (None,) * 3
    x = torch.randn(tokens, width, dtype=DOUBLE, requires_grad=x_grad)
    inputs = trained(x, *adapters(loras))
    ours, theirs = (op(x, weights, loras, biases, activation) for op in (lora_mlp, plain))
    if inputs:
        assert_same([ours], [theirs], inputs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_equals_peft(config):
    gate, up, down = modules = [peft_linear(n, k, True, **config) for n, k in ((7, 6), (7, 6), (5, 7))]
    x = torch.randn(2, 5, 6, dtype=DOUBLE, requires_grad=True)
    loras = [lora_of(module) for module in modules]
    ours = lora_mlp(x, [m.base_layer.weight for m in modules], loras, [m.base_layer.bias for m in modules])
    assert_same([ours], [down(F.silu(gate(x)) * up(x))], trained(x, *loras))


def test_dropout_masks_x_twice_and_h():
    weights, biases, loras = make_mlp(dropout=0.4)
    x = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    torch.manual_seed(3)
    drawn = masks([x, x, torch.empty(5, 6, dtype=DOUBLE)], 0.4)
    torch.manual_seed(3)
    ours = lora_mlp(x, weights, loras, biases)
    assert_same([ours], [plain(x, weights, loras, biases, masks=drawn)], trained(x, *loras))


def test_checkpoint_replays_the_masks():
    weights, biases, loras = make_mlp(dropout=0.5)
    x = torch.randn(9, 4, dtype=DOUBLE, requires_grad=True)
    runs = []
    for run in (lora_mlp, lambda *args: checkpoint(lora_mlp, *args, use_reentrant=False)):
        torch.manual_seed(5)
        y = run(x, weights, loras, biases)
        torch.randn(3)
        runs.append((y, *torch.autograd.grad(y.square().sum(), trained(x, *loras))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_bf16_with_fp32_masters(dora):
    weights, biases, loras = make_mlp(64, 96, 64, (8, 8, 8), dora=dora, dtype=torch.bfloat16, master=torch.float32)
    x, upstream = (torch.randn(50, 64).bfloat16() for _ in range(2))
    inputs = [x.requires_grad_(), *trained(*loras)]

    def run(op, cast):
        leaves = [t.detach().to(cast or t.dtype).requires_grad_() for t in inputs]
        it = iter(leaves[1:])
        ls = [Lora(next(it), next(it), lora.scaling, 0.0, next(it) if dora else None) for lora in loras]
        ws, bs = ([t.to(cast or t.dtype) for t in ts] for ts in (weights, biases))
        y = op(leaves[0], ws, ls, bs)
        return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    exact, stock, ours = run(plain, DOUBLE), run(plain, None), run(lora_mlp, None)
    for mine, other, truth in zip(ours, stock, exact, strict=True):
        assert mine.dtype == other.dtype
        assert relative(mine, truth) <= 2 * relative(other, truth) + 1e-6


def test_autocast_matches_bf16_inputs():
    weights, biases, loras = make_mlp(16, 32, 16, dtype=torch.float32)
    x = torch.randn(9, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lora_mlp(x, weights, loras, biases)
        grads = torch.autograd.grad(inside.float().square().sum(), trained(x, *loras))
    outside = lora_mlp(x.bfloat16(), [w.bfloat16() for w in weights], loras, [b.bfloat16() for b in biases])
    assert inside.dtype == torch.bfloat16 and torch.equal(inside, outside)
    expected = torch.autograd.grad(outside.float().square().sum(), trained(x, *loras))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_repeatable_and_inputs_unchanged():
    weights, biases, loras = make_mlp(17, 33, 13, dora=True, dropout=0.1, dtype=torch.float32)
    x, upstream = torch.randn(29, 17, requires_grad=True), torch.randn(29, 13)
    inputs = trained(x, *loras)
    everything = (*inputs, *weights, *biases, upstream)
    before = [t.detach().clone() for t in everything]
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        y = lora_mlp(x, weights, loras, biases)
        runs.append((y, *torch.autograd.grad(y, inputs, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))


def test_output_may_be_changed_in_place():
    weights, biases, loras = make_mlp()
    x = torch.randn(2, 3, 4, dtype=DOUBLE, requires_grad=True)
    assert_same([lora_mlp(x, weights, loras, biases).mul_(2)], [2 * plain(x, weights, loras, biases)], trained(x, *loras))


def test_saves_x_gate_up_and_the_narrow_products():
    weights, biases, loras = make_mlp(16, 40, 16, (2, 3, 4), dtype=torch.float32)
    x = torch.randn(50, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_mlp(x, weights, loras, biases)
    parameters = {t.data_ptr() for t in (*weights, *biases, *(t for lora in loras for t in lora[:2]))}
    assert sum(t.numel() for t in saved if t.data_ptr() not in parameters) == 50 * (16 + 40 + 40 + 2 + 3 + 4)


@pytest.mark.parametrize("sizes, words", [
    (((6, 4), (5, 4), (4, 6)), r"gate and up of one shape, got \(6, 4\) and \(5, 4\)"),
    (((6, 4), (6, 4), (4, 5)), r"weight of shape \(N, 6\).*got \(4, 5\)"),
    (((6, 3), (6, 3), (4, 6)), r"weight of shape \(N, 4\).*got \(6, 3\)"),
])
def test_misfits_are_named(sizes, words):
    with pytest.raises(ValueError, match="lora_mlp: expected " + words):
        lora_mlp(torch.zeros(2, 4), [torch.zeros(size) for size in sizes], (None,) * 3)


def test_unknown_activation():
    with pytest.raises(ValueError, match="lora_mlp: expected activation in .*got 'relu'"):
        lora_mlp(torch.zeros(2, 4), [torch.zeros(4, 4)] * 3, (None,) * 3, activation="relu")


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_compiles_in_one_graph(dora):
    torch._dynamo.reset()
    weights, biases, loras = make_mlp(8, 12, 8, dora=dora, dropout=0.3, dtype=torch.float32)
    x = torch.randn(2, 5, 8, requires_grad=True)
    runs = []
    for op in (lora_mlp, torch.compile(lora_mlp, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        y = op(x, weights, loras, biases)
        runs.append((y, *torch.autograd.grad(y.square().sum(), trained(x, *loras))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_nf4_weights_give_what_their_dense_forms_give(form):
    weights, biases, loras = make_mlp(16, 64, 16, dropout=0.2, dtype=torch.float32)
    frozen = [nf4(weight) for weight in weights]
    x = torch.randn(9, 16, requires_grad=True)
    runs = []
    with form():
        for ws in (frozen, [dequantize_nf4(weight) for weight in frozen]):
            torch.manual_seed(1)
            y = lora_mlp(x, ws, loras, biases)
            runs.append((y, *torch.autograd.grad(y.sum(), trained(x, *loras))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_the_down_adapter_wants_gradients():
    weights, biases, loras = make_mlp(dropout=0.0)
    loras = [None, None, loras[2]]
    x = torch.randn(5, 4, dtype=DOUBLE)
    assert_same([lora_mlp(x, weights, loras, biases)], [plain(x, weights, loras, biases)], trained(*loras[2]))


# ---------------------------------------------------------------- Triton


def kernel_case(T, width, inner, out, ranks, dropout=0.0, dora=False, bias=True, frozen="W"):
    """Return ours and stock as functions of the fp64 inputs, and those inputs.

    They are x, then W, bias, A, B, magnitude and mask of each projection.
    """
    sizes = ((inner, width), (inner, width), (out, inner))

    def wants(letter, *shape, scale=1.0):
        return torch.randn(shape, dtype=DOUBLE).mul(scale).requires_grad_(letter not in frozen)

    with triton_mode():
        torch.manual_seed(7)
        drawn = masks([torch.empty(T, k, device=DEVICE) for _, k in sizes], dropout)
    inputs = [wants("x", T, width)]
    for (n, k), r, mask in zip(sizes, ranks, drawn, strict=True):
        inputs += [wants("W", n, k, scale=k**-0.5), wants("b", n) if bias else None]
        inputs += [wants("A", r, k, scale=k**-0.5), wants("B", n, r, scale=r**-0.5)] if r else [None, None]
        inputs += [torch.rand(n, dtype=DOUBLE).add(0.5).requires_grad_() if dora and r else None, mask.cpu().double() if r else None]

    def opened(tensors, p):
        parts = [tensors[i:i + 6] for i in range(0, 18, 6)]
        return ([t[0] for t in parts], [Lora(t[2], t[3], 1.7, p, t[4]) if t[2] is not None else None for t in parts], [t[1] for t in parts],
                [t[5] for t in parts])

    def ours(x, *tensors):
        torch.manual_seed(7)
        return lora_mlp(x, *opened(tensors, dropout)[:3])

    def stock(x, *tensors):
        weights, loras, biases, multipliers = opened(tensors, 0.0)
        return plain(x, weights, loras, biases, masks=multipliers)

    return ours, stock, inputs


CASES = {
    "one token": (1, 65, 129, 67, (17, 16, 33), 0.3),
    "plain": (37, 40, 33, 17, (4, 16, 5)),
    "dropout": (37, 40, 33, 17, (4, 3, 5), 0.3),
    "dora": (19, 31, 33, 17, (4, 3, 5), 0.3, True),
    "down without adapter": (19, 24, 33, 17, (4, 3, 0), 0.3),
    "only down": (19, 24, 33, 17, (0, 0, 3), 0.3, False, True, "Wxb"),
    "down beyond the passes' ranks": (9, 24, 20, 17, (4, 3, 260), 0.3),
    "trained base": (19, 24, 33, 17, (4, 3, 5), 0.0, False, True, ""),
    "no tokens": (0, 8, 9, 7, (4, 3, 5), 0.3),
}


IN_EVERY_DTYPE = ("dropout", "dora", "down beyond the passes' ranks")


@runs_triton
@pytest.mark.parametrize("name, dtype", [
    (name, dtype) for name in CASES for dtype in (DTYPES if name in IN_EVERY_DTYPE else [torch.bfloat16])])
def test_kernels_are_as_exact_as_torch(name, dtype):
    assert_as_exact_as_torch(*kernel_case(*CASES[name]), dtype)


@runs_triton
def test_kernels_save_x_gate_up_and_the_narrow_products():
    ours, _, inputs = kernel_case(50, 16, 40, 16, (2, 3, 4), 0.3)
    tensors, saved = to(inputs, torch.float32), []
    with triton_mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(*tensors)
    parameters = {t.data_ptr() for t in tensors[1:] if t is not None}
    assert sum(t.numel() for t in saved if t.data_ptr() not in parameters) == 50 * (16 + 40 + 40 + 3 * 16) + 1


@runs_triton
def test_products_and_launches_are_as_few_as_the_readme_says(monkeypatch):
    ours, _, inputs = kernel_case(37, 8, 16, 8, (2, 3, 4), 0.3, bias=False)
    tensors = to(inputs, torch.float32)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    with triton_mode(), Counted(monkeypatch) as counted:
        y = ours(*tensors)
        assert (counted.products, counted.launches) == (3, 3)
        torch.autograd.grad(y, wanted, torch.ones_like(y))
        assert (counted.products, counted.launches) == (6, 3 + 5)  # and two sums where T is cut into slices


@runs_triton
def test_kernels_compile_in_one_graph():
    torch._dynamo.reset()
    ours, _, inputs = kernel_case(9, 16, 20, 12, (2, 3, 4), 0.3)
    tensors = to(inputs, torch.float32)
    weights, biases = tensors[1::6], tensors[2::6]
    loras = [Lora(A, B, 1.7, 0.3) for A, B in zip(tensors[3::6], tensors[4::6])]
    runs = []
    with triton_mode():
        for op in (lora_mlp, torch.compile(lora_mlp, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(7)
            y = op(tensors[0], weights, loras, biases)
            runs.append((y, *torch.autograd.grad(y.sum(), trained(tensors[0], *loras))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@runs_triton
def test_kernels_replay_masks_under_checkpointing():
    ours, _, inputs = kernel_case(9, 16, 20, 12, (2, 3, 4), 0.3)
    tensors = to(inputs, torch.float32)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    runs = []
    with triton_mode():
        for run in (ours, lambda *args: checkpoint(ours, *args, use_reentrant=False)):
            y = run(*tensors)
            runs.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
