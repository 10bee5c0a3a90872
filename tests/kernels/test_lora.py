"""lora_linear and lora_qkv against the plain formula, torch's gradcheck and PEFT's own modules."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.lora import Lora, lora_linear, lora_qkv
from kernels.nf4 import dequantize_nf4
from tests.helpers.kernels import given, settings, st
from tests.helpers.lora_cases import DOUBLE, FORMS, assert_same, formula, lora_of, make, masks, nf4, peft_linear, relative, trained


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
