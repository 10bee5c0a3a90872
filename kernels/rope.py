"""Rotary position embedding of q and k, which saves only the angles.

The first Dr of a head's Dh channels rotate in pairs (j, j + Dr/2), the "rotate_half" convention; the rest pass through:

    y_j        = x_j·cos θ_j        − x_{j+Dr/2}·sin θ_j
    y_{j+Dr/2} = x_{j+Dr/2}·cos θ_j + x_j·sin θ_j            j < Dr/2

A rotation's transpose is the rotation by −θ, so ∂x is this operation with sin negated, and neither q nor k is saved. On a GPU each
direction is one kernel.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import operator, triton_serves
from kernels._launch import ANY, Launch, cdiv, constexpr, jit, launch, next_power_of_2, pick, tl
from kernels.rms_norm import heads_of, strides


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., T, H, Dh] by the angles of cos, sin [..., T, Dr].

    A roll by Dr/2 pairs the two halves: it is rotate_half with the sign moved into sin.
    """
    rotary = cos.shape[-1]
    half = rotary // 2
    signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(-2)
    rotating = x[..., :rotary]
    rotated = (rotating * cos.unsqueeze(-2)).addcmul_(rotating.roll(half, -1), signed_sin).to(x.dtype)
    return rotated if rotary == x.shape[-1] else torch.cat((rotated, x[..., rotary:]), -1)


# ---------------------------------------------------------------- Triton


@jit
def load_angles(cos, sin, angle, known, INVERSE: constexpr, ROTARY: constexpr, HALF: constexpr):
    """Load cos and sin of θ, (ROWS, HALF), of rows `angle`; sin negated where INVERSE.

    Rows that are not `known` are NaN.
    """
    j = tl.arange(0, HALF)[None, :]
    start, inside = angle.to(tl.int64)[:, None] * ROTARY + j, known[:, None] & (j < ROTARY // 2)
    c = tl.load(cos + start, mask=inside, other=float("nan")).to(tl.float32)
    s = tl.load(sin + start, mask=inside, other=float("nan")).to(tl.float32)
    if INVERSE:
        s = -s
    return c, s


@jit
def _rotate(x, y, x_n, x_h, cos, sin, positions, angles, block, tokens, HEADS: constexpr, DIM: constexpr, ROTARY: constexpr,
            INVERSE: constexpr, ROWS: constexpr, HALF: constexpr, REST: constexpr):
    """Rotate ROWS heads of x [tokens, HEADS, DIM] into the dense y."""
    row = block * ROWS + tl.arange(0, ROWS)
    present = row < tokens * HEADS
    token = row // HEADS
    angle = token
    if positions is not None:
        angle = tl.load(positions + token, mask=present, other=0)
    c, s = load_angles(cos, sin, angle, (angle >= 0) & (angle < angles), INVERSE, ROTARY, HALF)

    j = tl.arange(0, HALF)[None, :]
    inside = present[:, None] & (j < ROTARY // 2)  # (ROWS, HALF)
    source = x + (token.to(tl.int64) * x_n + (row % HEADS).to(tl.int64) * x_h)[:, None]
    target = y + (row.to(tl.int64) * DIM)[:, None]
    a = tl.load(source + j, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + ROTARY // 2 + j, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + j, a * c - b * s, mask=inside)
    tl.store(target + ROTARY // 2 + j, b * c + a * s, mask=inside)

    if ROTARY < DIM:
        k = ROTARY + tl.arange(0, REST)[None, :]
        beyond = present[:, None] & (k < DIM)
        tl.store(target + k, tl.load(source + k, mask=beyond, other=0.0), mask=beyond)


@jit
def _rope_kernel(q, k, q_out, k_out, q_n, q_h, k_n, k_h, cos, sin, positions, angles, q_blocks, tokens, Q_HEADS: constexpr,
                 K_HEADS: constexpr, DIM: constexpr, ROTARY: constexpr, INVERSE: constexpr, ROWS: constexpr, HALF: constexpr,
                 REST: constexpr):
    """Rotate ROWS heads of q in each of the first q_blocks programs, of k in the others."""
    block = tl.program_id(0)
    if block < q_blocks:
        _rotate(q, q_out, q_n, q_h, cos, sin, positions, angles, block, tokens, Q_HEADS, DIM, ROTARY, INVERSE, ROWS, HALF,
                REST)
    else:
        _rotate(k, k_out, k_n, k_h, cos, sin, positions, angles, block - q_blocks, tokens, K_HEADS, DIM, ROTARY, INVERSE,
                ROWS, HALF, REST)


LAUNCH = {
    (ANY, 64): Launch({"ROWS": 64}), (ANY, 128): Launch({"ROWS": 32}), (ANY, 256): Launch({"ROWS": 16}), (ANY, None): Launch({"ROWS": 4}),
}


def channels(dim: int, rotary: int) -> dict[str, int]:
    """Return the kernels' constexprs for heads of `dim` channels, of which `rotary` rotate."""
    return dict(DIM=dim, ROTARY=rotary, HALF=next_power_of_2(rotary // 2), REST=next_power_of_2(dim - rotary))


def angle_rows(angles: Tensor, tokens: int, lead: tuple[int, ...]) -> Tensor:
    """Return cos or sin [..., T, Dr] as a dense [tokens, Dr], a row per token of q's leading dimensions."""
    if angles.numel() != tokens * angles.shape[-1]:
        angles = angles.expand(*lead, angles.shape[-1])
    return angles.reshape(-1, angles.shape[-1]).contiguous()


def _check_positions(position_ids: Tensor, rows: int) -> None:
    """Raise ValueError unless all positions are rows of cos."""
    if position_ids.numel() and not (0 <= int(position_ids.min()) and int(position_ids.max()) < rows):
        raise ValueError(f"apply_rope: expected position_ids in [0, {rows}), the rows of cos, got {int(position_ids.min())} to "
                         f"{int(position_ids.max())}")


@operator(lambda q, k, cos, sin, position_ids, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)))
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by θ, or by −θ, dense, from the backend that serves q."""
    if position_ids is not None and position_ids.device.type == "cpu":
        _check_positions(position_ids, cos.shape[0])
    if not (triton_serves(q) and triton_serves(k)):
        if position_ids is not None:
            cos, sin = cos[position_ids], sin[position_ids]
        sin = -sin if inverse else sin
        return rope_reference(q, cos, sin).contiguous(), rope_reference(k, cos, sin).contiguous()
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    lead, q, k = q.shape[:-2], heads_of(q), heads_of(k)
    (tokens, q_heads, dim), k_heads = q.shape, k.shape[1]
    if position_ids is None:
        cos, sin = (angle_rows(x, tokens, lead) for x in (cos, sin))
    else:
        cos, sin, position_ids = cos.contiguous(), sin.contiguous(), position_ids.contiguous()
    settings = pick(LAUNCH, dim, q.device)
    q_blocks, k_blocks = (cdiv(tokens * heads, settings.blocks["ROWS"]) for heads in (q_heads, k_heads))
    launch(_rope_kernel, (q_blocks + k_blocks,), settings, q, k, q_out, k_out, *strides(q), *strides(k), cos, sin, position_ids,
           cos.shape[0], q_blocks, tokens, Q_HEADS=q_heads, K_HEADS=k_heads, INVERSE=inverse, **channels(dim, cos.shape[-1]))
    return q_out, k_out


# ---------------------------------------------------------------- autograd


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids):
        ctx.save_for_backward(cos, sin, position_ids)
        return rope(q, k, cos, sin, position_ids, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return *rope(dq, dk, *ctx.saved_tensors, True), None, None, None


def check_heads(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, tokens: torch.Size | None = None) -> None:
    """Raise ValueError unless q and k [..., T, H, Dh] fit each other and cos, sin [..., T, Dr].

    `tokens` is the expected T where it is not that of cos.
    """
    angles, dim = cos.shape, q.shape[-1]
    for name, x in (("q", q.shape), ("k", k.shape)):
        fits = len(x) >= 3 and len(angles) >= 2 and (angles[-2:-1] if tokens is None else tokens) == x[-3:-2]
        if not fits or angles[-1] % 2 or angles[-1] > x[-1]:
            raise ValueError(f"{op}: expected {name} [..., T, H, Dh] and cos [..., T, Dr] with even Dr <= Dh, "
                             f"got {tuple(x)} and {tuple(angles)}")
    if angles != sin.shape:
        raise ValueError(f"{op}: expected cos and sin of one shape, got {tuple(angles)} and {tuple(sin.shape)}")
    if q.shape[:-2] != k.shape[:-2] or dim != k.shape[-1]:
        raise ValueError(f"{op}: expected q and k to differ in their number of heads only, got {tuple(q.shape)} and {tuple(k.shape)}")
    if not (q.device == k.device == cos.device == sin.device and q.is_floating_point() and k.is_floating_point()
            and cos.is_floating_point() and sin.is_floating_point()):
        got = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, cos, sin))
        raise ValueError(f"{op}: expected floating q, k, cos and sin on one device, got {got}")


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return q [..., T, Hq, Dh] and k [..., T, Hk, Dh] rotated by cos, sin [..., T, Dr].

    Dr <= Dh is even. cos and sin hold each angle twice, θ in both halves of Dr, as in transformers, and are constants without gradient.
    They may be fp32 beside bf16 q and k; the results have the dtypes of q and k. With integer position_ids [T] they are caches [P, Dr] and
    token t takes row position_ids[t]; a row out of range raises ValueError on a CPU and gives NaN in a kernel on a GPU, where a check would
    wait for the device. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    check_heads("apply_rope", q, k, cos, sin, None if position_ids is None else position_ids.shape)
    if position_ids is not None and (cos.dim() != 2 or q.dim() != 3 or position_ids.dtype not in (torch.int32, torch.int64)
                                     or position_ids.device != q.device):
        raise ValueError(f"apply_rope: expected int position_ids [T] on {q.device} for q [T, H, Dh] and cos [P, Dr], got "
                         f"{position_ids.dtype} on {position_ids.device} for {tuple(q.shape)} and {tuple(cos.shape)}")
    return _Rope.apply(q, k, cos, sin, position_ids)


def _aot(rotary: int, dim: int, cached: bool, inverse: bool):
    q, k = (torch.empty(8192, heads, dim, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    cos, sin = (torch.empty(8192, rotary, dtype=torch.bfloat16, device="meta") for _ in range(2))
    positions = torch.empty(8192, dtype=torch.int64, device="meta") if cached else None
    rope(q, k, cos, sin, positions, inverse)


AOT = {
    "rope": lambda: _aot(128, 128, False, False), "rope backward": lambda: _aot(128, 128, False, True),
    "rope partial": lambda: _aot(72, 96, True, False),
}
