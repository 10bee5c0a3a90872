"""Export a trained model: PEFT's adapter folder, or transformers' model folder.

A folder is written atomically, with safetensors weights.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize
from transformers.pytorch_utils import Conv1D
from transformers.utils import CHAT_TEMPLATE_FILE, GENERATION_CONFIG_NAME, PROCESSOR_NAME

from kernels.nf4 import dequantize_nf4
from trainer.errors import UserError
from trainer.files import atomic_folder
from trainer.json_files import read_object
from trainer.model.checkpoint_rest import add_rest, base_file, rest_names
from trainer.model.linear_layers import base_modules, base_name
from trainer.model.locate import one_line_errors
from trainer.model.lora import adapted_weights, projection, why_not_fused
from trainer.model.peft_targets import make_loadable, targets_as_given
from trainer.model.quantization import is_quantized, nf4_of, quantized_layers
from trainer.model.vocabulary import with_trained_rows


def save_adapter(model: PeftModel, folder: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write an adapter folder that PEFT and vLLM load, with the tokenizer.

    The adapter names its base model as it was loaded: an absolute path, or a hub name.
    """
    with atomic_folder(folder) as tmp:
        if getattr(model, "adapter_start", None) is None:
            model.save_pretrained(tmp, save_embedding_layers=False)  # rows and modules that train are saved in any case
        else:
            _save_change(model, tmp)
        make_loadable(model.get_base_model(), tmp)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp)


def _save_change(model: PeftModel, folder: Path) -> None:
    """Save what training changed of an adapter that started from the base's weights, by PEFT's conversion.

    The base in memory lacks that start, the base that others load does not: B A - B0 A0 is an adapter of twice the rank on it.
    """
    with TemporaryDirectory(dir=folder) as work:
        start = Path(work) / "start"
        start.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in model.adapter_start.items()}, start / SAFETENSORS_WEIGHTS_NAME)
        with targets_as_given():
            model.save_pretrained(folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=str(start))


def merge_and_save(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write a model folder for transformers, with the adapter, if any, merged into the weights.

    It holds every tensor of the base's files (`add_rest`).

    The model in memory does not change. Merged weights are on the CPU while they are written. A 4-bit base is written dense, in the dtype
    it computes in: the adapter was trained on its dequantised weights, and is added to those. Raises UserError, and leaves no folder, if
    the adapter cannot be merged or transformers would not find every weight in what was written.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    state = merged_state(base)
    dense = _dense_on_meta(base) if quantized_layers(base) else base
    names = list(state)  # which saving empties
    with atomic_folder(folder) as tmp:
        save_weights(dense, tmp, state)
        _check_loads(dense, tmp, _stock_state(base), _headers(tmp))
        add_rest(tmp, base, names)
        save_generation_config(base, tmp)
        tokenizer.save_pretrained(tmp)
        _drop_processor_template(tmp)


def _drop_processor_template(folder: Path) -> None:
    """Remove the chat template from the settings of a processor, where it would win over the tokenizer's."""
    file = folder / PROCESSOR_NAME
    if file.is_file() and (folder / CHAT_TEMPLATE_FILE).is_file():
        settings = read_object("model.path", file)
        settings.pop("chat_template", None)
        file.write_text(json.dumps(settings, indent=2) + "\n")


def save_weights(model: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    """Write weights and config of a model as transformers does.

    Settings of generation, which it would check, are left out.
    """
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = settings
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)


def save_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Copy the base's settings of generation as they stand, valid or not.

    Of a base without such a file, write the model's.
    """
    if found := base_file(model, GENERATION_CONFIG_NAME):
        shutil.copyfile(found, folder / GENERATION_CONFIG_NAME)
    elif model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)


def save_settings(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, whole: bool) -> None:
    """Write all of an export but its weights, to see that it can be written.

    Of a `whole` model, write its config too, and check that transformers would find its weights by the names they will have. Raises
    UserError, or what libraries raise.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            adapter.save_pretrained(folder)
        model.create_or_update_model_card(str(folder))
    if whole:
        dense, shapes = _dense_on_meta(base) if quantized_layers(base) else base, _merged_shapes(base)
        dense.config.save_pretrained(folder)
        rest_names(base, shapes)  # refuses what may not be copied
        save_generation_config(base, folder)
        _check_loads(dense, folder, _stock_state(base), revert_weight_conversion(dense, shapes))
    tokenizer.save_pretrained(folder)


def _dense_on_meta(base: PreTrainedModel) -> PreTrainedModel:
    """Return the dense form of a 4-bit model on the meta device, to save its merged weights with."""
    config = copy.deepcopy(base.config)
    del config.quantization_config
    with torch.device("meta"):
        dense = type(base)(config).to(nf4_of(quantized_layers(base)[0]).dtype)
    conversions = getattr(base, "_weight_conversions", None)
    if conversions is not None:  # reading a checkpoint in 4 bits is one of them, which has no way back
        conversions = [entry for entry in conversions if Bnb4bitDeserialize not in map(type, getattr(entry, "operations", ()))]
    dense.generation_config, dense._weight_conversions = base.generation_config, conversions
    return dense


def _stock_state(base: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `base` without adapters, under stock names."""
    return with_trained_rows(base, {base_name(name): tensor for name, tensor in base.state_dict().items() if ".lora_" not in name})


def _merged_shapes(base: PreTrainedModel) -> dict[str, Tensor]:
    """Return what `merged_state` does, on the meta device."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in _stock_state(base).items()}
    for name, module in base_modules(base).items():
        if is_quantized(module):
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.weight.")}
            state[f"{name}.weight"] = torch.empty(nf4_of(module).shape, dtype=nf4_of(module).dtype, device="meta")
    return _as_in_the_base(base, state)


def _headers(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's files on the meta device."""
    headers = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            headers |= {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in opened.keys()}
    return headers


def _check_loads(saved: PreTrainedModel, folder: Path, expected: Iterable[str], headers: dict[str, Tensor]) -> None:
    """Check that transformers, loading tensors as the class of `saved`, finds the weights `expected`.

    It reads the config in `folder`, names and shapes, and undoes the layout of the checkpoint as loading does. Raises UserError.
    """
    config = type(saved).config_class.from_pretrained(folder)
    with one_line_errors("export", folder):
        _, found = type(saved).from_pretrained(None, config=config, state_dict=headers, device_map="meta", output_loading_info=True,
                                               ignore_mismatched_sizes=True)
    unfit = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])} & set(expected))
    if unfit:
        raise UserError(f"export: transformers would not find {len(unfit)} weights in the model as it was written, such as {unfit[0]}; "
                        "use --export.format adapter")


@torch.no_grad()
def merged_state(base: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `base` with adapters merged into dense weights, under stock names."""
    state = _stock_state(base)
    for name, module in base_modules(base).items():
        if is_quantized(module):
            for quant_state_key in [key for key in state if key.startswith(f"{name}.weight.")]:
                del state[quant_state_key]
            state[f"{name}.weight"] = dequantize_nf4(nf4_of(module)).cpu()
    for name, layer in adapted_weights(base).items():
        state[name] = _merged_nf4(layer) if is_quantized(layer.get_base_layer()) else _merged_weight(layer, name.rpartition(".")[2])
    return _as_in_the_base(base, state)


def _as_in_the_base(base: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transpose weights that were quantised from layers which hold them so (GPT-2's Conv1D)."""
    for name, module in base_modules(base).items():
        if is_quantized(module) and getattr(module, "source_cls", None) is Conv1D:
            state[f"{name}.weight"] = state[f"{name}.weight"].t().contiguous()
    return state


def _merged_weight(layer: LoraLayer, name: str) -> Tensor:
    """Return the weight of this name with the layer's active adapter merged by PEFT, and restore it.

    PEFT's safe merge makes a new tensor, so putting the old one back undoes it.
    """
    weight = getattr(layer.get_base_layer(), name)
    original = weight.data
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:  # the weights are not finite
        raise UserError(f"cannot merge the adapter: {error}") from error
    merged, weight.data = weight.data.cpu(), original
    layer.merged_adapters.clear()
    return merged


def _merged_nf4(module: nn.Module) -> Tensor:
    """Return a 4-bit layer's dequantised weight with its adapter merged, in fp32 and rounded once.

    PEFT would quantise the sum again.
    """
    if reason := why_not_fused(module):
        raise UserError(f"cannot merge the adapter: {reason}")
    weight, _, lora = projection(module)
    merged = dequantize_nf4(weight, torch.float32) + lora.scaling * (lora.B.float() @ lora.A.float())
    if lora.magnitude is not None:
        merged *= (lora.magnitude.float() / merged.norm(dim=1))[:, None]
    if not merged.isfinite().all():
        raise UserError("cannot merge the adapter: its weights are not finite")
    return merged.to(weight.dtype).cpu()
