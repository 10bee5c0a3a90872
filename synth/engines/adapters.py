"""Find the adapter with which a model answers, apply it, and merge it where an engine cannot apply it.

An adapter is told by its content: another one at the same path gives other answers, and a pool of the first takes none of them.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from synth.config import Model
from synth.engines.interface import EngineError
from synth.engines.protocol import LoadRequest
from trainer import config as training
from trainer.errors import UserError
from trainer.model import lora, saved_adapter
from trainer.model.export import merge_and_save
from trainer.model.serving import why_vllm_refuses
from trainer.model.text_part import auto_class, keep_text_part
from trainer.model.vocabulary import fit_vocabulary


def find_adapter(model: Model) -> str | None:
    """Return the folder of a model's adapter, if it has one. Raises UserError where it is not there."""
    return None if model.adapter is None else str(saved_adapter.find_adapter("adapter", model.adapter))


def digest_of(model: Model) -> str | None:
    """Return a digest of the adapter's content, if the model has one."""
    folder = find_adapter(model)
    return None if folder is None else saved_adapter.adapter_digest(Path(folder))


def must_merge(kind: str, adapter: str | None) -> bool:
    """Return whether it is known before the start that this kind of engine cannot apply an adapter."""
    return kind == "vllm" and adapter is not None and why_vllm_refuses(saved_adapter.adapter_settings("adapter", Path(adapter))) is not None


def note_on(load: LoadRequest) -> tuple[str, ...]:
    """Return what there is to tell: that an adapter is merged, or names another base."""
    if load.adapter is None:
        return ()
    trained_on = saved_adapter.adapter_settings("adapter", Path(load.adapter)).get("base_model_name_or_path")
    other = trained_on and Path(trained_on).name != Path(load.model.path).name
    return ((f"the adapter was trained on {trained_on}, and is applied to {load.model.path}",) if other else ()) + (
        (f"{load.kind} cannot apply the adapter, so it is merged into a copy of the weights",) if load.merge else ())


def apply_adapter(model: PreTrainedModel, load: LoadRequest) -> PeftModel:
    """Put the adapter of a request on its model. Raises EngineError where it does not fit."""
    tokenizer = AutoTokenizer.from_pretrained(load.tokenizer, trust_remote_code=load.model.trust_remote_code)
    try:
        fit_vocabulary(model, tokenizer, training.Model(path=load.folder), load.adapter)
        return lora.add_adapter(model, training.Lora(path=load.adapter))
    except UserError as error:
        raise EngineError(f"{load.model.path}: {str(error).replace('lora.path', 'adapter')}") from error


def merged(load: LoadRequest) -> LoadRequest:
    """Return a request for the merged model, written to a temporary folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="merged-")
    config = AutoConfig.from_pretrained(load.folder, trust_remote_code=load.model.trust_remote_code)
    model = auto_class(config).from_pretrained(load.folder, dtype="auto", use_safetensors=True, device_map=torch.device("cpu"),
                                               trust_remote_code=load.model.trust_remote_code)
    keep_text_part(model)
    tokenizer = AutoTokenizer.from_pretrained(load.tokenizer, trust_remote_code=load.model.trust_remote_code)
    merge_and_save(apply_adapter(model, load), tokenizer, Path(folder) / "model")
    del model
    gc.collect()
    return load._replace(folder=str(Path(folder) / "model"), adapter=None)
