"""Autocast around hand-written autograd Functions: inputs are cast once, at the public function."""

import functools

import torch
from torch import Tensor


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast casts on this device; never on "meta", of which torch will not even be asked."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(method):
    """Runs an autograd Function's forward or backward in the dtypes it is given: the public op has cast x already."""

    @functools.wraps(method)
    def run(ctx, first, *rest):
        if not autocast_is_on(first.device):
            return method(ctx, first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return run


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype that autocast, where it is on, gives to products (it leaves fp64 alone)."""
    if x.dtype == torch.float64 or not autocast_is_on(x.device):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
