"""Watch what an operation allocates and multiplies."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.out, torch.ops.aten.addmm_.default)


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns, and the number and FLOP of its matmuls."""

    def __init__(self):
        super().__init__()
        self.largest, self.products, self.flop = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        if func in PRODUCTS:
            *_, a, b = args
            self.products += 1
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result
