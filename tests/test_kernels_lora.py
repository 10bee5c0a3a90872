"""lora_linear and lora_qkv against the plain formula, torch's gradcheck and PEFT's own modules."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch.utils.checkpoint import checkpoint

from kernels._dropout import dropout_mask, kept_fraction
from kernels.lora import Lora, lora_linear, lora_qkv
from tests.kernels import given, settings, st

DOUBLE = torch.float64


def make(n, k, r=3, scaling=1.7, dropout=0.0, dora=False, dtype=DOUBLE, master=None, base_grad=False):
    """A weight [n, k], a bias and a Lora whose tensors want gradients."""
    weight = (torch.randn(n, k, dtype=DOUBLE) / k**0.5).to(dtype).requires_grad_(base_grad)
    bias = torch.randn(n, dtype=DOUBLE).to(dtype).requires_grad_(base_grad)
    A, B = (torch.randn(*shape, dtype=DOUBLE).to(master or dtype).requires_grad_() for shape in ((r, k), (n, r)))
    magnitude = torch.rand(n, dtype=DOUBLE).add(0.5).to(master or dtype).requires_grad_() if dora else None
    return weight, bias, Lora(A, B, scaling, dropout, magnitude)


def formula(x, weight, lora, bias=None, mask=None):
    """The definition in plain differentiable torch; `mask` is the dropout's multiplier of x."""
    if lora is None:
        return F.linear(x, weight, bias)
    A, B = lora.A.to(x.dtype), lora.B.to(x.dtype)
    value = x @ weight.t() + lora.scaling * ((x if mask is None else x * mask) @ A.t()) @ B.t()
    if lora.magnitude is not None:
        norm = (weight + lora.scaling * B @ A).norm(dim=1).detach()
        value = value * (lora.magnitude / norm)
    return value if bias is None else value + bias


def trained(*things):
    """Every tensor in `things` (Loras opened up) that wants a gradient."""
    flat = [t for thing in things for t in (thing if isinstance(thing, tuple) else (thing,))]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]


def assert_same(ours, theirs, inputs, scale=1e-10):
    """Outputs and all gradients, for one random upstream gradient."""
    upstream = [torch.randn_like(y) for y in ours]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=scale, atol=scale)
    got, expected = (torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs))
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=scale, atol=scale)


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


def peft_linear(n, k, bias, **config):
    base = torch.nn.Linear(k, n, bias=bias, dtype=DOUBLE).requires_grad_(False)
    module = PeftLinear(base, "default", config=LoraConfig(r=4, lora_alpha=10, **config), r=4, lora_alpha=10).double()
    torch.nn.init.normal_(module.lora_B["default"].weight)
    return module


def lora_of(module, dropout=0.0):
    magnitude = module.lora_magnitude_vector["default"].weight if "default" in module.lora_magnitude_vector else None
    A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
    return Lora(A, B, module.scaling["default"], dropout, magnitude)


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
    seeds = [int(torch.randint(2**62, ())) for _ in modules]
    for module, seed in zip(modules, seeds, strict=True):
        mask = dropout_mask(x.shape, 0.4, DOUBLE, torch.Generator().manual_seed(seed))
        module.lora_dropout["default"] = FixedDropout(mask / kept_fraction(0.4))
    torch.manual_seed(3)
    loras = [lora_of(module, dropout=0.4) for module in modules]
    ours = lora_qkv(x, [m.base_layer.weight for m in modules], loras, [m.base_layer.bias for m in modules])
    assert_same(ours, [module(x) for module in modules], trained(x, *loras))


def test_dora_with_dropout_drops_the_adapter_only():
    weight, bias, lora = make(7, 6, dropout=0.4, dora=True)
    x = torch.randn(5, 6, dtype=DOUBLE, requires_grad=True)
    torch.manual_seed(3)
    mask = dropout_mask(x.shape, 0.4, DOUBLE, torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
    torch.manual_seed(3)
    ours = lora_linear(x, weight, lora, bias)
    assert_same([ours], [formula(x, weight, lora, bias, mask / kept_fraction(0.4))], trained(x, lora))


@pytest.mark.parametrize("dropout", [1e-7, 0.05, 0.5, 0.97])
def test_mask_rate_and_independence(dropout):
    generator = torch.Generator().manual_seed(0)
    masks = [dropout_mask(torch.Size((401, 997)), dropout, torch.float32, generator) for _ in range(2)]
    kept, n = kept_fraction(dropout), 401 * 997
    assert abs(kept - (1 - dropout)) <= 2**-16
    deviation = (kept * (1 - kept) / n) ** 0.5
    for mask in masks:
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert abs(mask.mean(dtype=DOUBLE) - kept) < 5 * deviation + 1e-6
        neighbours = (mask[:, 1:] * mask[:, :-1]).mean(dtype=DOUBLE)
        assert abs(neighbours - kept**2) < 15 * deviation + 1e-6
    both = (masks[0] * masks[1]).mean(dtype=DOUBLE)
    assert abs(both - kept**2) < 10 * deviation + 1e-6


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


def relative(got, exact):
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


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
    assert sum(t.numel() for t in saved if t.data_ptr() not in parameters) == x.numel() + 50 * 2


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


def test_counts_must_agree():
    with pytest.raises(ValueError, match="lora_qkv: expected as many loras and biases as weights, got 2, 1 and 2"):
        lora_qkv(torch.zeros(2, 4), (torch.zeros(3, 4),) * 2, (None,))
