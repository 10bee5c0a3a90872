"""The Triton kernels of lora_linear and lora_qkv, against the plain formula in fp64."""

from typing import NamedTuple

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import _dora, _launch, _lora_passes
from kernels._dispatch import backend_mode
from kernels._dropout import kept_fraction
from kernels.lora import Lora, lora_linear, lora_qkv
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, error, runs_triton, to, triton_mode
from tests.helpers.lora_cases import DOUBLE, Counted, formula, make, masks


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
