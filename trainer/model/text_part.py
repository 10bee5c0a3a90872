"""Find the text model in a checkpoint that also reads images or sound, and drop all the rest.

Gemma 3, Mistral Small, Qwen3.5 and others wrap a text decoder and a tower in one class, `...ForConditionalGeneration`. The checkpoint's own
class is loaded, so that adapters and weights keep its names, by which servers apply them.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from trainer.errors import UserError


def auto_class(found: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForMultimodalLM]:
    """Return the auto class that builds a checkpoint's own class.

    Configs of some types, such as Qwen3.5's, serve a wrapped checkpoint and a text model's: their `architectures` decide.
    """
    wraps_text = found.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    text_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(found.model_type)
    return AutoModelForMultimodalLM if wraps_text and text_class not in (found.architectures or ()) else AutoModelForCausalLM


def is_wrapped(model: PreTrainedModel) -> bool:
    """Return whether the model's class wraps a text model with a config of its own."""
    return model.config.get_text_config() is not model.config


def head_layer(model: PreTrainedModel) -> nn.Module:
    """Return the layer that computes logits; some wrappers leave it to their text model."""
    head = model.get_output_embeddings()
    if head is None and (part := model.get_decoder()) is not model:
        head = part.get_output_embeddings()
    if head is None:
        raise UserError(f"model: {type(model).__name__} has no head that computes logits; train a model that generates text")
    return head


class DroppedTower(nn.Module):
    """Stand in for a tower that is not in memory.

    A wrapper's forward may ask for its device and dtype.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.device, self.dtype = device, dtype


def keep_text_part(model: PreTrainedModel) -> None:
    """Drop the towers for images and sound, and what connects them to the text decoder.

    Other models stay as they are. Raises UserError for a text decoder that reads an encoder.
    """
    for embedding in _embeddings_of_towers(model):
        _drop(model.get_submodule(embedding.rpartition(".")[0]), embedding.rpartition(".")[2])
    if not is_wrapped(model):
        return
    if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
        raise UserError(f"model: expected a decoder alone, but {type(model).__name__} reads its text with an encoder; train another model")
    text = {module for part in (model.get_decoder(), head_layer(model), model.get_input_embeddings()) for module in part.modules()}
    _drop_others(model, text)


def dropped_towers(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules that `keep_text_part` dropped."""
    return [name for name, module in model.named_modules() if isinstance(module, DroppedTower)]


def describe(model: PreTrainedModel) -> dict[str, str]:
    """Return the startup report of a model without its towers as {name: text}; empty for others."""
    dropped = ", ".join(dropped_towers(model))
    return {"text part": f"of {type(model).__name__}; not in memory, and left as they are: {dropped}"} if dropped else {}


def _embeddings_of_towers(model: PreTrainedModel) -> list[str]:
    """Return the names of modules that hold a tower inside a decoder, as in Phi-4-multimodal."""
    configs = [config for name in ("vision_config", "audio_config") if (config := getattr(model.config, name, None)) is not None]
    towers = [name for name, module in model.named_modules() if isinstance(module, PreTrainedModel) and module.config in configs]
    return [] if is_wrapped(model) else [name.rpartition(".")[0] for name in towers]


def _drop_others(parent: nn.Module, text: set[nn.Module]) -> None:
    """Drop the parameters of `parent`, and its children that have weights but no module of `text`."""
    for name in parent._parameters:
        setattr(parent, name, None)
    for name, child in list(parent.named_children()):
        if text.isdisjoint(child.modules()):
            _drop(parent, name)
        elif child not in text:
            _drop_others(child, text)


def _drop(parent: nn.Module, name: str) -> None:
    """Drop a child of `parent` if it has weights."""
    if (weight := next(getattr(parent, name).parameters(), None)) is not None:
        setattr(parent, name, DroppedTower(weight.device, weight.dtype))
