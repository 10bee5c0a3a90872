"""Print the model types whose layers vLLM knows by their names in a checkpoint's files alone, as a JSON list."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from vllm.model_executor.models.registry import _VLLM_MODELS

from benchmarks.families.examine import stock_class
from benchmarks.families.tiny_configs import tiny_config
from trainer.model.linear_layers import linear_layers
from trainer.model.packed_attention import decoder
from trainer.model.peft_targets import PREFIX, name_in_checkpoint


def main() -> None:
    found = []
    for family, architecture in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES).items():
        if to_vllm := names_map(architecture):
            try:
                with torch.device("meta"):
                    model = stock_class(family).from_config(tiny_config(family))
                if is_known_as_in_files_alone(model, to_vllm):
                    found.append(family)
            except (AttributeError, TypeError) as error:  # models of speech and sound around a text model, which training refuses
                print(f"{family}: {error}", file=sys.stderr)
    print(json.dumps(found))


def names_map(architecture: str) -> Callable[[str], str | None] | None:
    """Return vLLM's map from a checkpoint's names to its own, of a class that can be imported here and takes adapters, else None."""
    if architecture not in _VLLM_MODELS:
        return None
    module, name = _VLLM_MODELS[architecture][:2]
    try:
        found = getattr(importlib.import_module(module if module.startswith("vllm") else f"vllm.model_executor.models.{module}"), name)
    except ImportError as error:
        print(f"{architecture}: {error}", file=sys.stderr)
        return None
    if not getattr(found, "supports_lora", False):
        return None
    mapper = getattr(found, "hf_to_vllm_mapper", None)
    return mapper._map_name if mapper else str


def is_known_as_in_files_alone(model: PreTrainedModel, to_vllm: Callable[[str], str | None]) -> bool:
    """Return whether vLLM's map takes the decoder's layers elsewhere by their modules' names than by those in the files."""
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    weights = [names[id(layer)] for layer in decoder(model).modules() if layer in linear_layers(model).values()]
    in_files = [name_in_checkpoint(model, PREFIX + name).removeprefix(PREFIX) for name in weights]
    return any(to_vllm(a) != to_vllm(b) for a, b in zip(weights, in_files, strict=True))


if __name__ == "__main__":
    main()
