"""Which of an operation's two forms serves a tensor, and how torch.compile sees it.

KERNELS_BACKEND=auto        Triton on a GPU, the torch reference on a CPU
KERNELS_BACKEND=triton      Triton, or an error; on a CPU it needs Triton's interpreter (TRITON_INTERPRET=1): for tests, very slow
KERNELS_BACKEND=reference   the torch reference everywhere

fp64 is for checking gradients and always runs the reference.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import _launch

MODES = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"KERNELS_BACKEND: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = os.environ.get("KERNELS_BACKEND", "auto")  # checked where it is first asked for, so that importing this never fails


@contextlib.contextmanager
def backend_mode(mode: str) -> Iterator[None]:
    """KERNELS_BACKEND for the operations called inside."""
    global _mode
    _mode, before = _checked(mode), _mode
    try:
        yield
    finally:
        _mode = before


def mode() -> str:
    """KERNELS_BACKEND as it stands."""
    return _mode


def serving(device: torch.device, dtype: torch.dtype) -> str:
    """"triton" or "reference"; ValueError where KERNELS_BACKEND is none of MODES, or is triton and that cannot be had."""
    if _mode == "reference" or dtype not in DTYPES:
        return "reference"
    if device.type == "meta":
        return "triton" if _launch.is_recording() else "reference"
    if _mode == "auto":
        return "triton" if device.type == "cuda" and _launch.triton is not None and not _launch.INTERPRETED else "reference"
    _checked(_mode)
    if _launch.triton is None:
        raise ValueError("KERNELS_BACKEND=triton: expected Triton to be installed, found none; install it, or use KERNELS_BACKEND=auto")
    if device.type != "cuda" and not _launch.INTERPRETED:
        raise ValueError(f"KERNELS_BACKEND=triton: expected a tensor on a GPU, got one on {device.type}; "
                         "use KERNELS_BACKEND=auto (or, to test, TRITON_INTERPRET=1)")
    return "triton"


def triton_serves(x: Tensor) -> bool:
    return serving(x.device, x.dtype) == "triton"


def operator(fake: Callable) -> Callable[[Callable], Callable]:
    """Makes a function of tensors one opaque node, `steadfast::<its name>`, under torch.compile, with `fake` telling its results' shapes.

    In eager mode the function is called as it is: the dispatcher would add 6 microseconds to each call. The function's annotations are
    its schema; it must return new tensors and write none of its arguments.
    """

    def wrap(function: Callable) -> Callable:
        node = torch.library.custom_op(f"steadfast::{function.__name__.strip('_')}", function, mutates_args=())
        node.register_fake(fake)

        @functools.wraps(function)
        def call(*args, **options):
            return node(*args, **options) if torch.compiler.is_compiling() else function(*args, **options)

        call.node = node  # for torch.library.opcheck
        return call

    return wrap
