"""Find the models of an evaluation and load them, one at a time, the base first.

The base of an adapter is the same model with the adapter off. Another base is loaded, scored and freed before the model is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig

from trainer import config as training
from trainer.data.chat_template import ChatTemplate, read_template
from trainer.errors import UserError
from trainer.evaluation.config import Config
from trainer.model import lora, quantization
from trainer.model.bitsandbytes_cpu_check import refuse_misread_layers
from trainer.model.forward import unwrap_peft
from trainer.model.loading import load_model
from trainer.model.locate import load_tokenizer, model_source, one_line_errors
from trainer.model.patch import patch
from trainer.model.saved_adapter import adapter_settings, adapter_tokenizer, find_adapter


@dataclass
class LoadedModel:
    """One of the two models of a comparison, ready to be scored."""

    name: Literal["base", "model"]
    label: str  # its name in reports
    model: nn.Module
    template: ChatTemplate

    @property
    def context(self) -> int | None:
        """Return the longest input, in tokens, of the model's configuration; None if it names none."""
        return getattr(unwrap_peft(self.model).config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class EvaluatedModels:
    """The model to score and the base to compare it with, not loaded yet."""

    model: training.Model
    adapter: Path | None
    base: training.Model | None  # a model of its own, loaded before the other
    base_is_adapter_off: bool  # the base is the model with its adapter off

    @property
    def compared(self) -> bool:
        return self.base_is_adapter_off or self.base is not None


def find_models(config: Config) -> EvaluatedModels:
    """Return the models that the options name, checked without loading weights.

    Raises UserError if a model is missing, or the adapter was trained on another one.
    """
    folder = None if config.adapter is None else find_adapter("adapter", config.adapter)
    model_options = config.model if folder is None else _adapter_base(config, folder)
    base = None
    if config.base.path is not None:
        base = replace(model_options, path=config.base.path, tokenizer=config.base.tokenizer)
        with _rename_option("base.", "model."):
            model_source(base)
    model_source(model_options)
    return EvaluatedModels(model_options, folder, base, base_is_adapter_off=folder is not None and base is None)


def _adapter_base(config: Config, folder: Path) -> training.Model:
    """Return the model under the adapter, with the tokenizer and chat template that it was trained with.

    Raises UserError if the adapter was trained on another one.
    """
    saved_base = adapter_settings("adapter", folder).get("base_model_name_or_path")
    tokenizer = config.model.tokenizer or adapter_tokenizer(folder)
    if config.model.path is None:
        if not saved_base:
            raise UserError(f"adapter: {folder / 'adapter_config.json'} names no base; set model.path")
        return replace(config.model, path=saved_base, tokenizer=tokenizer)
    if saved_base and not config.force_base and absolute_name(saved_base) != absolute_name(model_source(config.model)):
        raise UserError(f"adapter: {folder} was trained on {saved_base}, not on model.path = {config.model.path}; leave out model.path, "
                        "or, if that is a copy of it, add --force_base true")
    return replace(config.model, tokenizer=tokenizer)


def absolute_name(name: str) -> str:
    """Return a hub name as it stands, and a folder by its absolute path."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


@contextmanager
def _rename_option(ours: str, theirs: str = "model") -> Iterator[None]:
    """Name an option as this command does in the errors of shared code: model.path becomes base.path."""
    try:
        yield
    except UserError as error:
        option, _, rest = str(error).partition(":")
        raise UserError(f"{option.replace(theirs, ours)}:{rest}" if option.startswith(theirs) else str(error)) from None


def models_to_load(models: EvaluatedModels) -> list[tuple[Literal["base", "model"], training.Model, Path | None]]:
    """Return name, model and adapter of the models to score, the base first."""
    base = models.base or (models.model if models.base_is_adapter_off else None)
    return [*([("base", base, None)] if base else []), ("model", models.model, models.adapter)]


def load_each(models: EvaluatedModels, config: Config, device: torch.device) -> Iterator[LoadedModel]:
    """Yield the base, if there is one, then the model; each is valid until the next is loaded."""
    if models.base is not None:
        with _rename_option("base.", "model."):
            loaded = LoadedModel("base", models.base.path, load(models.base, None, config, device), template_of(models.base, config))
        yield loaded
        loaded.model = None  # so that the caller's variable does not keep the weights
        _free_memory(device)
    model = load(models.model, models.adapter, config, device)
    template = template_of(models.model, config)
    if models.base_is_adapter_off:
        with lora.adapters_disabled(lora.adapted_layers(model)):
            yield LoadedModel("base", models.model.path, model, template)
    yield LoadedModel("model", str(models.adapter or models.model.path), model, template)


def template_of(model_options: training.Model, config: Config) -> ChatTemplate:
    template = ChatTemplate(load_tokenizer(model_options), read_template(config.data.chat_template), config.data.chat_template,
                            keywords=config.data.template_kwargs)
    template.check_keywords()
    return template


def load(model_options: training.Model, adapter: Path | None, config: Config, device: torch.device) -> nn.Module:
    """Load a model with its adapter, patched, frozen and in evaluation mode.

    Raises UserError if model or adapter are missing or do not fit.
    """
    method = "qlora" if config.load_in_4bit or _quantized(model_options) else "full"
    run = training.Config(model=model_options, method=method, precision=config.precision,
                          lora=training.Lora(path=None if adapter is None else str(adapter)))
    quantization.require_bitsandbytes(run)
    model, _ = load_model(run, device)
    if adapter is not None:
        with _rename_option("adapter", "lora.path"):
            model = lora.add_adapter(model, run.lora)
    report = patch(model, model_options.fused_kernels)
    with _rename_option("load_in_4bit", "method qlora"):
        refuse_misread_layers(lora.unfused_layers(model, model_options.fused_kernels))
    print(report, flush=True)
    return model.requires_grad_(False).eval()


def _quantized(model_options: training.Model) -> bool:
    """Return whether the checkpoint itself is quantised; if it is NF4, it stays as it is."""
    source = model_source(model_options)
    with one_line_errors("model.path", source):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=model_options.trust_remote_code)
    return getattr(model_config, "quantization_config", None) is not None


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
