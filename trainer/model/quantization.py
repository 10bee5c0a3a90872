"""Load and read base weights in 4 bits (QLoRA), through bitsandbytes.

A QLoRA run freezes its base in NF4 (Dettmers et al., arXiv 2305.14314). transformers quantises each linear layer but the head while
loading it, so the dense model is never in memory as a whole, and bitsandbytes' `Linear4bit` stores the codes. Our fused operations read
them as `kernels.nf4.Nf4`, and dequantise a weight just before each matmul. A checkpoint that is in NF4 already loads as it is. Dense stay
experts that are 3-D weights, which bitsandbytes cannot hold, routers, and layers whose weight other code reads.
"""

from __future__ import annotations

import re
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from kernels import serving
from kernels.nf4 import GROUP, Nf4
from trainer.config import Config, Quantization
from trainer.errors import UserError
from trainer.model.linear_layers import read_by_code
from trainer.model.mixtures import find_mixtures
from trainer.model.text_part import head_layer

BLOCK = 64  # weights that share a scale, as transformers configures bitsandbytes


def import_bitsandbytes(option: str) -> ModuleType:
    """Import bitsandbytes for `option`, and keep it from packing weights.

    Raises UserError if it is not installed. On a CPU with bf16 products it would pack a layer's weights for good when the layer is first
    evaluated: their scales are rounded to bf16, and layers that are not a multiple of 32 wide fail.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{option}: expected bitsandbytes, cannot import it ({error}); pip install 'bitsandbytes>=0.50'") from None
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # layers ask it as they are made
    return bitsandbytes


def require_bitsandbytes(config: Config) -> None:
    """Check that bitsandbytes is installed if the run needs it. Raises UserError."""
    if config.method == "qlora":
        import_bitsandbytes("method qlora")
    if config.optim.name == "adamw_8bit":
        import_bitsandbytes("optim.name adamw_8bit")


def bitsandbytes_version(config: Config) -> str | None:
    """Return the library version that quantises the base, or None; another may round differently."""
    return f"bitsandbytes {import_bitsandbytes('method qlora').__version__}" if config.method == "qlora" else None


# ---------------------------------------------------------------- loading


def is_nf4_checkpoint(source: str, model_config: PreTrainedConfig, method: str) -> bool:
    """Return whether a QLoRA run's base is in NF4 already.

    Raises UserError for a quantised checkpoint that the method cannot use.
    """
    saved = getattr(model_config, "quantization_config", None)
    if saved is None:
        return False
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    kind = str(saved.get("quant_method"))
    ours = kind == "bitsandbytes"
    if ours:
        kind = saved.get("bnb_4bit_quant_type", "fp4") if saved.get("load_in_4bit") else "8-bit"
    if method == "qlora" and kind != "nf4":
        raise UserError(f"model.path: expected dense weights, or bitsandbytes' NF4, in {source}, found {kind} quantisation; "
                        "use the model that it was made from")
    if method != "qlora" and ours:  # other libraries' checkpoints may become dense as they load
        remedy = "use --method qlora" if kind == "nf4" else "use the model that it was made from"
        raise UserError(f"model.path: expected dense weights for method {method}, found {kind} quantisation in {source}; {remedy}")
    return method == "qlora"


def saved_patterns(model_config: PreTrainedConfig) -> list[str]:
    """Return the texts of a 4-bit checkpoint's config that transformers takes for regular expressions."""
    saved = model_config.quantization_config
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    return [text for name in ("llm_int8_skip_modules", "modules_to_not_convert") for text in saved.get(name) or () if isinstance(text, str)]


def dense_patterns(model: PreTrainedModel, skip: list[str]) -> list[str]:
    """Return transformers' patterns for the layers that stay dense.

    They are the head, `skip`, routers, and layers whose weight other code reads.
    """
    names = {*find_mixtures(model).routers, *read_by_code(model)}
    return [*get_keys_to_not_convert(model), *skip, *(f"{re.escape(name)}$" for name in sorted(names))]


def layers_to_quantize(dense: PreTrainedModel, skip: list[str]) -> list[nn.Module]:
    """Return the layers of a dense model, adapted or not, that loading would quantise."""
    kept_dense = dense_patterns(dense, skip)
    linear = {name.removesuffix(".base_layer"): module for name, module in dense.named_modules()
              if type(module) in (nn.Linear, Conv1D) and not module.weight.requires_grad}
    return [module for name, module in linear.items() if should_convert_module(name, kept_dense)]


def nf4_config(quantization: Quantization, meta_model: PreTrainedModel, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how from_pretrained quantises a dense checkpoint.

    `meta_model` is the model on the meta device. Raises UserError if it lacks a layer of `skip_modules`.
    """
    names = {name for name, module in meta_model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [skip for skip in quantization.skip_modules if not any(f".{name}".endswith(f".{skip}") for name in names)]:
        available = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise UserError(f"quantization.skip_modules: no linear layer is called {', '.join(missing)}; the model has: {available}")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=quantization.double_quant, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=dense_patterns(meta_model, quantization.skip_modules))


def prepare_quantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Check a loaded 4-bit model, and set the dtype that its layers compute in.

    Raises UserError for a head in 4 bits, which the loss cannot read, and for weights of other shapes than the config's, which
    transformers does not report once they are quantised.
    """
    for name, module in model.named_modules():
        expected = getattr(module, "out_features", 0), getattr(module, "in_features", 0)
        if is_quantized(module) and module.weight.quant_state.shape != expected:
            raise UserError(f"model.path: weights do not fit the model's config.json: expected {expected} for {name}.weight, "
                            f"found {tuple(module.weight.quant_state.shape)}")
    if is_quantized(head_layer(model)):
        raise UserError("model.path: expected a dense head, found one in 4 bits; quantise the model without its head")
    for module in quantized_layers(model):
        module.compute_dtype, module.compute_type_is_set = dtype, True
        # On some CPUs bitsandbytes repacks a weight at the first call in eval mode, in place, after which it has no gradient.
        module.support_avx512bf16_for_cpu = False


# ---------------------------------------------------------------- layers


def is_quantized(module: nn.Module) -> bool:
    """Return whether this is bitsandbytes' 4-bit layer.

    It is recognised by name, so that the library need not be installed.
    """
    return type(module) is not nn.Linear and isinstance(module, nn.Linear) and type(module).__name__ == "Linear4bit"


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """Return the 4-bit layers of a model."""
    return [module for module in model.modules() if is_quantized(module)]


def why_not_nf4(module: nn.Module) -> str | None:
    """Return why `nf4_of` cannot describe a 4-bit layer; None if it can, or if the layer is dense."""
    if not is_quantized(module):
        return None
    state = quant_state_of(module)
    if state is None:
        return "a 4-bit layer is not quantised yet"
    if state.quant_type != "nf4":
        return f"a 4-bit layer is {state.quant_type}"
    if state.nested and state.state2.blocksize != GROUP:
        return f"a 4-bit layer has groups of {state.state2.blocksize} blocks"
    return "a 4-bit layer is packed for inference on this CPU" if getattr(state, "packing_format_for_cpu", False) else None


def quant_state_of(module: nn.Module) -> object | None:
    """Return bitsandbytes' scales of a 4-bit layer.

    A weight that was sharded or gathered has left them to its module.
    """
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def without_quant_states(layers: list[nn.Module]) -> None:
    """Make the codes of 4-bit layers plain parameters, which can be sharded.

    The scales are left with the modules.
    """
    for layer in layers:
        layer.quant_state, layer.weight = layer.weight.quant_state, nn.Parameter(layer.weight.data, requires_grad=False)


def nf4_of(module: nn.Module) -> Nf4:
    """Return a view of a 4-bit layer's weight, which dequantises to the dtype the layer computes in."""
    state = quant_state_of(module)
    return nf4_view(module.weight.data, state, (module.out_features, module.in_features), module.compute_dtype or state.dtype)


def nf4_view(codes: Tensor, state: object, shape: tuple[int, int], dtype: torch.dtype) -> Nf4:
    """Return a view of a weight of this shape in NF4, of its codes and bitsandbytes' scales."""
    nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (None, None, None)
    return Nf4(codes.view(torch.uint8), state.absmax, *nested, shape, dtype, state.blocksize)


def weight_count(parameter: Tensor) -> int:
    """Return the number of weights in a parameter, of which two share a byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def bytes_per_weight(double_quant: bool) -> float:
    """Return the bytes of an NF4 weight, scales included."""
    return 0.5 + ((1 + 4 / GROUP) / BLOCK if double_quant else 4 / BLOCK)


def describe(model: nn.Module) -> dict[str, str]:
    """Return the startup report of a 4-bit base as {name: text}; empty for a dense one."""
    weights = [nf4_of(layer) for layer in quantized_layers(model)]
    if not weights:
        return {}
    dense = sum(w.shape[0] * w.shape[1] * w.dtype.itemsize for w in weights)
    text = (f"{len(weights)} layers in NF4, {sum(w.nbytes for w in weights) / 1e6:,.2f} MB instead of {dense / 1e6:,.2f}, "
            f"dequantised by {serving(weights[0].device, weights[0].dtype)}")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if experts := sum(map(weight_count, find_mixtures(base).weights.values())):
        every = sum(weight_count(p) for name, p in base.named_parameters() if ".lora_" not in name)
        text += f"; experts stay dense, {experts / every:.0%} of the weights, as bitsandbytes quantises linear layers only"
    return {"4-bit base": text}
