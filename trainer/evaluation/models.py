"""Which models are scored, and how they get into memory: one at a time, the base first.

An adapter's base is the same model with the adapter switched off. Another base is loaded, measured and forgotten before the model is.
"""

from __future__ import annotations

import gc
import json
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


@dataclass
class LoadedModel:
    """One of the two models of a comparison, ready to be scored."""

    name: Literal["base", "model"]
    label: str  # what reports call it
    model: nn.Module
    template: ChatTemplate

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, as its configuration says."""
        return getattr(unwrap_peft(self.model).config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class EvaluatedModels:
    """What is loaded."""

    model: training.Model
    adapter: Path | None
    base: training.Model | None  # another model, loaded before
    switched: bool  # the base is the model with its adapter off

    @property
    def compared(self) -> bool:
        return self.switched or self.base is not None


def find_models(config: Config) -> EvaluatedModels:
    """The models that the options name, checked as far as no weights are needed. UserError says what is missing or does not fit."""
    folder = None if config.adapter is None else Path(config.adapter).expanduser()
    settings = config.model if folder is None else _adapter_base(config, folder)
    base = None
    if config.base.path is not None:
        base = replace(settings, path=config.base.path, tokenizer=config.base.tokenizer)
        with _option("base.", "model."):
            model_source(base)
    model_source(settings)
    return EvaluatedModels(settings, folder, base, switched=folder is not None and base is None)


def _adapter_base(config: Config, folder: Path) -> training.Model:
    """The model that the adapter is put on. UserError where the adapter says it was made for another one."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"adapter: expected a folder with adapter_config.json, found none in {folder}")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        named = saved.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"adapter: cannot read {file}: {error}") from None
    if config.model.path is None:
        if not named:
            raise UserError(f"adapter: {file} names no base; set model.path")
        return replace(config.model, path=named)
    if named and not config.force_base and _resolved(named) != _resolved(config.model.path):
        raise UserError(f"adapter: {folder} was trained on {named}, not on model.path = {config.model.path}; leave model.path out, or, "
                        "where that is a copy of it, add --force_base true")
    return config.model


def _resolved(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


@contextmanager
def _option(ours: str, theirs: str = "model") -> Iterator[None]:
    """Names the option of this command in an error of code that knows it by another name: model.path becomes base.path."""
    try:
        yield
    except UserError as error:
        option, _, rest = str(error).partition(":")
        raise UserError(f"{option.replace(theirs, ours)}:{rest}" if option.startswith(theirs) else str(error)) from None


def parts(found: EvaluatedModels) -> list[tuple[Literal["base", "model"], training.Model, Path | None]]:
    """Name, model and adapter of each side, the base first."""
    before = found.base or (found.model if found.switched else None)
    return [*([("base", before, None)] if before else []), ("model", found.model, found.adapter)]


def load_each(found: EvaluatedModels, config: Config, device: torch.device) -> Iterator[LoadedModel]:
    """The base, if there is one to compare with, and then the model; each is valid until the next is asked for."""
    if found.base is not None:
        with _option("base.", "model."):
            side = LoadedModel("base", found.base.path, load(found.base, None, config, device), template_of(found.base, config))
        yield side
        side.model = None  # whoever holds the side holds no weights
        _free(device)
    model = load(found.model, found.adapter, config, device)
    template = template_of(found.model, config)
    if found.switched:
        with lora.adapters_disabled(lora.adapted_layers(model)):
            yield LoadedModel("base", found.model.path, model, template)
    yield LoadedModel("model", str(found.adapter or found.model.path), model, template)


def template_of(settings: training.Model, config: Config) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(settings), read_template(config.data.chat_template), config.data.chat_template)


def load(settings: training.Model, adapter: Path | None, config: Config, device: torch.device) -> nn.Module:
    """The model, patched, frozen and in evaluation mode, with its adapter. UserError says what is missing or unfit."""
    kind = "qlora" if config.load_in_4bit or _quantized(settings) else "full"
    run = training.Config(model=settings, method=kind, precision=config.precision)
    quantization.require_bitsandbytes(run)
    model, _ = load_model(run, device)
    if adapter is not None:
        with _option("adapter", "lora.path"):
            model = lora.add_adapter(model, training.Lora(path=str(adapter)))
    report = patch(model, settings.fused_kernels)
    with _option("load_in_4bit", "method qlora"):
        refuse_misread_layers(lora.unfused_layers(model, settings.fused_kernels))
    print(report, flush=True)
    return model.requires_grad_(False).eval()


def _quantized(settings: training.Model) -> bool:
    """Whether the checkpoint itself is quantised; if it is NF4, it stays as it is."""
    source = model_source(settings)
    with one_line_errors("model.path", source):
        found = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    return getattr(found, "quantization_config", None) is not None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
