"""Find mixtures of experts by their structure: a stack of alike experts beside a router.

A stack of n experts is a module that holds 3-D weights [n, rows, columns] or, in other code, a list of n modules of one class. A router is
a module beside it that writes n scores, and nothing as wide as the model; a linear layer of one output beside them is a gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.model.linear_layers import LINEAR, base_modules, linear_layers, outputs_and_inputs

NO_STACK = (*LINEAR, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NO_ROUTER = (*NO_STACK, nn.Embedding)


@dataclass
class Mixtures:
    """Parts of all mixtures of experts of a model, by their names in the base."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # 3-D weights of experts
    layers: dict[str, nn.Module] = field(default_factory=dict)  # linear layers of experts that are modules of their own
    routers: dict[str, nn.Module] = field(default_factory=dict)  # linear layers of routers and gates


def find_mixtures(model: PreTrainedModel) -> Mixtures:
    """Return the experts and routers of a model, with or without an adapter."""
    found, blocks = Mixtures(), {}
    for name, module in base_modules(model).items():
        blocks.setdefault(name.rpartition(".")[0], {})[name] = module
    width = model.get_input_embeddings().weight.shape[-1]
    for block in blocks.values():
        stacks = {name: counts for name, module in block.items() if (counts := _counts(module))}
        counts = set().union(*stacks.values())
        routers = [name for name, module in block.items() if name not in stacks and counts and _is_router(module, counts, width)]
        if not routers:
            continue
        gates = [name for name, module in block.items() if isinstance(module, LINEAR) and outputs_and_inputs(module)[0] == 1]
        for name in {*routers, *gates}:
            found.routers |= _layers_of(name, block[name])
        for name in stacks:
            found.layers |= _layers_of(name, block[name])
            found.weights |= {f"{name}.{key}": weight for key, weight in _stacked_weights(block[name]).items()}
    return found


def _counts(module: nn.Module) -> set[int]:
    """Return the numbers of experts that a module may be a stack of; empty if it is none."""
    if isinstance(module, nn.ModuleList):
        alike = len(module) > 1 and len({type(expert) for expert in module}) == 1
        return {len(module)} if alike and linear_layers(module) and not isinstance(module[0], GradientCheckpointingLayer) else set()
    return {weight.shape[0] for weight in _stacked_weights(module).values()}


def _stacked_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the 3-D weights of a module that has no linear layers beside them."""
    if isinstance(module, NO_STACK) or any(isinstance(part, LINEAR) for part in module.modules()):
        return {}
    return {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3 and weight.shape[0] > 1}


def _is_router(module: nn.Module, counts: set[int], width: int) -> bool:
    """Return whether a module writes a score for each expert, and nothing as wide as the model.

    Some routers have a few more scores, as for experts that do nothing.
    """
    if isinstance(module, LINEAR):
        return outputs_and_inputs(module)[0] in counts
    written = {outputs_and_inputs(layer)[0] for layer in linear_layers(module).values()}
    written |= {weight.shape[0] for part in module.modules() if not isinstance(part, NO_ROUTER)
                for weight in part.parameters(recurse=False) if weight.ndim == 2}
    return width not in written and any(count <= outputs < 2 * count for count in counts for outputs in written)


def _layers_of(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers in the module called `name`, itself included."""
    return {f"{name}.{key}".strip("."): layer for key, layer in linear_layers(module).items()}
