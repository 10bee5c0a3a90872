"""Triton where it is installed, and the one door through which its kernels are launched.

Kernel files take `tl`, `constexpr` and `jit` from here, so that they can be imported where there is no Triton (the references then serve).
A launch is described by its grid, its arguments and a `Launch`, looked up by GPU and size in a small table that stands beside the kernel.

`recording` turns launches into descriptions of launches: the ahead-of-time tests run the real launchers on tensors of device "meta" and
compile what would have been launched on the part they name.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # every launch says it too; unset, Triton 3.9 warns

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform
    triton = tl = None

constexpr = object if tl is None else tl.constexpr
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
# The parts that kernels are compiled for ahead of time, with the shared memory that one program may have on each, in bytes.
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
ANY = "any part"


def jit(fn):
    """triton.jit, or the plain function where there is no Triton."""
    return fn if triton is None else triton.jit(fn)


class Launch(NamedTuple):
    """How a kernel is launched: its block sizes by name, warps in a program, stages of its software pipeline."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


class Recorded(NamedTuple):
    """A launch that `recording` caught: positional arguments as they are, constexprs by name."""

    kernel: Any
    args: tuple
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


class _Recorder(NamedTuple):
    part: str
    launches: list[Recorded]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recording(part: str) -> Iterator[list[Recorded]]:
    """Collects the launches made inside, as if on `part` (a key of SHARED_MEMORY), instead of making them."""
    global _recorder
    _recorder, before = _Recorder(part, []), _recorder
    try:
        yield _recorder.launches
    finally:
        _recorder = before


def is_recording() -> bool:
    return _recorder is not None


@functools.cache
def _part_of(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def part(device: torch.device) -> str:
    """The GPU that `device` is, as compilers name it; ANY for the interpreter, which runs on a CPU."""
    if _recorder is not None:
        return _recorder.part
    return _part_of(device.index or 0) if device.type == "cuda" else ANY


def pick(table: dict[tuple[str, int | None], Launch], size: int, device: torch.device) -> Launch:
    """The row of `table` for this part (ANY where it has none of its own) with the least bound that holds `size`; None is no bound."""
    name = part(device)
    name = name if any(row == name for row, _ in table) else ANY
    bounds = [bound for row, bound in table if row == name]
    fitting = [bound for bound in bounds if bound is not None and size <= bound]
    return table[name, min(fitting) if fitting else None]


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def rows_of(x: Tensor) -> Tensor:
    """x [..., N] as [rows, N] whose last dimension is dense; a view wherever one exists."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def launch(kernel, grid: tuple[int, ...], how: Launch, *args, **constexprs) -> None:
    """Runs `kernel` on the device of its first tensor; an empty grid is no launch.

    `how`'s blocks and `constexprs` are the kernel's constexpr parameters, `args` all of the others, in order.
    """
    if 0 in grid:
        return
    constexprs = how.blocks | constexprs
    if _recorder is not None:
        _recorder.launches.append(Recorded(kernel, args, constexprs, how.num_warps, how.num_stages))
        return
    options = dict(num_warps=how.num_warps, num_stages=how.num_stages, enable_fp_fusion=True)
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **constexprs, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **constexprs, **options)
