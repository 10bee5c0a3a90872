"""NF4 against bitsandbytes on a CPU, bit for bit, and against the formula element by element."""

import pytest
import torch

from kernels.nf4 import BLOCKSIZES, QUANTILES, Nf4, dequantize_nf4, dequantize_nf4_forward, dequantize_nf4_reference
from tests.helpers.kernels import DEVICE, DTYPES, given, poisoned, runs_triton, settings, st, triton_mode

SHAPES = [(1, 1), (1, 2), (3, 5), (1, 7), (7, 9), (31, 33), (64, 64), (17, 241), (129, 130), (2, 8191), (255, 257)]


def random_weight(shape, blocksize=64, nested=True, dtype=torch.float32, device=DEVICE) -> Nf4:
    """Return a weight of random bytes, all of which are valid."""
    blocks = -(-shape[0] * shape[1] // blocksize)
    codes = torch.randint(0, 256, (-(-shape[0] * shape[1] // 2), 1), dtype=torch.uint8, device=device)
    if not nested:
        return Nf4(codes, torch.rand(blocks, device=device), None, None, None, shape, dtype, blocksize)
    return Nf4(codes, torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device), torch.rand(256, device=device) * 2 - 1,
               torch.rand(-(-blocks // 256), device=device), torch.rand((), device=device), shape, dtype, blocksize)


def to(weight: Nf4, device) -> Nf4:
    return Nf4(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in weight))


def element_by_element(weight: Nf4) -> torch.Tensor:
    """W in fp32: Python chooses, numpy's float32 rounds once an operation."""
    import numpy as np

    codes, absmax, table, scales, offset = (None if t is None else t.cpu().flatten().numpy() for t in weight[:5])
    values = []
    for e in range(weight.shape[0] * weight.shape[1]):
        byte, b = int(codes[e // 2]), e // weight.blocksize
        m = absmax[b] if table is None else np.float32(table[absmax[b]] * scales[b // 256]) + offset[0]
        values.append(np.float32(QUANTILES[byte & 15 if e % 2 else byte >> 4]) * m)
    return torch.from_numpy(np.array(values, dtype=np.float32)).view(weight.shape)


def quantized(dense: torch.Tensor, nested: bool, blocksize: int, dtype: torch.dtype) -> tuple[Nf4, torch.Tensor]:
    """Return the weight as bitsandbytes quantises it on a CPU, and its dequantised values.

    It is quantised as one row, so that no row's end shifts the blocks.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(dense, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    weight = Nf4(codes, state.absmax, *((state.state2.code, state.state2.absmax, state.offset) if nested else (None,) * 3),
                 tuple(state.shape), state.dtype, state.blocksize)
    state.dtype, state.shape = dtype, torch.Size((1, dense.numel()))
    return weight, functional.dequantize_4bit(codes, state).view(dense.shape)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 6), (64, 64), (33, 62), (128, 200), (300, 258)])
def test_reference_has_the_bits_of_bitsandbytes(shape, dtype, nested):
    for blocksize in (32, 64, 4096):
        weight, theirs = quantized(torch.randn(shape).mul(0.05).to(dtype), nested, blocksize, dtype)
        assert weight.dtype == dtype
        assert torch.equal(dequantize_nf4(weight), theirs), blocksize


def test_reference_has_the_bits_of_bitsandbytes_in_its_own_shape():
    """Rows that end with a block: every transformer's."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(torch.randn(48, 256, dtype=torch.bfloat16), quant_type="nf4")
    weight = Nf4(codes, state.absmax, None, None, None, tuple(state.shape), state.dtype, state.blocksize)
    assert torch.equal(dequantize_nf4(weight), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("nested", [True, False])
def test_an_odd_number_of_elements(nested):
    """bitsandbytes dequantises these by another path, which it compiles."""
    pytest.importorskip("bitsandbytes")
    with torch._dynamo.config.patch(disable=True):
        weight, theirs = quantized(torch.randn(7, 9), nested, 64, torch.float32)
    assert torch.equal(dequantize_nf4(weight), theirs)


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 99)), blocksize=st.sampled_from(BLOCKSIZES[:3]), nested=st.booleans())
def test_reference_is_the_formula(shape, blocksize, nested):
    weight = random_weight(shape, blocksize, nested, device="cpu")
    exact = element_by_element(weight)
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(dequantize_nf4_reference(weight, dtype), exact.to(dtype)), dtype


def test_groups_of_blocks_have_scales_of_their_own():
    weight = random_weight((256, 150), 32, device="cpu")  # 1200 blocks, 5 groups
    assert torch.equal(dequantize_nf4(weight), element_by_element(weight))


def test_quantiles_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(QUANTILES), functional.get_4bit_type("nf4", device="cpu"))


def test_dtype_is_the_weights_own_unless_told_and_there_is_no_gradient():
    weight = random_weight((4, 6), dtype=torch.bfloat16)
    assert dequantize_nf4(weight).dtype == torch.bfloat16 and not dequantize_nf4(weight).requires_grad
    assert dequantize_nf4(weight, torch.float64).dtype == torch.float64
    assert dequantize_nf4(random_weight((0, 6))).shape == (0, 6)
    assert weight.device == weight.codes.device and weight.nbytes == 12 + 1 + 256 * 4 + 4 + 4


@pytest.mark.parametrize(("change", "words"), [
    (dict(shape=(4, 3, 2)), r"expected a shape of two sizes, got \(4, 3, 2\)"),
    (dict(blocksize=48), r"expected a blocksize in \(32, 64, .*\), got 48"),
    (dict(offset=None), "expected all of nested_code, nested_absmax and offset, or none, got some"),
    (dict(shape=(4, 7)), r"expected codes of 14 contiguous torch.uint8 on .* for a weight of \(4, 7\) in blocks of 64"),
    (dict(codes=torch.zeros(12, device=DEVICE)), r"expected codes of 12 contiguous torch.uint8 .*, got \(12,\) torch.float32"),
    (dict(codes=torch.zeros(12, 2, dtype=torch.uint8, device=DEVICE)[:, 0]), "expected codes of 12 contiguous"),
    (dict(absmax=torch.zeros(1, device=DEVICE)), r"expected absmax of 1 contiguous torch.uint8 .*, got \(1,\) torch.float32"),
    (dict(absmax=torch.zeros(1, dtype=torch.uint8, device="meta")), "expected absmax .* on meta"),
    (dict(nested_code=torch.zeros(16, device=DEVICE)), r"expected nested_code of 256 .*, got \(16,\)"),
    (dict(nested_absmax=torch.zeros(2, device=DEVICE)), r"expected nested_absmax of 1 .*, got \(2,\)"),
    (dict(offset=torch.zeros((), dtype=torch.float64, device=DEVICE)), r"expected offset of 1 .*, got \(\) torch.float64"),
])
def test_mistakes_are_named(change, words):
    with pytest.raises(ValueError, match="dequantize_nf4: " + words):
        dequantize_nf4(random_weight((4, 6))._replace(**change))


def test_a_dtype_that_is_not_floating_is_named():
    with pytest.raises(ValueError, match="dequantize_nf4: expected a floating dtype, got torch.int8"):
        dequantize_nf4(random_weight((4, 6)), torch.int8)


# ---------------------------------------------------------------- Triton


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_has_the_bits_of_the_reference(shape, nested, dtype):
    weight = random_weight(shape, 64 if shape[0] % 2 else 32, nested)
    before = to(weight, DEVICE)
    with triton_mode(), poisoned():
        first, second = dequantize_nf4(weight, dtype), dequantize_nf4(weight, dtype)
    assert torch.equal(first, second) and first.is_contiguous() and first.shape == shape
    assert torch.equal(first.cpu(), dequantize_nf4_reference(to(weight, "cpu"), dtype))
    assert all(torch.equal(a, b) for a, b in zip(before[:5], weight[:5]) if a is not None), "an input was written"


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_has_the_bits_of_bitsandbytes(dtype):
    for shape, nested in (((64, 192), True), ((64, 192), False), ((66, 258), True)):
        weight, theirs = quantized(torch.randn(shape).to(dtype), nested, 64, dtype)
        with triton_mode():
            assert torch.equal(dequantize_nf4(to(weight, DEVICE)).cpu(), theirs), (shape, nested)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_rounds_overflows_and_passes_on_what_is_not_finite(dtype):
    """The nested magnitude's product is rounded before the offset is added, whatever its size."""
    weight = random_weight((8, 640), 64)
    weight.nested_code[:8] = torch.tensor([3e38, -3e38, float("inf"), float("nan"), 1e-40, -1e-40, 0.0, -0.0])
    weight = weight._replace(absmax=torch.arange(80, dtype=torch.uint8, device=DEVICE) % 16, offset=torch.tensor(1e5, device=DEVICE))
    with triton_mode():
        ours = dequantize_nf4(weight, dtype).cpu()
    torch.testing.assert_close(ours, dequantize_nf4_reference(to(weight, "cpu"), dtype), rtol=0, atol=0, equal_nan=True)


@runs_triton
@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_kernel_takes_codes_at_any_address(blocksize):
    weight = random_weight((16, 600), blocksize)
    storage = torch.zeros(weight.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)
    storage[1:] = weight.codes.flatten()
    with triton_mode():
        aligned, shifted = dequantize_nf4(weight), dequantize_nf4(weight._replace(codes=storage[1:]))
    assert torch.equal(aligned, shifted) and torch.equal(aligned.cpu(), dequantize_nf4_reference(to(weight, "cpu"), torch.float32))


@runs_triton
def test_kernel_compiles_in_one_graph():
    torch._dynamo.reset()
    nested, plain = random_weight((16, 64)), random_weight((16, 64), nested=False)
    with triton_mode():
        for weight in (nested, plain):
            compiled = torch.compile(lambda w, x: x @ dequantize_nf4(w, torch.float32).t(), fullgraph=True, backend="aot_eager")
            x = torch.randn(3, 64, device=DEVICE)
            torch.testing.assert_close(compiled(weight, x), x @ dequantize_nf4(weight).t())
            torch.library.opcheck(dequantize_nf4_forward.node, (*weight[:5], *weight.shape, weight.blocksize, torch.bfloat16))


@runs_triton
def test_fp64_is_served_by_the_reference():
    weight = random_weight((5, 7))
    with triton_mode():
        assert torch.equal(dequantize_nf4(weight, torch.float64), dequantize_nf4_reference(weight, torch.float64))
