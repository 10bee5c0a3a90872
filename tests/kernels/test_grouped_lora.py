"""grouped_lora_linear against the plain formula, adapter by adapter, torch's gradcheck and lora_linear."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels.grouped_lora as grouped_lora
from kernels.grouped_lora import grouped_lora_backward, grouped_lora_forward, grouped_lora_linear, rows_by_adapter
from kernels.lora import Lora, lora_linear
from tests.helpers.kernels import DEVICE, DTYPES, assert_as_exact_as_torch, given, runs_triton, settings, st, to, triton_mode

DOUBLE = torch.float64
PACKED = [0, 0, 0, 1, 1, -1, -1, 2, 2, 2, 2]
SHUFFLED = [2, -1, 0, 2, 1, 0, 2, -1, 1, 0, 2]


def make(t, k=6, n=5, r=2, g=3, dtype=DOUBLE, base_grad=False, device="cpu"):
    """x [t, k], weight, A, B, scaling, bias; all want gradients but the scaling and, unless asked, the base."""

    def normal(*shape, grad=True):
        return (torch.randn(shape, dtype=DOUBLE) / shape[-1] ** 0.5).to(device, dtype).requires_grad_(grad)

    return (normal(t, k), normal(n, k, grad=base_grad), normal(g, r, k), normal(g, n, r),
            (torch.rand(g, dtype=DOUBLE) + 0.5).to(device, dtype), normal(n, grad=base_grad))


def formula(x, weight, A, B, scaling, index, bias=None):
    """The definition in plain differentiable torch: every adapter on every row, then a choice."""
    y = F.linear(x, weight, bias)
    for g in range(A.shape[0]):
        part = scaling[g] * ((x @ A[g].to(x.dtype).t()) @ B[g].to(x.dtype).t())
        y = y + torch.where((index == g)[..., None], part, torch.zeros_like(part))
    return y


def leaves(*tensors):
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]


def assert_same(ours, theirs, inputs, tolerance=1e-11):
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    got, expected = (torch.autograd.grad(y, inputs, upstream, retain_graph=True) for y in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("index", [PACKED, SHUFFLED, [-1, -1], []], ids=["packed", "shuffled", "none", "empty"])
@pytest.mark.parametrize("base_grad", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck(index, base_grad, biased):
    x, weight, A, B, scaling, bias = make(len(index), base_grad=base_grad)
    index, bias = torch.tensor(index, dtype=torch.int64), bias if biased else None
    tensors = leaves(x, weight, A, B, bias)
    assert torch.autograd.gradcheck(lambda *_: grouped_lora_linear(x, weight, A, B, scaling, index, bias), tensors)
    assert_same(grouped_lora_linear(x, weight, A, B, scaling, index, bias), formula(x, weight, A, B, scaling, index, bias), tensors)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), g=st.integers(1, 5), k=st.sampled_from([1, 7, 16]), n=st.sampled_from([1, 13]), r=st.integers(1, 4),
       wide=st.booleans(), packed=st.booleans(), base_grad=st.booleans())
def test_any_choice_equals_the_formula(data, g, k, n, r, wide, packed, base_grad):
    index = data.draw(st.lists(st.integers(-1, g - 1), max_size=12))
    index = torch.tensor(sorted(index) if packed else index, dtype=torch.int32)
    x, weight, A, B, scaling, bias = make(len(index), 2 * k if wide else k, n, r, g, base_grad=base_grad)
    strided = x[:, ::2] if wide else x
    weight = weight[:, ::2] if wide else weight
    A = A[:, :, ::2] if wide else A
    tensors = [x, *leaves(B, bias), *([] if wide else leaves(weight, A))]
    assert_same(*(f(strided, weight, A, B, scaling, index, bias) for f in (grouped_lora_linear, formula)), tensors)


@pytest.mark.parametrize("g", [1, 4])
def test_equals_lora_linear_where_all_rows_have_one_adapter(g):
    x, weight, A, B, scaling, bias = make(9, g=g, base_grad=True)
    chosen = g - 1
    ours = grouped_lora_linear(x, weight, A, B, scaling.tolist(), torch.full((9,), chosen), bias)
    theirs = lora_linear(x, weight, Lora(A[chosen], B[chosen], scaling[chosen].item()), bias)
    assert_same(ours, theirs, [x, weight, A, B, bias])


def test_the_order_of_rows_changes_nothing():
    x, weight, A, B, scaling, _ = make(len(PACKED))
    index, order = torch.tensor(PACKED), torch.randperm(len(PACKED))
    dy = torch.randn(len(PACKED), 5, dtype=DOUBLE)
    y, shuffled = (grouped_lora_linear(x[i], weight, A, B, scaling, index[i]) for i in (torch.arange(len(PACKED)), order))
    torch.testing.assert_close(y[order], shuffled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(v, [x, A, B], d) for v, d in ((y, dy), (shuffled, dy[order]))), rtol=1e-11, atol=1e-11)


def test_rows_without_an_adapter_are_the_base_alone_and_an_idle_adapter_gets_exactly_zero():
    x, weight, A, B, scaling, bias = make(4)
    B.data[1] = float("nan")
    y = grouped_lora_linear(x, weight, A, B, scaling, torch.tensor([0, -1, -1, 2]), bias)
    assert torch.equal(y[1:3], F.linear(x, weight, bias)[1:3])
    dA, dB = torch.autograd.grad(y.sum(), (A, B))
    assert torch.equal(dA[1], torch.zeros_like(dA[1])) and torch.equal(dB[1], torch.zeros_like(dB[1]))
    assert dA[0].abs().min() > 0 and dB[2].abs().min() > 0


def test_rows_by_adapter():
    index = torch.tensor([1, 1, 0, -1, 0, 2, 7])
    rows = rows_by_adapter(index, 4)
    assert rows[0].tolist() == [2, 4] and rows[1] == slice(0, 2) and rows[2] == slice(5, 6) and rows[3].tolist() == []


@pytest.mark.parametrize("wanted", ["x", "weight", "A", "B", "bias"])
def test_one_gradient_alone(wanted):
    x, weight, A, B, scaling, bias = (t.detach() for t in make(len(PACKED)))
    leaf = dict(x=x, weight=weight, A=A, B=B, bias=bias)[wanted].requires_grad_()
    assert_same(*(f(x, weight, A, B, scaling, torch.tensor(SHUFFLED), bias) for f in (grouped_lora_linear, formula)), [leaf])


def test_leading_dimensions_and_masters_in_fp32():
    x, weight, A, B, scaling, bias = make(len(PACKED), dtype=torch.bfloat16)
    A, B = (t.detach().float().requires_grad_() for t in (A, B))
    index = torch.tensor(PACKED)
    y = grouped_lora_linear(x.view(1, -1, 6), weight, A, B, scaling, index[None], bias)
    flat = grouped_lora_linear(x, weight, A, B, scaling, index, bias)
    assert y.shape == (1, len(PACKED), 5) and torch.equal(y[0], flat)
    dx, dA, dB = torch.autograd.grad(y.sum(), (x, A, B))
    assert (dx.dtype, dA.dtype, dB.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_autocast_casts_products():
    x, weight, A, B, scaling, bias = make(len(PACKED), dtype=torch.float32, base_grad=True)
    index = torch.tensor(SHUFFLED)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_lora_linear(x, weight, A, B, scaling, index, bias)
    gradients = torch.autograd.grad(y.sum(), (x, weight, A, B, bias))
    assert y.dtype == torch.bfloat16 and {g.dtype for g in gradients} == {torch.float32}
    torch.testing.assert_close(y.float(), formula(x, weight, A, B, scaling, index, bias), rtol=0.05, atol=0.05)


def test_saves_x_s_and_the_parameters_only():
    x, weight, A, B, scaling, _ = make(len(PACKED))
    index, saved = torch.tensor(PACKED), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_lora_linear(x, weight, A, B, scaling, index)
    known = {t.data_ptr() for t in (x, weight, A, B, scaling, index)}
    assert [t.shape for t in saved if t.data_ptr() not in known] == [(len(PACKED), 2)]


def test_under_activation_checkpointing():
    x, weight, A, B, scaling, _ = make(len(PACKED))
    index = torch.tensor(SHUFFLED)

    def run(wrap):
        y = wrap(lambda x: grouped_lora_linear(x, weight, A, B, scaling, index), x)
        return torch.autograd.grad(y.sum(), (x, A, B))

    assert all(map(torch.equal, run(lambda f, x: f(x)), run(lambda f, x: checkpoint(f, x, use_reentrant=False))))


def check_compiles(device):
    torch._dynamo.reset()
    x, weight, A, B, scaling, bias = make(len(PACKED), dtype=torch.float32, base_grad=True, device=device)
    index = torch.tensor(SHUFFLED, device=device)
    compiled = torch.compile(lambda x: grouped_lora_linear(x, weight, A, B, scaling, index, bias), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), formula(x, weight, A, B, scaling, index, bias), [x, weight, A, B, bias], 1e-4)
    x, weight, A, B = (t.detach() for t in (x, weight, A, B))
    torch.library.opcheck(grouped_lora_forward.node, (x, weight, A, B, scaling, index, None))
    _, S = grouped_lora_forward(x, weight, A, B, scaling, index, None)
    for wanted in ((True,) * 5, (False, False, False, True, False)):
        dy = torch.randn(len(PACKED), 5, device=device)
        torch.library.opcheck(grouped_lora_backward.node, (dy, x, weight, A, B, S, scaling, index, *wanted))


def test_compiles_in_one_graph():
    check_compiles("cpu")


@pytest.mark.parametrize("change, message", [
    (dict(A=torch.zeros(2, 3)), r"expected x \[..., K\], weight \[N, K\] and A \[G, R, K\], got \(4, 6\), \(5, 6\) and \(2, 3\)"),
    (dict(x=torch.zeros(4, 7)), r"expected x of shape \(4, 6\) on cpu, got \(4, 7\) on cpu"),
    (dict(A=torch.zeros(3, 2, 7)), r"expected A of shape \(3, 2, 6\) on cpu, got \(3, 2, 7\)"),
    (dict(B=torch.zeros(3, 5, 1)), r"expected B of shape \(3, 5, 2\) on cpu, got \(3, 5, 1\)"),
    (dict(scaling=[1.0, 2.0]), r"expected scaling of shape \(3,\) on cpu, got \(2,\)"),
    (dict(index=torch.zeros(3, dtype=torch.int64)), r"expected index of shape \(4,\) on cpu, got \(3,\)"),
    (dict(index=torch.zeros(4)), "expected index int32 or int64, got torch.float32"),
    (dict(index=torch.tensor([0, 3, 0, 0])), r"expected index in \[-1, 3\), got 3 at row 1"),
    (dict(index=torch.tensor([0, 0, -2, 0])), r"expected index in \[-1, 3\), got -2 at row 2"),
    (dict(bias=torch.zeros(4)), r"expected bias of shape \(5,\) on cpu, got \(4,\)"),
    (dict(B=torch.zeros(3, 5, 2, device="meta")), r"expected B of shape \(3, 5, 2\) on cpu, got \(3, 5, 2\) on meta"),
    (dict(weight=torch.zeros(5, 6, dtype=torch.uint8)), "expected weight of a floating dtype, got torch.uint8"),
])
def test_mistakes_are_named(change, message):
    call = dict(x=torch.zeros(4, 6), weight=torch.zeros(5, 6), A=torch.zeros(3, 2, 6), B=torch.zeros(3, 5, 2), scaling=[1.0] * 3,
                index=torch.zeros(4, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match="grouped_lora_linear: .*" + message):
        grouped_lora_linear(**call)


# ---------------------------------------------------------------- Triton


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, k, n, r, g, order, base_grad", [
    (0, 5, 4, 2, 2, "packed", True), (1, 1, 1, 1, 1, "packed", True), (67, 33, 130, 3, 3, "packed", False),
    (129, 131, 65, 16, 3, "shuffled", True), (260, 33, 31, 70, 1, "packed", False), (64, 17, 129, 8, 1, "one", True)])
def test_kernels_are_as_exact_as_torch(t, k, n, r, g, order, base_grad, dtype):
    """Tiles that are not full, several tiles of rows, columns and ranks, several splits of an adapter's rows."""
    index = torch.randint(-1, g, (t,)) if order != "one" else torch.zeros(t, dtype=torch.int64)
    index = index if order == "shuffled" else index.sort()[0]
    x, weight, A, B, scaling, bias = make(t, k, n, r, g, base_grad=base_grad)
    assert_as_exact_as_torch(grouped_lora_linear, formula, [x, weight, A, B, scaling, index, bias], dtype)


@runs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_with_fp32_masters_views_and_int32(dtype):
    """x, dy, index, scaling and bias strided, A and B in fp32 and not dense, leading dimensions."""
    x, weight, A, B, scaling, bias = to(make(2 * 70, 40, 24, 6, 3), device="cpu")
    index = torch.randint(-1, 3, (2, 35), dtype=torch.int32)

    def with_(op):
        def run(x, weight, A, B, scaling, index, bias):
            A, B = A.mT.contiguous().mT.float(), B.mT.contiguous().mT.float()  # float() is no node for fp32 masters
            A, B = (t.double() if x.dtype == DOUBLE else t for t in (A, B))
            scaling, bias = (torch.stack((t, t), 1)[:, 0] for t in (scaling, bias))
            y = op(x.view(2, 35, 80)[..., 1::2], weight, A, B, scaling, index.mT.contiguous().mT, bias)
            return y.mT
        return run

    x = x.detach().reshape(2 * 35, 80).requires_grad_()
    assert_as_exact_as_torch(with_(grouped_lora_linear), with_(formula), [x, weight, A, B, scaling, index, bias], dtype)


@runs_triton
def test_kernels_keep_adapters_apart():
    """NaN in one adapter and in its rows, in adapters that no row chose: every other row and gradient is as without them."""
    x, weight, A, B, scaling, _ = to(make(150, 20, 40, 4, 5, dtype=torch.float32))
    index = torch.randint(0, 3, (150,), device=DEVICE)
    index[::7] = -1
    A.data[1], B.data[1] = float("nan"), float("inf")
    A.data[3] = B.data[4] = float("nan")  # no row chooses 3 or 4
    clean = index != 1
    x.data[~clean] = float("nan")
    with triton_mode():
        y = grouped_lora_linear(x, weight, A, B, scaling, index)
        dx, dA, dB = torch.autograd.grad(y[clean].sum(), (x, A, B))
    others = torch.where(clean, index, -1)
    expected = formula(x.nan_to_num(0), weight, A.nan_to_num(0, 0, 0), B.nan_to_num(0, 0, 0), scaling, others)
    torch.testing.assert_close(y[clean], expected[clean])
    assert y[~clean].isnan().all() and torch.equal(dA[3:], torch.zeros_like(dA[3:])) and torch.equal(dB[3:], torch.zeros_like(dB[3:]))
    truth = torch.autograd.grad(expected[clean].sum(), (x, A, B))
    torch.testing.assert_close(dx[clean], truth[0][clean])
    for mine, true in ((dA, truth[1]), (dB, truth[2])):
        torch.testing.assert_close(mine[[0, 2]], true[[0, 2]])


@runs_triton
def test_kernels_find_the_rows_of_an_adapter_anywhere():
    """More rows than one scan reads: an adapter in the first scan only, one at both ends, one in the second only."""
    index = torch.full((1100,), -1)
    index[100:900:3], index[[5, 1099]], index[1030:1090] = 0, 1, 2
    x, _, A, *_ = make(1100, 16, r=4, g=4, dtype=torch.float32)
    x, S, index = x.detach().to(DEVICE), torch.randn(1100, 4).to(DEVICE), index.to(DEVICE)
    with triton_mode():
        dA = grouped_lora._outer(S, x, A.detach().to(DEVICE), False, index)
    for g in range(4):
        torch.testing.assert_close(dA[g], S[index == g].t() @ x[index == g])


@runs_triton
def test_kernels_equal_lora_linear_where_all_rows_have_one_adapter():
    x, weight, A, B, scaling, bias = to(make(70, 33, 40, 8, 3, dtype=torch.float32))
    index = torch.full((70,), 2, device=DEVICE)
    with triton_mode():
        ours = grouped_lora_linear(x, weight, A, B, scaling, index, bias)
        theirs = lora_linear(x, weight, Lora(A[2], B[2], scaling[2].item()), bias)
        assert_same(ours, theirs, [x, A, B], 1e-4)


@runs_triton
def test_kernels_take_an_index_out_of_range_for_none():
    """As a GPU would, where reading the index costs a sync: the operators' own check is of CPU tensors."""
    x, weight, A, B, scaling, _ = to(make(70, 20, 24, 4, 3, dtype=torch.float32))
    index = torch.randint(-1, 3, (70,), device=DEVICE)
    wild = torch.where(index == -1, torch.where(torch.arange(70, device=DEVICE) % 2 == 0, 2**40, -7), index)
    with triton_mode():
        results = []
        for chosen in (index, wild):
            S = grouped_lora._squeeze(x, A, scaling, chosen)
            results.append((S, grouped_lora._expand(S, B.mT, chosen, None), grouped_lora._outer(S, x, A, False, chosen)))
    assert all(map(torch.equal, *results))


@runs_triton
def test_kernels_compile_in_one_graph():
    with triton_mode():
        check_compiles(DEVICE)
