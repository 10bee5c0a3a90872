"""Apply autocast to hand-written autograd Functions: inputs are cast once, at the public function."""

import functools

import torch
from torch import Tensor


def autocast_is_on(device: torch.device) -> bool:
    """Return whether autocast is on for this device; never for "meta", which torch does not know here."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(method):
    """Run an autograd Function's forward or backward with autocast off; the public function has cast x."""

    @functools.wraps(method)
    def run(ctx, first, *rest):
        if not autocast_is_on(first.device):
            return method(ctx, first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return run


def autocast_input(x: Tensor) -> Tensor:
    """Return x in autocast's dtype for matmuls where autocast is on; fp64 is not cast."""
    if x.dtype == torch.float64 or not autocast_is_on(x.device):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
