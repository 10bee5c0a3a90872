"""Import Triton if it is installed, and launch its kernels.

Kernel files take `tl`, `constexpr` and `jit` from here, so that they can be imported without Triton (the references then serve). Every
launch goes through `launch`, with a `Launch` (block sizes, warps, stages) that `pick` looks up by GPU architecture and size in a table
beside the kernel.

Inside `recording`, launches are described instead of made: the ahead-of-time tests run the real launchers on tensors of device "meta"
and compile what would have been launched on a named architecture.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # every launch sets it too; unset, Triton 3.9 warns

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform
    triton = tl = None

constexpr = object if tl is None else tl.constexpr
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
# The GPU architectures that kernels are compiled for ahead of time, with the shared memory that one program may have on each, in bytes.
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
ANY = "any arch"


def jit(fn):
    """Apply triton.jit; without Triton, return the plain function."""
    return fn if triton is None else triton.jit(fn)


class Launch(NamedTuple):
    """Launch settings: block sizes by name, warps in a program, stages of its software pipeline."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


class Recorded(NamedTuple):
    """A launch made inside `recording`: positional arguments as they are, constexprs by name."""

    kernel: Any
    args: tuple
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


class _Recorder(NamedTuple):
    arch: str
    launches: list[Recorded]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Recorded]]:
    """Collect the launches made inside, as if on `arch` (a key of SHARED_MEMORY), instead of making them."""
    global _recorder
    _recorder, before = _Recorder(arch, []), _recorder
    try:
        yield _recorder.launches
    finally:
        _recorder = before


def is_recording() -> bool:
    """Return whether this runs inside `recording`."""
    return _recorder is not None


@functools.cache
def _arch_of_index(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_of(device: torch.device) -> str:
    """Return the GPU architecture of `device` as compilers name it; ANY on a CPU (the interpreter)."""
    if _recorder is not None:
        return _recorder.arch
    return _arch_of_index(device.index or 0) if device.type == "cuda" else ANY


def pick(table: dict[tuple[str, int | None], Launch], size: int, device: torch.device) -> Launch:
    """Return the launch settings for this device's architecture and a problem of `size`.

    Keys of `table` are (architecture, upper bound of size). The smallest bound that holds `size` wins, None is no bound, and an
    architecture without rows of its own has those of ANY. The settings that are found are kept, so a table must not change.
    """
    arch = arch_of(device)
    kept = _picked.get((id(table), size, arch))
    if kept is None:
        kept = _picked[id(table), size, arch] = table, _find(table, size, arch)
    return kept[1]


_picked: dict[tuple[int, int, str], tuple[dict, Launch]] = {}


def _find(table: dict[tuple[str, int | None], Launch], size: int, arch: str) -> Launch:
    arch = arch if any(row == arch for row, _ in table) else ANY
    bounds = [bound for row, bound in table if row == arch]
    fitting = [bound for bound in bounds if bound is not None and size <= bound]
    return table[arch, min(fitting) if fitting else None]


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def rows_of(x: Tensor) -> Tensor:
    """Return x [..., N] as [rows, N] with a dense last dimension; a view wherever possible."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def launch(kernel, grid: tuple[int, ...], settings: Launch, *args, **constexprs) -> None:
    """Launch `kernel` on the device of its first tensor; an empty grid is a no-op.

    The blocks of `settings` and `constexprs` are the kernel's constexpr parameters, `args` all of the others, in order.
    """
    if 0 in grid:
        return
    constexprs = settings.blocks | constexprs
    if _recorder is not None:
        _recorder.launches.append(Recorded(kernel, args, constexprs, settings.num_warps, settings.num_stages))
        return
    options = dict(num_warps=settings.num_warps, num_stages=settings.num_stages, enable_fp_fusion=True)
    device = next(a for a in args if isinstance(a, Tensor)).device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **constexprs, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **constexprs, **options)
