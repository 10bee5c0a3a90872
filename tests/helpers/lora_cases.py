"""Inputs, oracles and counters for the tests of LoRA linears and the LoRA MLP."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import _dora, _lora_passes
from kernels._dispatch import backend_mode
from kernels._dropout import draw_mask, draw_seed, kept_fraction
from kernels.lora import Lora
from kernels.nf4 import Nf4
from tests.helpers.kernels import runs_triton, triton_mode

DOUBLE = torch.float64
FORMS = [pytest.param(lambda: backend_mode("reference"), id="reference"), pytest.param(triton_mode, id="triton", marks=runs_triton)]


def make(n, k, r=3, scaling=1.7, dropout=0.0, dora=False, dtype=DOUBLE, master=None, base_grad=False):
    """Return a weight [n, k], a bias and a Lora whose tensors require gradients."""
    weight = (torch.randn(n, k, dtype=DOUBLE) / k**0.5).to(dtype).requires_grad_(base_grad)
    bias = torch.randn(n, dtype=DOUBLE).to(dtype).requires_grad_(base_grad)
    A, B = (torch.randn(*shape, dtype=DOUBLE).to(master or dtype).requires_grad_() for shape in ((r, k), (n, r)))
    magnitude = torch.rand(n, dtype=DOUBLE).add(0.5).to(master or dtype).requires_grad_() if dora else None
    return weight, bias, Lora(A, B, scaling, dropout, magnitude)


def formula(x, weight, lora, bias=None, mask=None):
    """Return the projection in plain differentiable torch; `mask` is the dropout's multiplier of x."""
    if lora is None:
        return F.linear(x, weight, bias)
    A, B = lora.A.to(x.dtype), lora.B.to(x.dtype)
    value = x @ weight.t() + lora.scaling * ((x if mask is None else x * mask) @ A.t()) @ B.t()
    if lora.magnitude is not None:
        norm = (weight + lora.scaling * B @ A).norm(dim=1).detach()
        value = value * (lora.magnitude / norm)
    return value if bias is None else value + bias


def masks(inputs, *dropouts):
    """Return the dropout multipliers of the next call: one seed per call, mask i for projection i."""
    seed = draw_seed(inputs[0].device)
    return [draw_mask(x.detach().flatten(0, -2), seed, i, p).view(x.shape).div(kept_fraction(p))
            for i, (x, p) in enumerate(zip(inputs, dropouts * len(inputs) if len(dropouts) == 1 else dropouts, strict=True))]


def trained(*things):
    """Return every tensor in `things` and their Loras that requires a gradient."""
    flat = [t for thing in things for t in (thing if isinstance(thing, tuple) else (thing,))]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]


def assert_same(ours, theirs, inputs, scale=1e-10):
    """Assert that outputs and all gradients agree, for one random upstream gradient."""
    upstream = [torch.randn_like(y) for y in ours]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=scale, atol=scale)
    got, expected = (torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs))
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=scale, atol=scale)


def relative(got, exact):
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


def peft_linear(n, k, bias, **config):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.layer import Linear as PeftLinear

    base = torch.nn.Linear(k, n, bias=bias, dtype=DOUBLE).requires_grad_(False)
    module = PeftLinear(base, "default", config=peft.LoraConfig(r=4, lora_alpha=10, **config), r=4, lora_alpha=10).double()
    torch.nn.init.normal_(module.lora_B["default"].weight)
    return module


def lora_of(module, dropout=0.0):
    magnitude = module.lora_magnitude_vector["default"].weight if "default" in module.lora_magnitude_vector else None
    A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
    return Lora(A, B, module.scaling["default"], dropout, magnitude)


def nf4(weight):
    """Return `weight` quantised by bitsandbytes, with double quantisation."""
    quantize = pytest.importorskip("bitsandbytes").functional.quantize_4bit
    codes, state = quantize(weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return Nf4(codes, state.absmax, state.state2.code, state.state2.absmax, state.offset, tuple(weight.shape), weight.dtype, 64)


class Counted(TorchDispatchMode):
    """Counts torch's matmuls and sums over slices, and Triton's launches."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.products = self.launches = self.sums = 0
        for module in (_lora_passes, _dora, importlib.import_module("kernels.glu")):
            monkeypatch.setattr(module, "launch", self.counting(module.launch))

    def counting(self, launch):
        def run(*args, **constexprs):
            self.launches += 1
            launch(*args, **constexprs)
        return run

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::bmm")
        self.sums += function._schema.name == "aten::sum"
        return function(*args, **kwargs or {})
