"""Choose what takes an adapter, and say what takes none and why.

Adapters go on linear layers of the text decoder, where they change what the model computes. `all-linear` leaves out routers, layers
narrower than the rank, and layers that are not run as linear layers; a target that the user names must be fit. Experts take an adapter if
and only if `lora.experts` says so, whether their weights are 3-D parameters or linear layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from trainer import config
from trainer.errors import UserError
from trainer.model.linear_layers import LINEAR, is_linear_map, linear_layers, outputs_and_inputs, read_by_code
from trainer.model.mixtures import Mixtures, find_mixtures
from trainer.model.packed_attention import decoder
from trainer.model.peft_targets import is_rewritten
from trainer.model.text_part import head_layer, is_wrapped
from trainer.patterns import bounded

OUTSIDE = "outside the text decoder"
NARROW = "narrower than lora.rank"
IDLE = "without a gradient"
MLP = re.compile(r"(^|\.)(mlp|feed_forward|ffn|ff|shared_experts?|shared_mlp|block_sparse_moe)\.|"
                 r"(^|\.)(fc1|fc2|gate_proj|up_proj|down_proj)$")  # names of layers
PRESETS = ("all-linear", "mlp-linear")  # which leave out in silence what can take no adapter
SHOWN = 4  # kinds of layers that a line names for one reason


@dataclass
class Targets:
    """Names of what takes an adapter, and of linear layers that take none, by the reason."""

    modules: list[str]
    parameters: list[str]  # 3-D weights of experts
    left_out: dict[str, list[str]]


def choose_targets(model: PreTrainedModel, lora: config.Lora) -> Targets:
    """Return what takes an adapter.

    Raises UserError for targets that the model does not have, for a named target that can take no adapter, and where nothing can.
    """
    mixtures, left_out = find_mixtures(model), {}
    matched = match_targets(model, lora.target_modules, mixtures)
    layers = {name: layer for name, layer in matched.items() if name not in mixtures.layers}
    chosen = _choose_layers(model, layers, mixtures, lora, left_out)
    experts = _choose_experts(model, mixtures, lora, left_out) if lora.experts else Mixtures()
    chosen |= experts.layers
    if not chosen and not experts.weights:
        found = describe_left_out(left_out) or "layers of experts, which need lora.experts true"
        raise UserError(f"lora.target_modules: expected layers that can take an adapter, found none in {lora.target_modules!r}: {found}")
    as_given = isinstance(lora.target_modules, list) and chosen.keys() == matched.keys()
    return Targets(lora.target_modules if as_given else list(chosen), _parameter_targets(model, experts.weights), left_out)


def match_targets(model: PreTrainedModel, targets: str | list[str], mixtures: Mixtures) -> dict[str, nn.Module]:
    """Return the linear layers that `lora.target_modules` names.

    A list holds ends of names, a string is a preset or a regular expression for whole names. Raises UserError for targets that match
    nothing, the head, or anything but linear layers.
    """
    head = head_layer(model)
    linear = {name: layer for name, layer in linear_layers(model).items() if layer is not head}
    if targets == "all-linear":
        return linear
    if targets == "mlp-linear":
        return _in_mlps(linear)
    modules = {name: module for name, module in model.named_modules() if name}
    matched = _match_pattern(modules, targets, linear) if isinstance(targets, str) else _match_ends(modules, targets, linear, mixtures)
    for name, module in matched.items():
        if module is head:
            raise UserError(f"lora.target_modules: {name} is the head, which takes no adapter; leave it out of {targets!r}")
        if not isinstance(module, LINEAR):
            raise UserError("lora.target_modules: expected linear layers, "
                            f"but {targets!r} matches {name}, a {type(module).__name__}")
    return matched


def _in_mlps(linear: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the linear layers of MLPs, by their names; not those of attention and other mixers."""
    found = {name: layer for name, layer in linear.items() if MLP.search(name)}
    if not found:
        raise UserError(f"lora.target_modules: mlp-linear finds no MLP; write a list of ends of names, of: {_last_parts(linear)}")
    return found


def _match_pattern(modules: dict[str, nn.Module], pattern: str, linear: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules whose whole name matches."""
    with bounded("lora.target_modules", pattern, f"for names write a list: [{_last_parts(linear)}]"):
        matched = {name: module for name, module in modules.items() if re.fullmatch(pattern, name)}
    if not matched:
        raise UserError(f"lora.target_modules: no layer's whole name matches the regular expression {pattern!r}; "
                        f"for last parts of names write a list, of: {_last_parts(linear)}")
    return matched


def _match_ends(modules: dict[str, nn.Module], ends: list[str], linear: Iterable[str], mixtures: Mixtures) -> dict[str, nn.Module]:
    """Return the modules whose names end with one of these."""
    found = {end: [name for name in modules if name == end or name.endswith(f".{end}")] for end in ends}
    missing = [end for end, names in found.items() if not names]
    if missing or not ends:
        experts = "; experts are adapted by lora.experts true" if mixtures.weights else ""
        raise UserError(f"lora.target_modules: no layer is called {', '.join(missing) or '(empty list)'}; "
                        f"the model has: {_last_parts(linear)}{experts}")
    return {name: modules[name] for names in found.values() for name in names}


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


# ---------------------------------------------------------------- linear layers


def _choose_layers(model: PreTrainedModel, layers: dict[str, nn.Module], mixtures: Mixtures, lora: config.Lora,
                   left_out: dict[str, list[str]]) -> dict[str, nn.Module]:
    """Return the layers that take an adapter, and note the others in `left_out`.

    Raises UserError for a named target that can take none; those outside the decoder are only left out.
    """
    part = _decoder_prefix(model)
    inside = {name: layer for name, layer in layers.items() if name.startswith(part)}
    unfit = {OUTSIDE: layers.keys() - inside.keys()} | _unfit(inside, model, mixtures, lora)
    for reason, names in unfit.items():
        if found := [name for name in layers if name in names]:
            if lora.target_modules not in PRESETS and reason != OUTSIDE:
                _refuse(reason, found[0], layers[found[0]], lora)
            left_out[reason] = found
            layers = {name: layer for name, layer in layers.items() if name not in names}
    return layers


def _unfit(layers: dict[str, nn.Module], model: PreTrainedModel, mixtures: Mixtures, lora: config.Lora) -> dict[str, set[str]]:
    """Return the names of layers that take no adapter, by the reason."""
    every, needs_module = lora.target_modules in PRESETS, lora.dropout > 0 or lora.dora
    return {
        "routers and gates": {name for name in layers if every and (name in mixtures.routers or re.search(r"(^|[._])router", name))},
        "more than linear layers": {name for name, layer in layers.items() if not is_linear_map(layer)},
        "read by other code, which would ignore an adapter": read_by_code(model),
        IDLE: _without_gradient(model, layers),
        NARROW: {name for name, layer in layers.items() if min(outputs_and_inputs(layer)) < lora.rank},
        "loaded by PEFT only without dropout and DoRA": {name for name in layers if needs_module and is_rewritten(model, name)},
    }


def _without_gradient(model: PreTrainedModel, layers: dict[str, nn.Module]) -> set[str]:
    """Return the names of modules through which no gradient comes from the last hidden states.

    They are not called, as experts for images, or what they compute is only compared, as scores by which keys are chosen. A model on the
    meta device is not run.
    """
    if model.device.type == "meta" or not layers:
        return set()
    probes = {name: torch.zeros((), device=model.device, requires_grad=True) for name in layers}

    def add(probe: Tensor, module: nn.Module, inputs: tuple, output: object) -> object:
        return tree_map(lambda value: value + probe.to(value.dtype) if isinstance(value, Tensor) else value, output)

    hooks = [layer.register_forward_hook(partial(add, probes[name])) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            hidden = decoder(model)(input_ids=torch.arange(8, device=model.device)[None], use_cache=False).last_hidden_state
        if not hidden.requires_grad:
            return set(layers)
        gradients = torch.autograd.grad(hidden.sum(), list(probes.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, gradient in zip(probes, gradients, strict=True) if gradient is None}


def _refuse(reason: str, name: str, layer: nn.Module, lora: config.Lora) -> None:
    """Raise UserError for a named target that can take no adapter."""
    if reason == NARROW:
        rows, columns = outputs_and_inputs(layer)
        raise UserError(f"lora.rank: expected at most {min(rows, columns)}, the smaller side of {name} ({rows} x {columns}), "
                        f"got {lora.rank}")
    raise UserError(f"lora.target_modules: expected layers that can take an adapter, but {name} is among those {reason}")


def describe_left_out(left_out: dict[str, list[str]]) -> str:
    """Return which linear layers take no adapter, and why."""
    return "; ".join(f"{reason}: {_kinds(names)}" for reason, names in left_out.items())


def _kinds(names: list[str]) -> str:
    """Return the names without the numbers of layers, each with its count."""
    counts = Counter(re.sub(r".*\.\d+\.", "", name) for name in names)
    shown = [f"{count} x {kind}" for kind, count in counts.most_common(SHOWN)]
    rest = len(names) - sum(count for _, count in counts.most_common(SHOWN))
    return ", ".join(shown) + (f" and {rest} others" if rest else "")


# ---------------------------------------------------------------- experts


def _choose_experts(model: PreTrainedModel, mixtures: Mixtures, lora: config.Lora, left_out: dict[str, list[str]]) -> Mixtures:
    """Return the experts of the text decoder, and note in `left_out` those that text does not reach.

    Raises UserError if there are none, or they cannot take the adapter that is asked for.
    """
    part = _decoder_prefix(model)
    weights = {name: weight for name, weight in mixtures.weights.items() if name.startswith(part)}
    layers = {name: layer for name, layer in mixtures.layers.items() if name.startswith(part)}
    if idle := _without_gradient(model, {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}):
        left_out[IDLE] = left_out.get(IDLE, []) + [name for name in weights if name in idle]
        weights = {name: weight for name, weight in weights.items() if name not in idle}
    if not weights and not layers:
        raise UserError(f"lora.experts: expected a mixture of experts, found none in {model.config.model_type}; set it to false")
    if weights and (lora.dropout or lora.dora):
        raise UserError("lora.experts: expected lora.dropout 0 and lora.dora false beside it, as PEFT has neither for 3-D weights, "
                        f"got {lora.dropout} and {str(lora.dora).lower()}")
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise UserError(f"lora.experts: expected dense experts, found {name} in {str(weight.dtype).removeprefix('torch.')}")
    matrices = {name: tuple(weight.shape[1:]) for name, weight in weights.items()}
    matrices |= {name: outputs_and_inputs(layer) for name, layer in layers.items()}
    for name, (rows, columns) in matrices.items():
        if lora.rank > min(rows, columns):
            raise UserError(f"lora.rank: expected at most {min(rows, columns)} beside lora.experts, the smaller side of {name} "
                            f"({rows} x {columns}), got {lora.rank}")
    return Mixtures(weights, layers)


def _parameter_targets(model: PreTrainedModel, weights: dict[str, Tensor]) -> list[str]:
    """Return PEFT's target parameters for these weights: ends of names, where no other weight has them.

    Where the model's class has towers, which may not be in memory, they are whole names.
    """
    ends = sorted({re.sub(r".*\.\d+\.", "", name) for name in weights})
    others = [name for name, _ in model.named_parameters() if name not in weights]
    ambiguous = is_wrapped(model) or any(name.endswith(tuple(f".{end}" for end in ends)) for name in others)
    return sorted(weights) if ambiguous else ends


def _decoder_prefix(model: PreTrainedModel) -> str:
    """Return the start of the names of all that is in the text decoder."""
    part = decoder(model)
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""
