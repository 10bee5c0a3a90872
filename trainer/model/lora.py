"""Add low-rank adapters (LoRA): made, saved and named by PEFT, computed by our fused operations.

An adapter adds s B A x to a linear layer's W x (Hu et al., arXiv 2106.09685), with s = alpha / rank, or alpha / sqrt(rank) (rsLoRA,
arXiv 2312.03732); DoRA (arXiv 2402.09353) also rescales each output to a trained magnitude. PEFT's modules hold A [R,K] and B [N,R]; a
fused forward reads them at each call, so later changes by PEFT (merging, disabling, switching adapters) take effect; where the fused
operations do not apply, PEFT's own forward runs, with one warning that says why.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as AdaptedLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.lora import Lora, lora_linear, lora_qkv
from kernels.nf4 import Nf4
from trainer import config
from trainer.errors import UserError
from trainer.model.linear_layers import base_name, linear_layers, outputs_and_inputs
from trainer.model.lora_targets import choose_targets, describe_left_out
from trainer.model.mixtures import find_mixtures
from trainer.model.peft_targets import as_loaded, as_modules, targets_as_given
from trainer.model.quantization import is_quantized, nf4_of, weight_count, why_not_nf4
from trainer.model.vocabulary import check_wrappers, trained_vocabulary
from trainer.model.vocabulary import describe as describe_vocabulary
from trainer.patterns import require_bounded

logger = logging.getLogger(__name__)

DISABLED_BY_US = "_steadfast_disabled"  # attribute of PEFT's layers inside `adapters_disabled`


# ---------------------------------------------------------------- making and loading


def add_adapter(model: PreTrainedModel, lora: config.Lora, new_ids: Sequence[int] = ()) -> PeftModel:
    """Freeze `model` and put a trainable adapter on its linear layers.

    Rows of the embedding and head for the tokens `new_ids` train beside it, and so do the modules of `lora.modules_to_save`.
    The adapter is new (fp32, B = 0), or the one saved at `lora.path`. A saved adapter brings its own rank and targets. Raises UserError
    for numbers out of range, targets that the model does not have or that can take no adapter, or a folder without a LoRA adapter for
    this model. Call `patch` afterwards to fuse it.
    """
    if lora.path is not None:
        return _load_adapter(model, lora.path)
    _check_numbers(lora)
    for option in ("rank_pattern", "alpha_pattern"):
        require_bounded(f"lora.{option}", [*getattr(lora, option)], [name for name, _ in model.named_modules()])
    targets = choose_targets(model.requires_grad_(False), lora)
    _check_patterns(model, targets.modules, lora)
    from_weights = lora.mutates_base and model.device.type != "meta"
    vocabulary = trained_vocabulary(model, lora, list(new_ids))
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha  # readers of the JSON expect an int
    with targets_as_given():
        adapted = get_peft_model(model, LoraConfig(
            task_type="CAUSAL_LM", r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets.modules,
            target_parameters=targets.parameters or None, use_rslora=lora.rslora, use_dora=lora.dora, rank_pattern=lora.rank_pattern,
            alpha_pattern=lora.alpha_pattern, **vocabulary,
            init_lora_weights=lora.init if from_weights or lora.init == "gaussian" else True,
        ))
    adapted.left_out = targets.left_out
    if from_weights:  # the base lacks it now, so an export subtracts it
        start = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        adapted.adapter_start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in start.items()}
    return adapted


def _check_patterns(model: PreTrainedModel, modules: str | list[str], lora: config.Lora) -> None:
    """Refuse patterns of ranks and alphas that match no layer with an adapter.

    Refuse ranks above the smaller side of a layer too.
    """
    adapted = {name: layer for name, layer in linear_layers(model).items()
               if any(f".{name}".endswith(f".{end}") for end in ([modules] if isinstance(modules, str) else modules))}
    for option, pattern in [*(("rank_pattern", pattern) for pattern in lora.rank_pattern),
                            *(("alpha_pattern", pattern) for pattern in lora.alpha_pattern)]:
        matched = [name for name in adapted if re.fullmatch(rf"(.*\.)?({pattern})", name)]
        if not matched:
            raise UserError(f"lora.{option}: no layer with an adapter matches {pattern!r}; name ends of their names, such as "
                            f"{next(iter(adapted), 'q_proj').rpartition('.')[2]}")
        smallest = min(matched, key=lambda name: min(outputs_and_inputs(adapted[name])))
        if option == "rank_pattern" and lora.rank_pattern[pattern] > (size := min(outputs_and_inputs(adapted[smallest]))):
            raise UserError(f"lora.rank_pattern: expected at most {size}, the smaller side of {smallest}, got {lora.rank_pattern[pattern]}")


def _check_numbers(lora: config.Lora) -> None:
    """Refuse a rank, alpha or dropout out of range."""
    if lora.rank <= 0:
        raise UserError(f"lora.rank: expected at least 1, got {lora.rank}")
    if not lora.alpha > 0:
        raise UserError(f"lora.alpha: expected more than 0, got {lora.alpha}")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"lora.dropout: expected 0 <= dropout < 1, got {lora.dropout}")


def _load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """Load a saved adapter for further training.

    Raises UserError if it is not a LoRA adapter for this model.
    """
    folder = Path(path).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"lora.path: expected a folder with adapter_config.json, found none in {folder}")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"lora.path: expected adapter_model.safetensors in {folder}; only safetensors weights are loaded")
    try:
        saved = PeftConfig.from_pretrained(folder)
        if not isinstance(saved, LoraConfig):
            raise UserError(f"lora.path: expected a LoRA adapter, found {saved.peft_type} in {folder}")
        require_bounded(f"lora.path: {folder / 'adapter_config.json'}", _patterns(saved), [name for name, _ in model.named_modules()])
        with targets_as_given():
            adapted = PeftModel.from_pretrained(model, folder, config=as_modules(model, saved), is_trainable=True,
                                                low_cpu_mem_usage=model.device.type == "meta")
        _check_loaded(adapted, as_loaded(model, saved, load_file(weights)))
        check_wrappers(model)
        return adapted
    except UserError:
        raise
    # Another model's shapes or names, an unknown kind of adapter, a file cut short.
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"lora.path: the adapter in {folder} does not fit this model: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:  # of any kind: the file may hold anything
        raise UserError(f"lora.path: {folder / 'adapter_config.json'} has values of types that PEFT does not expect "
                        f"({type(error).__name__}); save the adapter again") from error


def _patterns(saved: LoraConfig) -> list[str]:
    """Return the texts of an adapter's configuration that PEFT takes for regular expressions."""
    alone = [saved.target_modules, saved.exclude_modules, saved.layers_pattern]
    several = [saved.rank_pattern, saved.alpha_pattern, saved.modules_to_save, saved.layers_pattern]
    given = [*alone, *(text for texts in several if texts and not isinstance(texts, str) for text in texts)]
    return [text for text in given if isinstance(text, str)]


def _check_loaded(adapted: PeftModel, saved: dict[str, Tensor]) -> None:
    """Check that a file and the model have the same tensors; PEFT would load those that fit.

    Raises ValueError. A model on the meta device has names and shapes only.
    """
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if unmatched := saved.keys() ^ loaded.keys():
        raise ValueError(f"{len(unmatched)} tensors are in one but not in the other, such as {min(unmatched)}")
    same = {name for name, tensor in loaded.items()
            if tensor.device.type == "meta" or torch.equal(tensor.cpu(), saved[name].to(tensor.dtype))}
    if lost := loaded.keys() - same:
        raise ValueError(f"PEFT does not load {len(lost)} tensors, such as {min(lost)}")


def describe(model: nn.Module) -> dict[str, str]:
    """Return the startup report on experts and on layers without an adapter, as {name: text}."""
    if not isinstance(model, PeftModel):
        return {}
    base, left_out = model.get_base_model(), getattr(model, "left_out", {})
    lines = ({"no adapter": describe_left_out(left_out)} if left_out else {}) | describe_vocabulary(model)
    mixtures = find_mixtures(base)
    experts = mixtures.weights | {f"{name}.weight": layer.weight for name, layer in mixtures.layers.items()}
    if experts:
        every = sum(weight_count(p) for name, p in base.named_parameters() if ".lora_" not in name)
        share = f"{sum(map(weight_count, experts.values())) / every:.0%} of the weights"
        ranks = [layer.r[layer.active_adapters[0]] for name, layer in adapted_weights(base).items() if name in experts]
        lines["experts"] = (f"{len(ranks)} weights adapted, rank {', '.join(map(str, sorted(set(ranks))))}: {share}" if ranks else
                            f"carry no adapter, {share} stay frozen; lora.experts true adapts them")
    return lines


def adapted_weights(base: nn.Module) -> dict[str, LoraLayer]:
    """Return PEFT's layers by the name that the weight they adapt has in the base."""
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    return {f"{base_name(name)}.{getattr(layer, 'parameter_name', 'weight')}": layer for name, layer in layers.items()}


# ---------------------------------------------------------------- fused forwards


class Projection(NamedTuple):
    """Tensors of one linear layer: weight [N,K], dense or in 4 bits, bias [N], and its adapter."""

    weight: Tensor | Nf4
    bias: Tensor | None
    lora: Lora | None


def is_adapted(module: nn.Module) -> bool:
    """Return whether this is a linear layer with one of PEFT's LoRA adapters."""
    return isinstance(module, AdaptedLinear) or _is_adapted_4bit(module)


def _is_adapted_4bit(module: nn.Module) -> bool:
    """Return whether this is PEFT's class for adapters on 4-bit layers.

    It is recognised by name, as importing it needs bitsandbytes.
    """
    return isinstance(module, LoraLayer) and type(module).__name__ == "Linear4bit"


def any_adapter(modules: Sequence[nn.Module]) -> bool:
    """Return whether any of the modules has an adapter."""
    return any(map(is_adapted, modules))


def why_not_fused(module: nn.Module) -> str | None:
    """Return why a linear layer, adapted or not, must run its own forward now, or None.

    None means that `projection` describes the layer fully.
    """
    if type(module) is nn.Linear or is_quantized(module):
        return "hooks on a linear layer" if _hooked(module) else why_not_nf4(module)
    if type(module) is not AdaptedLinear and not _is_adapted_4bit(module):
        return f"{type(module).__name__} is not a plain linear layer"
    children, active = module._modules, module.active_adapters  # read directly, as below, in every call: attributes of modules are slow
    base = children["base_layer"]
    if (type(base) is not nn.Linear and not is_quantized(base)) or module.fan_in_fan_out:
        return f"the adapted layer is a {type(base).__name__}"
    if reason := why_not_nf4(base):
        return reason
    disabled_by_others = module.disable_adapters and not getattr(module, DISABLED_BY_US, False)
    if disabled_by_others or module.merged:
        return "the adapter is " + ("disabled" if disabled_by_others else "merged")
    if len(active) != 1 or active[0] not in children["lora_A"]._modules:
        return f"expected one active adapter, found {', '.join(active) or 'none'}"
    name = active[0]
    variant = module.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"the adapter is a {type(variant).__name__}"
    A, B = (children[part]._modules[name] for part in ("lora_A", "lora_B"))
    if B._parameters["bias"] is not None:
        return "the adapter has a bias"
    return "hooks on an adapted layer" if any(map(_hooked, (module, base, A, B))) else None


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of PEFT that hold something trained: adapters, and what trains beside them."""
    return [module for module in model.modules() if isinstance(module, (LoraLayer, TrainableTokensLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def adapters_disabled(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Run the base without its adapters inside this context, by the kernels of training.

    It sets two attributes on each layer. `_disable_adapters` is PEFT's own flag: PEFT's forward and `projection` then leave the adapter
    out. DISABLED_BY_US tells `why_not_fused` that the layer may stay fused all the same. PEFT's `disable_adapter` cannot be used: it also
    turns `requires_grad` of the adapter off and on, which must not happen in the middle of a step.
    """
    for layer in layers:
        layer._disable_adapters = True
        setattr(layer, DISABLED_BY_US, True)
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
            setattr(layer, DISABLED_BY_US, False)


def unfused_layers(model: nn.Module, patched: bool) -> list[nn.Module]:
    """Return the linear layers that run their own forward, or whose weight PEFT reads to initialise DoRA."""
    adapted = [module for module in model.modules() if is_adapted(module)]
    fused = {module.base_layer for module in adapted if patched and not why_not_fused(module) and not module.lora_variant}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in fused]


def _hooked(module: nn.Module) -> bool:
    """Return whether a fused forward would skip hooks of this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def projection(module: nn.Module) -> Projection:
    """Read the tensors of a layer for which `why_not_fused` returns None."""
    if not is_adapted(module):
        return Projection(_weight(module), module._parameters["bias"], None)
    children = module._modules
    base = children["base_layer"]
    if module.disable_adapters:
        return Projection(_weight(base), base._parameters["bias"], None)
    name = module.active_adapters[0]
    A, B, dropout = (children[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
    magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_variant else None
    return Projection(_weight(base), base._parameters["bias"], Lora(
        A._parameters["weight"], B._parameters["weight"], module.scaling[name],
        dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0, magnitude,
    ))


def _weight(layer: nn.Module) -> Tensor | Nf4:
    return nf4_of(layer) if is_quantized(layer) else layer._parameters["weight"]


@functools.cache  # once per reason, however many layers and steps
def _warn_not_fused(reason: str) -> None:
    logger.warning("linear layers run unfused, by their own forward: %s", reason)


def fusable(modules: Sequence[nn.Module]) -> bool:
    """Return whether all the layers can be fused now; warn once per reason if not."""
    for module in modules:
        if reason := why_not_fused(module):
            _warn_not_fused(reason)
            return False
    return True


def project(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Compute linear layers that share the input x [..., K], in one operation if any has an adapter."""
    if not any_adapter(modules) or not fusable(modules):
        return tuple(module(x) for module in modules)
    weights, biases, loras = zip(*map(projection, modules), strict=True)
    return lora_qkv(x, weights, loras, biases)


def linear_forward(module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    """Compute one adapted layer; extra arguments are meant for PEFT's forward, which then runs."""
    if args or kwargs or not fusable((module,)):
        return type(module).forward(module, x, *args, **kwargs)
    weight, bias, lora = projection(module)
    return lora_linear(x, weight, lora, bias)
