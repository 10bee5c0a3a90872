"""4-bit base weights (QLoRA) and 8-bit optimiser states, both through bitsandbytes.

A QLoRA run freezes its base model in NF4 (Dettmers et al., arXiv 2305.14314): transformers quantises each linear layer but the head as
it is loaded, so the dense model is never held whole, and bitsandbytes' `Linear4bit` holds the codes. Our fused operations read them as
`kernels.nf4.Nf4`, and make a dense weight just before each product. Checkpoints that bitsandbytes quantised before load as they are.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from kernels import serving
from kernels.nf4 import GROUP, Nf4
from trainer import config
from trainer.errors import UserError

BLOCK = 64  # weights that share a scale, as transformers has bitsandbytes do it


def import_bitsandbytes(option: str) -> ModuleType:
    """bitsandbytes. UserError that names the option which needs it, where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{option}: expected bitsandbytes, cannot import it ({error}); pip install 'bitsandbytes>=0.50'") from None
    return bitsandbytes


def require_bitsandbytes(settings: config.Config) -> None:
    """UserError where the run needs bitsandbytes and there is none."""
    if settings.method == "qlora":
        import_bitsandbytes("method qlora")
    if settings.optim.name == "adamw_8bit":
        import_bitsandbytes("optim.name adamw_8bit")


def bitsandbytes_version(settings: config.Config) -> str | None:
    """What made the base's 4-bit weights: another version may round in another way."""
    return f"bitsandbytes {import_bitsandbytes('method qlora').__version__}" if settings.method == "qlora" else None


# ---------------------------------------------------------------- loading


def is_nf4_checkpoint(source: str, found: PreTrainedConfig, method: str) -> bool:
    """Whether a QLoRA run finds its base in NF4 already. UserError for a quantised checkpoint that the run is not for."""
    saved = getattr(found, "quantization_config", None)
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


def layers_to_quantize(dense: PreTrainedModel, skip: list[str]) -> list[nn.Module]:
    """The layers of a dense model, adapted or not, that loading would quantise."""
    kept = [*get_keys_to_not_convert(dense), *skip]
    linear = {name.removesuffix(".base_layer"): module for name, module in dense.named_modules()
              if type(module) in (nn.Linear, Conv1D) and not module.weight.requires_grad}
    return [module for name, module in linear.items() if should_convert_module(name, kept)]


def nf4_config(settings: config.Quantization, outline: PreTrainedModel, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What from_pretrained is given. `outline` is the model without memory; UserError where a name to skip is not in it."""
    names = {name for name, module in outline.named_modules() if isinstance(module, nn.Linear)}
    if missing := [skip for skip in settings.skip_modules if not any(f".{name}".endswith(f".{skip}") for name in names)]:
        there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise UserError(f"quantization.skip_modules: no linear layer is called {', '.join(missing)}; the model has: {there}")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=settings.double_quant, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*get_keys_to_not_convert(outline), *settings.skip_modules])


def prepare_quantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Settle what a loaded 4-bit model computes in. UserError for a head in 4 bits, which the loss cannot read, and for weights of other
    shapes than the config's, which quantising hides."""
    for name, module in model.named_modules():
        expected = getattr(module, "out_features", 0), getattr(module, "in_features", 0)
        if is_quantized(module) and module.weight.quant_state.shape != expected:
            raise UserError(f"model.path: weights do not fit the model's config.json: expected {expected} for {name}.weight, "
                            f"found {tuple(module.weight.quant_state.shape)}")
    if is_quantized(model.get_output_embeddings()):
        raise UserError("model.path: expected a dense head, found one in 4 bits; quantise the model without its head")
    for module in quantized_layers(model):
        module.compute_dtype, module.compute_type_is_set = dtype, True
        # On some CPUs bitsandbytes repacks a weight at the first call in eval mode, in place, after which it has no gradient.
        module.support_avx512bf16_for_cpu = False


# ---------------------------------------------------------------- layers


def is_quantized(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' 4-bit layer; told by name, so that nobody has to import the library to ask."""
    return isinstance(module, nn.Linear) and type(module).__name__ == "Linear4bit"


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_quantized(module)]


def why_not_nf4(module: nn.Module) -> str | None:
    """Why `nf4_of` cannot describe a layer in 4 bits; None if it can, or if the layer is dense."""
    if not is_quantized(module):
        return None
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return "a 4-bit layer is not quantised yet"
    if state.quant_type != "nf4":
        return f"a 4-bit layer is {state.quant_type}"
    if state.nested and state.state2.blocksize != GROUP:
        return f"a 4-bit layer has groups of {state.state2.blocksize} blocks"
    return "a 4-bit layer is packed for inference on this CPU" if getattr(state, "packing_format_for_cpu", False) else None


def nf4_of(module: nn.Module) -> Nf4:
    """The weight of a 4-bit layer, to be made dense in the dtype that the layer computes in. A view: nothing is copied."""
    state = module.weight.quant_state
    nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (None, None, None)
    return Nf4(module.weight.data.view(torch.uint8), state.absmax, *nested, (module.out_features, module.in_features),
               module.compute_dtype or state.dtype, state.blocksize)


def weight_count(parameter: Tensor) -> int:
    """Weights in a parameter, of which two share a byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def bytes_per_weight(double_quant: bool) -> float:
    """0.516 with double quantisation, 0.5625 without."""
    return 0.5 + ((1 + 4 / GROUP) / BLOCK if double_quant else 4 / BLOCK)


def describe(model: nn.Module) -> dict[str, str]:
    """What a run says of its 4-bit base when it starts; nothing of a dense one."""
    weights = [nf4_of(layer) for layer in quantized_layers(model)]
    if not weights:
        return {}
    dense = sum(w.shape[0] * w.shape[1] * w.dtype.itemsize for w in weights)
    return {"4-bit base": f"{len(weights)} layers in NF4, {sum(w.nbytes for w in weights) / 1e6:,.2f} MB instead of {dense / 1e6:,.2f}, "
                          f"dequantised by {serving(weights[0].device, weights[0].dtype)}"}
