"""Tell linear layers apart by how a model uses them, under the names they have without an adapter."""

from __future__ import annotations

import functools
import inspect
import re

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
ABOUT_A_WEIGHT = "dtype|device|shape|size|ndim|numel|requires_grad"  # attributes that are read for other ends than a product


def base_name(name: str) -> str:
    """Return the name that a module or weight of an adapted model has in its base."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by their names in the base.

    Adapters are left out, and what they wrap is in their place.
    """
    return {base_name(name): module for name, module in model.named_modules() if ".lora_" not in name}  # a wrapper comes before its layer


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers in a model, itself included, by their names in the base."""
    return {name: module for name, module in base_modules(model).items() if isinstance(module, LINEAR)}


def outputs_and_inputs(layer: nn.Module) -> tuple[int, int]:
    """Return the two sides of a linear layer."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


@torch.no_grad()
def is_linear_map(layer: nn.Module) -> bool:
    """Return whether a linear layer takes x [..., K] and returns one tensor [..., N].

    Subclasses may do otherwise, such as routers that return scores and choices. Bitsandbytes' layers need not be tried.
    """
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or type(layer).__module__.startswith("bitsandbytes"):
        return True
    outputs, inputs = outputs_and_inputs(layer)
    try:
        found = layer(torch.zeros(1, 2, inputs, dtype=layer.weight.dtype, device=layer.weight.device))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(found, Tensor) and found.shape == (1, 2, outputs)


def read_by_code(model: nn.Module) -> set[str]:
    """Return the names of linear layers whose weight the module around them reads or changes.

    There the layer itself is not called, so an adapter would be ignored and a 4-bit weight be misread; on other devices the same module
    may call it. Fused kernels of state spaces are such code.
    """
    modules = base_modules(model)
    return {f"{name}.{child}".strip(".") for name, module in modules.items() for child in weights_read(type(module))
            if isinstance(modules.get(f"{name}.{child}".strip(".")), LINEAR)}


@functools.cache
def weights_read(module_class: type[nn.Module]) -> frozenset[str]:
    """Return the attributes x of which the class's methods read `self.x.weight` as a whole.

    Methods that initialise weights do not count.
    """
    found = set()
    for parent in module_class.__mro__:
        if parent.__module__.startswith("torch."):
            break
        methods = [method for name, method in vars(parent).items() if inspect.isfunction(method) and "init" not in name]
        for method in methods:
            try:
                source = inspect.getsource(inspect.unwrap(method))
            except OSError:  # made at run time
                continue
            found |= set(re.findall(rf"self\.(\w+)\.weight\b(?!\[|\.(?:{ABOUT_A_WEIGHT})\b)", source))
    return frozenset(found)
