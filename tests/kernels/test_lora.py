"""lora_linear and lora_qkv against the plain formula, torch's gradcheck and PEFT's own modules."""

from typing import NamedTuple

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import _dora, _launch, _lora_passes
from kernels._dispatch import backend_mode
from kernels._dropout import kept_fraction
from kernels.lora import Lora, lora_linear, lora_qkv
from kernels.nf4 import dequantize_nf4
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, error, given, runs_triton, settings, st, to, triton_mode
from tests.helpers.lora_cases import DOUBLE, FORMS, Counted, assert_same, formula, lora_of, make, masks, nf4, peft_linear, relative, trained


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base_grad", [False, True])
def test_gradcheck_single(dora, dropout, base_grad):
    weight, bias, lora = make(5, 4, dropout=dropout, dora=dora, base_grad=base_grad)
    x = torch.randn(2, 3, 4, dtype=DOUBLE, requires_grad=True)

    def op(x, *_):
        torch.manual_seed(1)  # one mask for every evaluation
        return lora_linear(x, weight, lora, bias)

    if dora:  # the backward holds the row norm constant and finite differences do not: only x, bias and magnitude vary
        lora = lora._replace(A=lora.A.detach(), B=lora.B.detach())
        weight = weight.detach()
    assert torch.autograd.gradcheck(op, [x, *trained(weight, bias, lora)])


@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.2, 0.0, 0.5)])
def test_gradcheck_qkv(dropouts):
    made = [make(n, 4, r=r, dropout=p) for n, r, p in zip((6, 3, 5), (2, 1, 3), dropouts, strict=True)]
    weights, biases, loras = zip(*made, strict=True)
    loras = (loras[0], None, loras[2])
    x = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)

    def op(*_):
        torch.manual_seed(1)
        return lora_qkv(x, weights, loras, biases)

    assert torch.autograd.gradcheck(op, [x, *trained(*biases, *[lora for lora in loras if lora])])


@given(
    shape=st.lists(st.integers(1, 5), max_size=2), k=st.sampled_from([1, 2, 7, 16, 17]),
    projections=st.lists(
        st.tuples(st.sampled_from([1, 3, 13, 33]), st.sampled_from([0, 1, 2, 5]), st.booleans(), st.booleans()),
        min_size=1, max_size=4),
    x_grad=st.booleans(), base_grad=st.booleans(), strided=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_projections_equal_the_formula(shape, k, projections, x_grad, base_grad, strided):
    weights, biases, loras = [], [], []
    for n, r, dora, bias in projections:
        weight, b, lora = make(n, k, r=max(r, 1), dora=dora, base_grad=base_grad)
        weights.append(weight)
        biases.append(b if bias else None)
        loras.append(lora if r else None)
    x = torch.randn(*shape, 2 * k if strided else k, dtype=DOUBLE)
    x = (x[..., ::2] if strided else x).requires_grad_(x_grad)
    inputs = trained(x, *weights, *biases, *[lora for lora in loras if lora])
    ours = lora_qkv(x, weights, loras, biases)
    theirs = [formula(x, w, lora, b) for w, lora, b in zip(weights, loras, biases, strict=True)]
    if inputs:
        keep = [i for i, y in enumerate(theirs) if y.requires_grad]
        used = set(torch.autograd.grad([theirs[i] for i in keep], inputs, [theirs[i] for i in keep], allow_unused=True,
                                       retain_graph=True))
        assert None not in used
        assert_same([ours[i] for i in keep], [theirs[i] for i in keep], inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_no_tokens():
    weight, bias, lora = make(5, 4, dropout=0.5)
    x = torch.randn(0, 4, dtype=DOUBLE, requires_grad=True)
    y = lora_linear(x, weight, lora, bias)
    y.sum().backward()
    assert y.shape == (0, 5) and x.grad.shape == x.shape and lora.A.grad.abs().sum() == 0


class FixedDropout(torch.nn.Module):
    """PEFT's dropout with a mask that the test chooses."""

    def __init__(self, multiplier):
        super().__init__()
        self.multiplier = multiplier

    def forward(self, x):
        return x * self.multiplier


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [
    {}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_equals_peft(config, bias):
    module = peft_linear(7, 6, bias, **config)
    lora = lora_of(module)
    assert (lora.scaling == 5) == ("use_rslora" in config)
    if config.get("use_dora"):
        module.lora_magnitude_vector["default"].weight.data.mul_(torch.rand(7, dtype=DOUBLE) + 0.5)
    x = torch.randn(2, 5, 6, dtype=DOUBLE, requires_grad=True)
    base = module.base_layer
    assert_same([lora_linear(x, base.weight, lora, base.bias)], [module(x)], trained(x, lora))


def test_equals_peft_with_dropout():
    modules = [peft_linear(n, 6, True) for n in (7, 3)]
    x = torch.randn(5, 6, dtype=DOUBLE, requires_grad=True)
    torch.manual_seed(3)
    for module, mask in zip(modules, masks([x, x], 0.4), strict=True):
        module.lora_dropout["default"] = FixedDropout(mask)
    torch.manual_seed(3)
    loras = [lora_of(module, dropout=0.4) for module in modules]
    ours = lora_qkv(x, [m.base_layer.weight for m in modules], loras, [m.base_layer.bias for m in modules])
    assert_same(ours, [module(x) for module in modules], trained(x, *loras))


def test_dora_with_dropout_drops_the_adapter_only():
    weight, bias, lora = make(7, 6, dropout=0.4, dora=True)
    x = torch.randn(5, 6, dtype=DOUBLE, requires_grad=True)
    torch.manual_seed(3)
    mask, = masks([x], 0.4)
    torch.manual_seed(3)
    ours = lora_linear(x, weight, lora, bias)
    assert_same([ours], [formula(x, weight, lora, bias, mask)], trained(x, lora))


def test_each_projection_draws_its_own_mask():
    weight, _, lora = make(6, 50, dropout=0.5)
    x = torch.randn(9, 50, dtype=DOUBLE)
    first, second = lora_qkv(x, (weight, weight), (lora, lora))
    assert (first - second).abs().max() > 1e-3


def test_checkpoint_and_global_seed_replay_the_masks():
    weight, bias, lora = make(6, 5, dropout=0.5)
    x = torch.randn(9, 5, dtype=DOUBLE, requires_grad=True)
    grads = []
    for run in (lora_linear, lambda *args: checkpoint(lora_linear, *args, use_reentrant=False)):
        torch.manual_seed(5)
        y = run(x, weight, lora, bias)
        torch.randn(3)  # the global generator moves on between forward and backward
        grads.append((y, *torch.autograd.grad(y.square().sum(), trained(x, lora))))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_with_fp32_masters(dora, bias):
    dtype = torch.bfloat16
    made = [make(n, 64, r=8, dora=dora, dtype=dtype, master=torch.float32) for n in (64, 96, 33)]
    weights, biases, loras = zip(*made, strict=True)
    biases = biases if bias else (None,) * 3
    x = torch.randn(50, 64).to(dtype).requires_grad_()
    inputs = trained(x, *loras)
    upstream = [torch.randn(50, weight.shape[0]).to(dtype) for weight in weights]

    def run(op, cast):
        double = [t.detach().to(cast).requires_grad_() if cast else t for t in inputs]
        it = iter(double[1:])
        ls = [Lora(next(it), next(it), lora.scaling, 0.0, next(it) if dora else None) for lora in loras]
        ws = [w.to(cast) if cast else w for w in weights]
        bs = [b.to(cast) if cast and b is not None else b for b in biases]
        ys = op(double[0], ws, ls, bs)
        return [*ys, *torch.autograd.grad(ys, double, [u.to(cast) if cast else u for u in upstream])]

    def plain(x, ws, ls, bs):
        return [formula(x, w, lora, b).to(x.dtype) for w, lora, b in zip(ws, ls, bs, strict=True)]

    exact, stock, ours = run(plain, DOUBLE), run(plain, None), run(lora_qkv, None)
    for mine, other, truth in zip(ours, stock, exact, strict=True):
        assert mine.dtype == other.dtype
        assert relative(mine, truth) <= 2 * relative(other, truth) + 1e-6
    assert all(grad.dtype == torch.float32 for grad in ours[4:])


def test_autocast_matches_bf16_inputs():
    weight, bias, lora = make(16, 32, dtype=torch.float32)
    x = torch.randn(9, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, lora, bias)
        inside = torch.autograd.grad(y.float().square().sum(), trained(x, lora))
    plain = lora_linear(x.bfloat16(), weight.bfloat16(), lora, bias.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
    outside = torch.autograd.grad(plain.float().square().sum(), trained(x, lora))
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_repeatable_and_inputs_unchanged():
    made = [make(33, 17, dora=dora, dtype=torch.float32, dropout=0.1) for dora in (False, True)]
    weights, biases, loras = zip(*made, strict=True)
    x = torch.randn(29, 17, requires_grad=True)
    inputs = trained(x, *loras)
    upstream = [torch.randn(29, 33) for _ in weights]
    before = [t.detach().clone() for t in (*inputs, *weights, *biases, *upstream)]
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        ys = lora_qkv(x, weights, loras, biases)
        runs.append((*ys, *torch.autograd.grad(ys, inputs, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, *weights, *biases, *upstream), strict=True))


def test_saves_x_once_and_no_mask():
    weight, bias, lora = make(64, 32, r=2, dropout=0.1, dtype=torch.float32)
    x = torch.randn(50, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, lora, bias)
    parameters = {t.data_ptr() for t in (weight, bias, *lora[:2])}
    assert sum(t.numel() for t in saved if t.data_ptr() not in parameters) == x.numel() + 50 * 2 + 1  # S, and the seed


def test_unused_output_and_first_layer():
    made = [make(n, 4) for n in (6, 3)]
    weights, biases, loras = zip(*made, strict=True)
    x = torch.randn(5, 4, dtype=DOUBLE)
    first, _ = lora_qkv(x, weights, loras, biases)
    upstream = torch.randn_like(first)
    grads = torch.autograd.grad(first, trained(loras[0]), upstream)
    expected = torch.autograd.grad(formula(x, weights[0], loras[0], biases[0]), trained(loras[0]), upstream)
    torch.testing.assert_close(grads, expected)
    assert not lora_linear(x, weights[0], lora=None).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("dora, dynamic", [(False, True), (True, False)])
def test_compiles_in_one_graph(dora, dynamic):
    torch._dynamo.reset()
    made = [make(n, 8, dora=dora, dtype=torch.float32, dropout=p) for n, p in ((6, 0.5), (9, 0.0))]
    weights, biases, loras = zip(*made, strict=True)
    compiled = torch.compile(lora_qkv, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 7):
        x = torch.randn(2, tokens, 8, requires_grad=True)
        runs = []
        for op in (lora_qkv, compiled):
            torch.manual_seed(1)
            ys = op(x, weights, loras, biases)
            runs.append((*ys, *torch.autograd.grad(ys, trained(x, *loras), [torch.ones_like(y) for y in ys])))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("count", "dora"), [(1, False), (2, False), (2, True)])
def test_outputs_may_be_changed_in_place(count, dora):
    """Some models scale a projection in-place, as Gemma 3n does."""
    x = torch.randn(2, 3, 5, dtype=DOUBLE, requires_grad=True)
    weights, biases, loras = zip(*(make(4, 5, dora=dora) for _ in range(count)))
    ours = [y.mul_(2).add_(1) for y in lora_qkv(x, weights, loras, biases)]
    theirs = [2 * formula(x, weight, lora, bias) + 1 for weight, lora, bias in zip(weights, loras, biases)]
    assert_same(ours, theirs, trained(x, *loras))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_an_nf4_weight_gives_what_its_dense_form_gives_and_only_its_codes_are_kept(form):
    made = [make(n, 64, dora=dora, dropout=0.2, dtype=torch.float32) for n, dora in ((32, False), (16, True), (24, False))]
    weights, biases, loras = zip(*made, strict=True)
    loras = (*loras[:2], None)
    frozen = [nf4(weight) for weight in weights]
    x = torch.randn(9, 64, requires_grad=True)
    runs, kept = [], []
    with form():
        for ws in (frozen, [dequantize_nf4(weight) for weight in frozen]):
            torch.manual_seed(1)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                ys = lora_qkv(x, ws, loras, biases)
            if ws is frozen:
                assert not [t.shape for t in kept if t.is_floating_point() and t.shape in [w.shape for w in frozen]]
            runs.append((*ys, *torch.autograd.grad(ys, trained(x, *loras[:2]), [torch.ones_like(y) for y in ys])))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        torch._dynamo.reset()
        torch.manual_seed(1)
        compiled = torch.compile(lora_qkv, fullgraph=True, backend="aot_eager")(x, frozen, loras, biases)
    assert all(torch.equal(a, b) for a, b in zip(compiled, runs[0]))


@pytest.mark.parametrize("change, words", [
    (dict(weight=(5, 3)), r"weight of shape \(N, 4\) for x .*got \(5, 3\)"),
    (dict(bias=(4,)), r"bias of shape \(5,\), got \(4,\)"),
    (dict(A=(3, 5)), r"A of shape \(3, 4\), got \(3, 5\)"),
    (dict(B=(5, 2)), r"B of shape \(5, 3\), got \(5, 2\)"),
    (dict(magnitude=(4,)), r"magnitude of shape \(5,\), got \(4,\)"),
    (dict(dropout=1.0), r"dropout in \[0, 1\), got 1.0"),
])
def test_misfits_are_named(change, words):
    shapes = dict(weight=(5, 4), bias=(5,), A=(3, 4), B=(5, 3), magnitude=(5,)) | change
    dropout = shapes.pop("dropout", 0.0)
    weight, bias, A, B, magnitude = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match="lora_linear: expected " + words):
        lora_linear(torch.zeros(2, 4), weight, Lora(A, B, 1.0, dropout, magnitude), bias)


@pytest.mark.parametrize("name, other, words", [
    ("x", torch.zeros(2, 4, dtype=torch.int64), r"x floating and of shape \(\.\.\., K\), got torch.int64 \(2, 4\)"),
    ("x", torch.tensor(1.0), r"x floating and of shape \(\.\.\., K\), got torch.float32 \(\)"),
    ("weight", torch.zeros(5, 4, dtype=torch.int8), "weight floating and on cpu like x, got torch.int8 on cpu"),
    ("weight", torch.zeros(5, 4, device="meta"), "weight floating and on cpu like x, got torch.float32 on meta"),
    ("A", torch.zeros(3, 4, dtype=torch.int64), "A floating and on cpu like x, got torch.int64 on cpu"),
    ("B", torch.zeros(5, 3, device="meta"), "B floating and on cpu like x, got torch.float32 on meta"),
    ("magnitude", torch.zeros(5, dtype=torch.bool), "magnitude floating and on cpu like x, got torch.bool on cpu"),
    ("bias", torch.zeros(5, device="meta"), "bias floating and on cpu like x, got torch.float32 on meta"),
])
def test_wrong_dtypes_and_devices_are_named(name, other, words):
    tensors = dict(x=torch.zeros(2, 4), weight=torch.zeros(5, 4), bias=torch.zeros(5), A=torch.zeros(3, 4), B=torch.zeros(5, 3),
                   magnitude=torch.zeros(5)) | {name: other}
    x, weight, bias, A, B, magnitude = tensors.values()
    with pytest.raises(ValueError, match="lora_linear: expected " + words):
        lora_linear(x, weight, Lora(A, B, 1.0, 0.0, magnitude), bias)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="lora_qkv: expected as many loras and biases as weights, got 2, 1 and 2"):
        lora_qkv(torch.zeros(2, 4), (torch.zeros(3, 4),) * 2, (None,))


# ---------------------------------------------------------------- Triton


class Case(NamedTuple):
    """Projections of one x [T, K]; of each: N, rank (0: no adapter), dropout, bias, DoRA."""

    T: int
    K: int
    projections: list[tuple]
    frozen: str = "W"  # letters of the tensors that want no gradient


def inputs_of(case):
    """Return x, then every projection's W, bias, A, B, magnitude and dropout multiplier of x, in fp64.

    None where it has none.
    """
    def wants(letter, *shape, scale=1.0):
        return torch.randn(shape, dtype=DOUBLE).mul(scale).requires_grad_(letter not in case.frozen)

    tensors = [wants("x", case.T, case.K)]
    torch.manual_seed(7)
    with triton_mode():
        multipliers = [None if not rank else mask.cpu().double() for mask, (_, rank, *_) in zip(
            masks([torch.empty(case.T, case.K, device=DEVICE)] * len(case.projections), *[p[2] for p in case.projections]),
            case.projections, strict=True)]
    for multiplier, (n, rank, _, bias, dora) in zip(multipliers, case.projections, strict=True):
        tensors += [wants("W", n, case.K, scale=case.K**-0.5), wants("b", n) if bias else None]
        tensors += [wants("A", rank, case.K, scale=case.K**-0.5), wants("B", n, rank, scale=rank**-0.5)] if rank else [None, None]
        tensors += [torch.rand(n, dtype=DOUBLE).add(0.5).requires_grad_("m" not in case.frozen) if dora else None, multiplier]
    return tensors


def ours_of(case):
    def ours(x, *tensors):
        torch.manual_seed(7)
        parts = [tensors[i:i + 6] for i in range(0, len(tensors), 6)]
        loras = [Lora(A, B, 1.7, p[2], m) if p[1] else None for (_, _, A, B, m, _), p in zip(parts, case.projections, strict=True)]
        return lora_qkv(x, [part[0] for part in parts], loras, [part[1] for part in parts])
    return ours


def stock_of(case):
    def stock(x, *tensors):
        parts = [tensors[i:i + 6] for i in range(0, len(tensors), 6)]
        return [formula(x, W, Lora(A, B, 1.7, 0.0, m) if p[1] else None, bias, mask).to(x.dtype)
                for (W, bias, A, B, m, mask), p in zip(parts, case.projections, strict=True)]
    return stock


LINEAR = Case(37, 72, [(40, 16, 0.0, True, False)])
QKV = [(33, 3, 0.3, True, False), (16, 17, 0.0, False, False), (7, 1, 0.5, False, False)]
CASES = {
    "one token": Case(1, 7, [(5, 1, 0.3, False, False)]),
    "linear": LINEAR,
    "no tokens": Case(0, 8, [(5, 2, 0.3, True, True)]),
    "different ranks and masks": Case(37, 72, QKV),
    "five, one without adapter": Case(19, 33, [*QKV, (9, 0, 0.0, True, False), (11, 2, 0.1, True, False)]),
    "dora": Case(65, 31, [(33, 4, 0.3, True, True), (17, 5, 0.0, False, True), (8, 2, 0.0, True, False)], frozen=""),
    "dora, frozen magnitude": Case(9, 31, [(33, 4, 0.3, True, True)], frozen="Wm"),
    "rank 129": Case(35, 65, [(70, 129, 0.2, False, False)]),
    "rank 256": Case(18, 40, [(24, 256, 0.2, False, True)]),
    "rank 300": Case(18, 40, [(24, 300, 0.2, False, False)]),
    "trained base": Case(20, 24, QKV, frozen=""),
    "x wants no gradient": Case(20, 24, QKV, frozen="xW"),
    "only B trained": Case(20, 24, QKV, frozen="xWA"),
    "A frozen": Case(20, 24, QKV, frozen="WA"),
    "B frozen": Case(20, 24, QKV, frozen="WB"),
    "adapters frozen": Case(20, 24, QKV, frozen="WAB"),
}


# Those whose tiles, ranks and products come in every dtype; which tensors are frozen changes nothing that depends on one.
IN_EVERY_DTYPE = ("linear", "different ranks and masks", "dora", "rank 129", "rank 256", "rank 300")


@runs_triton
@pytest.mark.parametrize("name, dtype", [
    (name, dtype) for name in CASES for dtype in (DTYPES if name in IN_EVERY_DTYPE else [torch.bfloat16])])
def test_kernels_are_as_exact_as_torch(name, dtype):
    case = CASES[name]
    assert_as_exact_as_torch(ours_of(case), stock_of(case), inputs_of(case), dtype)


@runs_triton
@pytest.mark.parametrize("rows", [32, 64])
def test_kernels_at_every_number_of_rows_a_program_owns(rows, monkeypatch):
    """The other tests have 16."""
    monkeypatch.setattr(_lora_passes, "_block_m", lambda T: rows)
    case = Case(70, 24, [(16, 3, 0.3, False, False), (9, 2, 0.0, True, False)])
    assert_as_exact_as_torch(ours_of(case), stock_of(case), inputs_of(case), torch.bfloat16)


@runs_triton
def test_gradients_are_summed_in_slices(monkeypatch):
    """Slices of one tile's rows, the last of which is empty; the other tests have one slice."""
    monkeypatch.setattr(_lora_passes, "SLICE_ROWS", 1)
    case = Case(70, 24, [(16, 3, 0.3, False, False), (9, 2, 0.0, True, False)])
    assert_as_exact_as_torch(ours_of(case), stock_of(case), inputs_of(case), torch.bfloat16)


@runs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has the blocks of its own arch")
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_kernels_with_the_blocks_of_other_archs(arch, monkeypatch):
    """Blocks as launched on the GPUs that have settings of their own, and on those that share the rest."""
    for module in (_lora_passes, _launch):
        monkeypatch.setattr(module, "arch_of", lambda device: arch)
    for case in (Case(37, 150, [(140, 16, 0.2, True, False)]), Case(20, 40, [(33, 40, 0.3, True, False)] * 3)):
        assert_as_exact_as_torch(ours_of(case), stock_of(case), inputs_of(case), torch.bfloat16)


@runs_triton
def test_dora_sums_come_in_slices_of_rows():
    """301 rows are three slices, whose bounds are no multiples of a tile's rows."""
    dy, V = (torch.randn(301, 7, device=DEVICE) for _ in range(2))
    magnitude, norm = (torch.rand(7, device=DEVICE) + 0.5 for _ in range(2))
    with triton_mode():
        ours = _dora.finish_backward(dy, V, magnitude, norm, True)
    torch.testing.assert_close(ours, _dora.finish_backward_reference(dy, V, magnitude, norm, True))


@runs_triton
def test_kernels_take_fp32_masters_of_a_bf16_model():
    """The error is at most twice that of PEFT, which casts A and B to bf16; their gradients stay fp32."""
    weight, bias, lora = make(40, 72, r=16, dtype=torch.bfloat16, master=torch.float32)
    x, dy = (torch.randn(37, n, dtype=DOUBLE).bfloat16() for n in (72, 40))
    x, weight, bias, A, B, dy = to([x.requires_grad_(), weight, bias, lora.A, lora.B, dy])
    wanted = [x, A, B]

    def run(op, tensors, dy):
        x, A, B = tensors
        y = op(x, weight.to(x.dtype), Lora(A, B, lora.scaling), bias.to(x.dtype))
        return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    truth = run(formula, to(wanted, DOUBLE), dy)
    theirs = run(formula, wanted, dy)
    with triton_mode():
        ours = run(lora_linear, wanted, dy)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert error(mine, true) <= 2 * error(other, true) + 1e-6


@runs_triton
def test_kernels_take_views_and_huge_values():
    fused = torch.randn(3, 5, 28, device=DEVICE)
    fused[0, 0, :4] = torch.tensor([-3e18, -100.0, 100.0, 3e18])
    weight, bias, lora = make(12, 14, dtype=torch.float32)
    weight, bias, A, B = to([weight, bias, lora.A, lora.B])
    grown = torch.randn(14, 5, device=DEVICE)  # A as a transposed view
    A = grown.t()[:3].detach().requires_grad_()
    lora = lora._replace(A=A, B=B)
    x = fused.requires_grad_()
    for view in (x[..., 14:], x[..., ::2], x.transpose(0, 1)[..., :14]):
        expected = formula(view, weight, lora, bias)
        upstream = torch.randn(1, device=DEVICE).expand(expected.shape)
        with triton_mode():
            y = lora_linear(view, weight, lora, bias)
            found = torch.autograd.grad(y, [x, A, B], upstream)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, torch.autograd.grad(expected, [x, A, B], upstream), rtol=1e-3, atol=1e-3)


@runs_triton
def test_kernels_replay_masks_under_checkpointing_and_autocast():
    weight, bias, lora = make(12, 14, dropout=0.5, dtype=torch.float32)
    x, weight, bias, A, B = to([torch.randn(9, 14, requires_grad=True), weight, bias, lora.A, lora.B])
    lora = lora._replace(A=A, B=B)
    runs = []
    for run in (lora_linear, lambda *args: checkpoint(lora_linear, *args, use_reentrant=False)):
        torch.manual_seed(5)
        with triton_mode():
            with torch.autocast(DEVICE.type, torch.bfloat16):
                y = run(x, weight, lora, bias)
            torch.randn(3, device=DEVICE)
            runs.append((y, *torch.autograd.grad(y.square().sum(), [x, A, B])))
    assert runs[0][0].dtype == torch.bfloat16 and runs[0][2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@runs_triton
def test_the_backward_follows_its_forward_whatever_the_mode_is_by_then():
    case = Case(9, 24, [(16, 3, 0.3, False, False)])
    tensors = to(inputs_of(case), torch.float32)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    with triton_mode():
        y, = ours_of(case)(*tensors)
        inside = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    with backend_mode("reference"):
        assert all(torch.equal(a, b) for a, b in zip(inside, torch.autograd.grad(y.sum(), wanted), strict=True))


@runs_triton
def test_kernels_save_x_s_and_a_seed():
    weight, _, lora = make(64, 32, r=5, dropout=0.1, dtype=torch.float32)
    x, weight, A, B = to([torch.randn(50, 32, requires_grad=True), weight, lora.A, lora.B])
    saved = []
    with triton_mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, lora._replace(A=A, B=B))
    parameters = {t.data_ptr() for t in (weight, A, B)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in parameters) == x.numel() + 50 * 16 + 1


@runs_triton
@pytest.mark.parametrize("T, P, dora, slices", [(37, 3, False, 0), (37, 3, True, 0), (70, 1, False, 1)])
def test_products_and_launches_are_as_few_as_the_readme_says(T, P, dora, slices, monkeypatch):
    case = Case(T, 8, [(16, 3, 0.3, False, dora)] * P)
    tensors = to(inputs_of(case), torch.float32)
    monkeypatch.setattr(_lora_passes, "_block_m", lambda T: 64)
    monkeypatch.setattr(_lora_passes, "SLICE_ROWS", 2)
    with triton_mode(), Counted(monkeypatch) as counted:
        ys = ours_of(case)(*tensors)
        assert (counted.products, counted.launches, counted.sums) == (P, 1 + 2 * P * dora, 0)
        torch.autograd.grad(ys, [t for t in tensors if t is not None and t.requires_grad], ys)
        assert (counted.products, counted.launches, counted.sums) == (2 * P, 3 + 3 * P * dora, slices + P * dora)


@runs_triton
def test_kernels_compile_in_one_graph():
    torch._dynamo.reset()
    case = Case(9, 24, [(16, 3, 0.3, True, False), (9, 2, 0.0, True, True), (8, 0, 0.0, True, False)])
    tensors = to(inputs_of(case), torch.float32)
    wanted = [t for t in tensors if t is not None and t.requires_grad]

    def run(op):
        torch.manual_seed(7)
        ys = op(tensors[0], *parts)
        return *ys, *torch.autograd.grad(ys, wanted, [torch.ones_like(y) for y in ys])

    groups = [tensors[i:i + 6] for i in range(1, len(tensors), 6)]
    parts = ([g[0] for g in groups], [Lora(g[2], g[3], 1.7, p[2], g[4]) if p[1] else None for g, p in zip(groups, case.projections)],
             [g[1] for g in groups])
    with triton_mode():
        plain, compiled = run(lora_qkv), run(torch.compile(lora_qkv, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


@runs_triton
def test_passes_keep_to_their_schemas():
    x, G, A, B, seed = torch.randn(9, 24), torch.randn(9, 16), torch.randn(3, 24), torch.randn(16, 3), torch.tensor(4)
    x, G, A, B, seed = (t.to(DEVICE) for t in (x, G, A, B, seed))
    rest = seed, [1.5], [0], [40000]
    with triton_mode():
        S, _ = _lora_passes.lora_forward(x, [A], [B], [None], *rest)
        D, _ = _lora_passes.lora_backward([G], [A], [B], *rest, True)
        norm, magnitude, V = _dora.row_norms(G.t(), A[:, :9], B, 2.0), torch.rand(16, device=DEVICE), torch.randn(9, 16, device=DEVICE)
        for node, args in [
            (_lora_passes.lora_forward, (x, [A], [B], [B[:, 0]], *rest)), (_lora_passes.lora_backward, ([G], [A], [B], *rest, True)),
            (_lora_passes.lora_backward, ([G], [A], [B], *rest, False)),
            (_lora_passes.lora_gradients, (x, [G], S, D, [3], [True], [True], *rest)),
            (_lora_passes.lora_gradients, (x, [G], S, None, [3], [False], [True], *rest)),
            (_dora.row_norms, (G.t(), A[:, :9], B, 2.0)), (_dora.finish, (V, magnitude, norm, None)),
            (_dora.finish_backward, (G, V, magnitude, norm, True)), (_dora.finish_backward, (G, None, magnitude, norm, False)),
        ]:
            torch.library.opcheck(node.node, args)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_captured_graph_draws_new_masks_in_every_replay():
    weight, bias, lora = make(64, 32, dropout=0.5, dtype=torch.float32)
    x, weight, bias, A, B = to([torch.randn(50, 32, requires_grad=True), weight, bias, lora.A, lora.B])
    lora = lora._replace(A=A, B=B)

    def step():
        y = lora_linear(x, weight, lora, bias)
        return y, *torch.autograd.grad(y.sum(), [x, lora.A, lora.B])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([t.clone() for t in results])
    assert not torch.equal(replays[0][0], replays[1][0]) and not torch.equal(replays[0][2], replays[1][2])
    for y, dx, *_ in replays:  # dx = Σ_n W + a m ∘ (Σ_n B A): the mask that the forward drew
        delta = (dx - weight.sum(0)) / (lora.scaling / kept_fraction(0.5))
        mask = (delta.abs() > 1e-4).float()
        torch.testing.assert_close(y, formula(x, weight, lora, bias, mask / kept_fraction(0.5)), rtol=1e-3, atol=1e-3)
