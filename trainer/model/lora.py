"""Low-rank adapters: made, saved and named by PEFT, computed by our fused operations.

An adapter adds s B A x to a linear layer's W x (Hu et al., arXiv 2106.09685), with s = alpha / rank, or alpha / sqrt(rank) (rsLoRA,
arXiv 2312.03732); DoRA (arXiv 2402.09353) also rescales each output to a trained magnitude. PEFT's modules hold A [R,K] and B [N,R]; a
fused forward reads them at each call, so whatever PEFT changes later (merging, disabling, switching adapters) is seen, and what the
fused operations do not cover runs PEFT's own forward, with one warning that says why.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as AdaptedLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kernels.lora import Lora, lora_linear, lora_qkv
from kernels.nf4 import Nf4
from trainer import config
from trainer.errors import UserError
from trainer.model.quantization import is_quantized, nf4_of, why_not_nf4

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- making and loading


def add_adapter(model: PreTrainedModel, settings: config.Lora) -> PeftModel:
    """Freeze `model` and put a trainable adapter on its linear layers: a new one (fp32, B = 0), or the one saved at `settings.path`.

    A saved adapter brings its own rank and targets. Raises UserError for numbers out of range, targets that are not there, a rank
    larger than a matrix, or a folder that does not hold a LoRA adapter for this model. Call `patch` afterwards to fuse it.
    """
    if settings.path is not None:
        return _load_adapter(model, settings.path)
    _check_numbers(settings)
    _check_targets(model, settings)
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha  # readers of the JSON expect an int
    return get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout,
        target_modules=settings.target_modules, use_rslora=settings.rslora, use_dora=settings.dora,
    ))


def _check_numbers(settings: config.Lora) -> None:
    if settings.rank <= 0:
        raise UserError(f"lora.rank: expected at least 1, got {settings.rank}")
    if not settings.alpha > 0:
        raise UserError(f"lora.alpha: expected more than 0, got {settings.alpha}")
    if not 0 <= settings.dropout < 1:
        raise UserError(f"lora.dropout: expected 0 <= dropout < 1, got {settings.dropout}")


def _check_targets(model: PreTrainedModel, settings: config.Lora) -> None:
    """Every target names some linear layer, nothing else, not the head; and no matrix is smaller than the rank."""
    matched = _matched(model, settings.target_modules)
    for name, module in matched.items():
        if module is model.get_output_embeddings():
            raise UserError(f"lora.target_modules: {name} is the head, which takes no adapter; leave it out of {settings.target_modules!r}")
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UserError(f"lora.target_modules: expected linear layers, "
                            f"but {settings.target_modules!r} matches {name}, a {type(module).__name__}")
        rows, columns = module.weight.shape if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        if settings.rank > min(rows, columns):
            raise UserError(f"lora.rank: expected at most {min(rows, columns)}, the smaller side of {name} ({rows} x {columns}), "
                            f"got {settings.rank}")


def _matched(model: PreTrainedModel, targets: str | list[str]) -> dict[str, nn.Module]:
    """The modules that PEFT would adapt: a list holds last parts of names, a string is a regular expression for whole names."""
    modules = {name: module for name, module in model.named_modules() if name}
    linear = {name: m for name, m in modules.items() if isinstance(m, (nn.Linear, Conv1D)) and m is not model.get_output_embeddings()}
    there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    if targets == "all-linear":
        return linear
    if isinstance(targets, str):
        try:
            matched = {name: m for name, m in modules.items() if re.fullmatch(targets, name)}
        except re.error as error:
            raise UserError(f"lora.target_modules: {targets!r} is not a regular expression ({error}); "
                            f"for names write a list: [{there}]") from None
        if not matched:
            raise UserError(f"lora.target_modules: no layer's whole name matches the regular expression {targets!r}; "
                            f"for last parts of names write a list, of: {there}")
        return matched
    found = {t: [name for name in modules if name == t or name.endswith(f".{t}")] for t in targets}
    missing = [t for t, names in found.items() if not names]
    if missing or not targets:
        raise UserError(f"lora.target_modules: no layer is called {', '.join(missing) or '(empty list)'}; the model has: {there}")
    return {name: modules[name] for names in found.values() for name in names}


def _load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    folder = Path(path).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"lora.path: expected a folder with adapter_config.json, found none in {folder}")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"lora.path: expected adapter_model.safetensors in {folder}; only safetensors weights are loaded")
    try:
        saved = PeftConfig.from_pretrained(folder)
        if not isinstance(saved, LoraConfig) or saved.modules_to_save:
            raise UserError(f"lora.path: expected a LoRA adapter without modules_to_save, found {saved.peft_type} in {folder}")
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True, low_cpu_mem_usage=model.device.type == "meta")
        with safe_open(weights, "pt") as file:
            strange = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
        if strange:  # PEFT loads what fits and leaves the rest as it was
            raise ValueError(f"{len(strange)} tensors are in one but not in the other, such as {min(strange)}")
        return adapted
    # Another model's shapes or names, an unknown kind of adapter, a file cut short.
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"lora.path: the adapter in {folder} does not fit this model: {' '.join(str(error).split())[:300]}") from error


# ---------------------------------------------------------------- fused forwards


class Projection(NamedTuple):
    """The tensors of one linear layer: weight [N,K], dense or in 4 bits, bias [N], and its adapter."""

    weight: Tensor | Nf4
    bias: Tensor | None
    lora: Lora | None


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLinear) or _is_adapted_4bit(module)


def _is_adapted_4bit(module: nn.Module) -> bool:
    """PEFT has a class of its own for adapters on 4-bit layers, in a file that needs bitsandbytes."""
    return isinstance(module, LoraLayer) and type(module).__name__ == "Linear4bit"


def any_adapter(modules: Sequence[nn.Module]) -> bool:
    return any(map(is_adapted, modules))


def why_not_fused(module: nn.Module) -> str | None:
    """Why a linear layer, adapted or not, has to run its own forward just now; None if `projection` says all there is."""
    if type(module) is nn.Linear or is_quantized(module):
        return "hooks on a linear layer" if _hooked(module) else why_not_nf4(module)
    if type(module) is not AdaptedLinear and not _is_adapted_4bit(module):
        return f"{type(module).__name__} is not a plain linear layer"
    base, active = module.base_layer, module.active_adapters
    if (type(base) is not nn.Linear and not is_quantized(base)) or module.fan_in_fan_out:
        return f"the adapted layer is a {type(base).__name__}"
    if reason := why_not_nf4(base):
        return reason
    disabled = module.disable_adapters and not getattr(module, "switched_off", False)
    if disabled or module.merged:
        return "the adapter is " + ("disabled" if disabled else "merged")
    if len(active) != 1 or active[0] not in module.lora_A:
        return f"expected one active adapter, found {', '.join(active) or 'none'}"
    name = active[0]
    variant = module.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"the adapter is a {type(variant).__name__}"
    if module.lora_B[name].bias is not None:
        return "the adapter has a bias"
    return "hooks on an adapted layer" if any(map(_hooked, (module, base, module.lora_A[name], module.lora_B[name]))) else None


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The layers with an adapter, of whatever kind."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def adapters_disabled(layers: Sequence[nn.Module]) -> Iterator[None]:
    """The base alone for a while, fused where it was, so that it is the very base that the adapter is trained on.

    PEFT's `disable_adapter` also takes the adapter's parameters out of the gradient and puts them back, which training cannot have in the
    middle of a step. So only its flag is set, and `switched_off` beside it for the fused forwards, which step aside for the flag alone.
    """
    for layer in layers:
        layer._disable_adapters = layer.switched_off = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = layer.switched_off = False


def unfused_layers(model: nn.Module, patched: bool) -> list[nn.Module]:
    """The linear layers, without their adapters, whose weights our fused operations are not alone to read: they run their own forward,
    or PEFT takes DoRA's first magnitudes from them."""
    adapted = [module for module in model.modules() if is_adapted(module)]
    fused = {module.base_layer for module in adapted if patched and not why_not_fused(module) and not module.lora_variant}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in fused]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def projection(module: nn.Module) -> Projection:
    """Read the tensors of a layer for which `why_not_fused` has nothing to say."""
    if not is_adapted(module):
        return Projection(_weight(module), module.bias, None)
    if module.disable_adapters:
        return Projection(_weight(module.base_layer), module.base_layer.bias, None)
    name = module.active_adapters[0]
    dropout = module.lora_dropout[name]
    magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_variant else None
    base = module.base_layer
    return Projection(_weight(base), base.bias, Lora(
        module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name],
        dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0, magnitude,
    ))


def _weight(layer: nn.Module) -> Tensor | Nf4:
    return nf4_of(layer) if is_quantized(layer) else layer.weight


@functools.cache  # once per reason, however many layers and steps
def _warn_not_fused(reason: str) -> None:
    logger.warning("fused linear layers step aside for stock ones: %s", reason)


def fusable(modules: Sequence[nn.Module]) -> bool:
    """Whether all the layers can be fused now; says so, once, where they cannot."""
    for module in modules:
        if reason := why_not_fused(module):
            _warn_not_fused(reason)
            return False
    return True


def project(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Outputs of linear layers that share the input x [..., K], in one operation if any has an adapter."""
    if not any_adapter(modules) or not fusable(modules):
        return tuple(module(x) for module in modules)
    weights, biases, loras = zip(*map(projection, modules), strict=True)
    return lora_qkv(x, weights, loras, biases)


def linear_forward(module: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    """The forward of one adapted layer; extra arguments are PEFT's, for its own forward."""
    if args or kwargs or not fusable((module,)):
        return type(module).forward(module, x, *args, **kwargs)
    weight, bias, lora = projection(module)
    return lora_linear(x, weight, lora, bias)
