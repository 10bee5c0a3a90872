"""Choose between Triton and the torch reference, and register operations with torch.compile.

KERNELS_BACKEND=auto        Triton on a GPU, the torch reference on a CPU
KERNELS_BACKEND=triton      Triton, or an error; on a CPU it needs Triton's interpreter (TRITON_INTERPRET=1): for tests, very slow
KERNELS_BACKEND=reference   the torch reference everywhere

fp64 exists to check gradients and always runs the reference.
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
    """Return `mode`; raise ValueError unless it is one of MODES."""
    if mode not in MODES:
        raise ValueError(f"KERNELS_BACKEND: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = os.environ.get("KERNELS_BACKEND", "auto")  # checked on first use, so that importing this file never fails


@contextlib.contextmanager
def backend_mode(mode: str) -> Iterator[None]:
    """Set KERNELS_BACKEND for the operations called inside."""
    global _mode
    _mode, before = _checked(mode), _mode
    try:
        yield
    finally:
        _mode = before


def mode() -> str:
    """Return the current KERNELS_BACKEND."""
    return _mode


def serving(device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend for tensors of this device and dtype: "triton" or "reference".

    Raises ValueError if KERNELS_BACKEND is none of MODES, or is triton where Triton cannot run.
    """
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
    """Return whether Triton serves x."""
    return serving(x.device, x.dtype) == "triton"


def operator(fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function of tensors as one opaque node, `steadfast::<its name>`, under torch.compile.

    `fake` takes the same arguments and returns empty results of the right shapes. The function's annotations are its schema; it must
    return new tensors and write none of its arguments. In eager mode it is called directly, without the cost of torch's dispatcher.
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
