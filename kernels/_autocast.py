"""Autocast around hand-written autograd Functions: inputs are cast once, at the public function."""

import functools

import torch
from torch import Tensor


def without_autocast(method):
    """Runs an autograd Function's forward or backward in the dtypes it is given: the public op has cast x already."""

    @functools.wraps(method)
    def run(ctx, first, *rest):
        if not torch.is_autocast_enabled(first.device.type):
            return method(ctx, first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return run


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype that autocast, where it is on, gives to products (it leaves fp64 alone)."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
