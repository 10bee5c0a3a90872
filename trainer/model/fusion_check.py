"""Show that fused layers compute what the family's own code computes.

A row of FAMILIES describes code that we have read; a checkpoint's configuration may turn on what we have not. So one layer of each kind
is run both ways on the same input, in fp32, also with its matrices amplified: a clamp or a gate may do nothing to small values. How much
rounding may differ is measured, by the input moved by one unit in the last place. Our operations run in torch: what is shown is that they
are the right ones, and not the kernels, which have tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from kernels._dispatch import backend_mode
from trainer.model.fused_layers import is_fused
from trainer.model.pack_context import pack_of, run_pack
from trainer.model.packed_attention import is_packed, last_hidden_states
from trainer.model.packing_probe import AMPLIFIED, FROM_ALONE, LENGTHS, TRIES, layers, random_samples, swapped, token_error

EXACT = 1e-5  # an error of a token in fp32 that is rounding in any layer


@torch.no_grad()
def fusion_fault(model: PreTrainedModel) -> str | None:
    """Return how fused layers of `model` differ from stock ones, or None, also without weights.

    A token may lie where rounding decides which expert it goes to, so what differs must differ with other tokens too.
    """
    if model.device.type == "meta":
        return None
    was_training = model.training
    model.eval()
    try:
        with backend_mode("reference"):
            return _fault(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        return f"they fail, {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    finally:
        model.train(was_training)


def _fault(model: PreTrainedModel) -> str | None:
    """Return what differs in every try; None if one shows no difference."""
    for seed in range(TRIES):
        if (fault := _one_try(model, torch.Generator().manual_seed(seed))) is None:
            return None
    return fault


def _one_try(model: PreTrainedModel, generator: torch.Generator) -> str | None:
    samples = random_samples(model, generator) if is_packed(model) else random_samples(model, generator)[:1]
    ids, positions = torch.cat(samples), torch.cat([torch.arange(len(sample), device=model.device) for sample in samples])
    bounds = torch.tensor([0, *map(len, samples)], device=model.device).cumsum(0, dtype=torch.int32)
    dtype = torch.promote_types(model.dtype, torch.float32)
    with run_pack(pack_of(bounds, max(LENGTHS)) if is_packed(model) else None):
        for layer, (args, kwargs) in _calls_of_layers(model, ids[None], positions[None]).items():
            args, kwargs = tree_map(lambda value: _in_dtype(value, dtype), (args, kwargs))
            for factor in (1.0, AMPLIFIED):
                error, rounding = _errors(layer, args, kwargs, dtype, factor)
                if not error <= max(EXACT, FROM_ALONE * rounding):
                    return f"a token of {type(layer).__name__} differs by {error:.1e}"
    return None


def _errors(layer: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype, factor: float) -> tuple[float, float]:
    """Return the error of a fused layer beside the stock one, and the error of rounding alone."""
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    hidden, *rest = args or (kwargs["hidden_states"],)

    def output(hidden: Tensor) -> Tensor:
        out = layer.forward(hidden, *rest, **others)
        return (out[0] if isinstance(out, tuple) else out)[0]

    with swapped(layer, dtype, factor):
        fused = output(hidden)
        with stock_forwards(layer):
            stock, moved = output(hidden), output(hidden * (1 + torch.finfo(dtype).eps))
    return token_error(fused, stock), token_error(moved, stock)


def _calls_of_layers(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> dict[nn.Module, tuple[tuple, dict]]:
    """Return what a forward gives one layer of each kind."""
    calls: dict[nn.Module, tuple[tuple, dict]] = {}
    tried = {_kind(layer): layer for layer in layers(model)}

    def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[layer] = args, kwargs

    with ExitStack() as stack:
        for layer in tried.values():
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        last_hidden_states(model, ids, positions)
    return calls


def _kind(layer: nn.Module) -> tuple:
    """Return what layers of one kind share: their modules, and how each is fused."""
    return tuple((name, type(module), str(module.forward.args[1:]) if is_fused(module) else None) for name, module in layer.named_modules())


def _in_dtype(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def stock_forwards(layer: nn.Module) -> Iterator[None]:
    """Run the modules of a layer by their classes' own forwards inside this context."""
    fused = [(module, module.__dict__.pop("forward")) for module in layer.modules() if is_fused(module)]
    try:
        yield
    finally:
        for module, forward in fused:
            module.forward = forward
