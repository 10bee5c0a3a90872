"""Dropout masks: rate and independence in both forms, and Triton's against the definition of Philox."""

import functools

import pytest
import torch

from kernels import _dropout
from kernels._dropout import SEEDS, draw_mask, draw_seed, kept_fraction, lanes_kept
from kernels._launch import INTERPRETED
from tests.helpers.kernels import DEVICE, runs_triton, triton_mode

FORMS = [pytest.param("reference"), pytest.param("triton", marks=runs_triton)]


def mask(form, seed, stream, T, K, dropout, dtype=torch.float32):
    if form == "reference":
        return draw_mask(torch.empty(T, K, dtype=dtype), torch.tensor(seed), stream, dropout)
    with triton_mode():
        return draw_mask(torch.empty(T, K, dtype=dtype, device=DEVICE), torch.tensor(seed, device=DEVICE), stream, dropout).cpu()


def philox(key, counter, rounds):
    """Philox4x32 (Salmon et al., SC11, section 3.3) in Python's integers."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(rounds):
        p0, p2 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p2 >> 32 ^ c[1] ^ k[0], p2 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_the_oracle_gives_its_authors_known_answers():
    """The vectors are Random123's kat_vectors."""
    assert philox(0, [0] * 4, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox(0, [0] * 4, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox(ones << 32 | ones, [ones] * 4, 7) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


class Generator:
    """A GPU's default generator, as far as seeds need it."""

    seed, offset = 7, 0

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset

    def initial_seed(self):
        return self.seed


def test_a_gpu_draws_seeds_in_blocks_and_the_same_ones_from_the_same_state(monkeypatch):
    """One launch for many; where activation checkpointing restores the generator, a layer's seeds come again."""
    generator, drawn = Generator(), []
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def block_of(index, seed, block):
        drawn.append((seed, block))
        return [(seed, block, place) for place in range(SEEDS)]

    monkeypatch.setattr(_dropout, "_seeds", functools.cache(block_of))
    gpu = torch.device("cuda", 0)
    first = [draw_seed(gpu) for _ in range(SEEDS + 3)]
    assert len(set(first)) == len(first) and drawn == [(7, 0), (7, 1)]
    generator.offset = 8
    assert [draw_seed(gpu), draw_seed(gpu)] == first[2:4] and generator.offset == 16
    generator.seed, generator.offset = 8, 0
    assert draw_seed(gpu) not in first


@runs_triton
@pytest.mark.parametrize("stream", [0, 1, 2, 7])
def test_an_element_is_the_lane_that_the_docstring_says(stream):
    seed, T, K, dropout = 0x1234567890ABCDEF, 19, 269, 0.4
    words = [[philox(seed, [octet, 0, row, stream], 7) for octet in range(-(-K // 8))] for row in range(T)]
    lanes = torch.tensor([[half for draw in row for word in draw for half in (word & 0xFFFF, word >> 16)] for row in words])
    assert torch.equal(mask("triton", seed, stream, T, K, dropout), (lanes[:, :K] < lanes_kept(dropout)).float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", [1e-7, 0.05, 0.5, 0.97])
def test_rate_and_independence(form, dropout):
    """Neighbours, rows, a call's masks and two seeds are independent."""
    T, K = (101, 499) if form == "triton" and INTERPRETED else (401, 997)
    first, second, other = (mask(form, *which, T, K, dropout) for which in ((5, 0), (5, 1), (6, 0)))
    fraction, n = kept_fraction(dropout), T * K
    assert abs(fraction - (1 - dropout)) <= 2**-16
    deviation = (fraction * (1 - fraction) / n) ** 0.5
    for drawn in (first, second, other):
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
        assert abs(drawn.mean(dtype=torch.float64) - fraction) < 5 * deviation + 1e-6
    pairs = {"masks": (first, second), "seeds": (first, other), "rows": (first[1:], first[:-1]), "columns": (first[:, 1:], first[:, :-1]),
             "draws": (first[:, 8:], first[:, :-8]), "diagonal": (first[1:, 1:], second[:-1, :-1])}
    for name, (a, b) in pairs.items():
        # deviation of a·b's mean, where a and b are independent
        expected, spread = fraction**2, (fraction**2 * (1 - fraction**2) / a.numel()) ** 0.5
        assert abs((a * b).mean(dtype=torch.float64) - expected) < 6 * spread + 1e-6, name


@pytest.mark.parametrize("form", FORMS)
def test_masks_repeat_and_have_the_dtype_of_x(form):
    masks = [mask(form, 3, 1, 17, 100, 0.5, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    assert [m.dtype for m in masks] == [torch.float32, torch.bfloat16, torch.float32]
    assert all(torch.equal(m.float(), masks[0]) for m in masks)


@runs_triton
def test_a_part_of_a_mask_is_the_same_in_any_shape():
    small, large = mask("triton", 3, 1, 5, 9, 0.5), mask("triton", 3, 1, 40, 300, 0.5)
    assert torch.equal(small, large[:5, :9])


def test_seeds_follow_the_default_generator():
    torch.manual_seed(1)
    first, second = draw_seed(DEVICE), draw_seed(DEVICE)
    torch.manual_seed(1)
    assert torch.equal(first, draw_seed(DEVICE)) and not torch.equal(first, second)
    assert first.shape == () and first.dtype == torch.int64 and first.device.type == DEVICE.type


def test_the_fraction_kept_is_never_nothing_and_never_all():
    assert lanes_kept(0.0) == 1 << 16 and lanes_kept(1e-9) == (1 << 16) - 1 and lanes_kept(0.9999999) == 1
    assert kept_fraction(0.0) == 1.0 and kept_fraction(0.25) == 0.75


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_opaque_node(form):
    torch._dynamo.reset()
    device = DEVICE if form == "triton" else torch.device("cpu")
    x, seed = torch.zeros(9, 20, device=device), torch.tensor(11, device=device)

    def op(x, seed):
        return draw_mask(x, seed, 2, 0.3) + x

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    if form == "reference":
        assert torch.equal(compiled(x, seed), op(x, seed)) and not torch.equal(compiled(x, seed), compiled(x, seed + 1))
        return
    with triton_mode():
        assert torch.equal(compiled(x, seed), op(x, seed)) and not torch.equal(compiled(x, seed), compiled(x, seed + 1))
        torch.library.opcheck(draw_mask.node, (x, seed, 2, 0.3))
