"""The model and its tokenizer: loaded, run on packs up to its last hidden state, and described at its head.

The head and the loss are ours (`kernels.linear_cross_entropy`), so the model's own forward is called only up to the last norm.

Shapes: T tokens of a pack, n samples in it, W model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer import config
from trainer.errors import UserError
from trainer.model import quantization
from trainer.model.families import family_of
from trainer.model.forward import lm_head
from trainer.model.locate import load_tokenizer, model_source, one_line_errors
from trainer.model.packed_attention import PACKED, decoder, packing_fault, refuse_mask
from trainer.runtime.device import compute_dtype

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- loading


def load_model(cfg: config.Config, device: torch.device | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of `cfg.model` in the compute dtype on `device`, or make it with random weights drawn with `cfg.seed`.

    Weights have the compute dtype. With bf16, fp32 masters that are made from them start at the rounded values, which matters only for
    full fine-tuning of a checkpoint that is itself fp32; precision fp32 keeps every bit. A QLoRA base has its linear layers in 4 bits.
    UserError says what is missing or unfit.
    """
    device = torch.device(device)
    dtype, source = compute_dtype(cfg.precision, device), model_source(cfg.model)
    tokenizer = load_tokenizer(cfg.model)
    if cfg.model.path is not None:
        model = _load_weights(cfg, source, dtype, device)
    else:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(cfg.seed)
            model = _without_weights(cfg.model, source, dtype, device)
    _check_vocabulary(model, tokenizer)
    use_packed_attention(model)
    return model, tokenizer


def meta_model(cfg: config.Config) -> PreTrainedModel:
    """The model of `cfg.model` with shapes but no memory (on the meta device), after the checks that need no weights."""
    source = model_source(cfg.model)
    if cfg.model.path is not None:
        _quantized_settings(cfg, source, torch.float32)
    model = _without_weights(cfg.model, source, torch.float32, torch.device("meta"))
    _check_vocabulary(model, load_tokenizer(cfg.model))
    return model


def weights_fingerprint(settings: config.Model) -> str | None:
    """What tells one set of base weights from another without reading them: names, sizes and times of a folder's files, or the
    hub's commit. None for random weights, which the seed decides."""
    if settings.path is None:
        return None
    folder = Path(settings.path).expanduser()
    if not folder.is_dir():
        return getattr(AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code), "_commit_hash", None)
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()[:16]


def _quantized_settings(cfg: config.Config, source: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How from_pretrained is to quantise the model: not at all, unless it is for QLoRA and dense as yet. UserError where it cannot be."""
    with one_line_errors("model.path", source):
        found = AutoConfig.from_pretrained(source, trust_remote_code=cfg.model.trust_remote_code)
    if quantization.is_nf4_checkpoint(source, found, cfg.method) or cfg.method != "qlora":
        return None
    return quantization.nf4_config(cfg.quantization, _without_weights(cfg.model, source, dtype, torch.device("meta")), dtype)


def _load_weights(cfg: config.Config, source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    quantized = _quantized_settings(cfg, source, dtype)
    with one_line_errors("model.path", source):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=device if device.type == "cuda" else None, use_safetensors=True,
            trust_remote_code=cfg.model.trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True,
            **({} if quantized is None else {"quantization_config": quantized}))
    if unfit := sorted(info["mismatched_keys"]):
        name, found, expected = unfit[0]
        raise UserError(f"model.path: {len(unfit)} weights in {source} do not fit its config.json: expected {tuple(expected)} for {name}, "
                        f"found {tuple(found)}")
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model.path: {source} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    quantization.prepare_quantized(model, dtype)
    return model


def _without_weights(settings: config.Model, source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model that a config describes, with weights from the random generator (or none, on the meta device)."""
    trust = settings.trust_remote_code
    with one_line_errors("model.path" if settings.path else "model.config", source), torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, trust_remote_code=trust), dtype=dtype,
                                                trust_remote_code=trust)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"model.tokenizer: expected at most {rows} tokens, the rows of the model's embedding, found {len(tokenizer)}; "
                        "use the model's own tokenizer, or a config with a larger vocab_size")


def use_packed_attention(model: PreTrainedModel) -> None:
    """Run packs in one call; a family that we have not read has to show first that its samples stay apart."""
    if family_of(model) is None:
        _check_head(model)
        if fault := packing_fault(model):
            logger.warning("%s cannot run packed, its samples go through the model one at a time: %s", model.config.model_type, fault)
            return
    model.set_attn_implementation(PACKED)
    decoder(model).register_forward_pre_hook(refuse_mask, with_kwargs=True)


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """UserError unless `head` describes how the model makes logits of its last hidden state."""
    ids = torch.arange(8, device=model.device)[None]
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, use_cache=False).logits.float()
    error = float((lm_head(model).logits(hidden) - expected).norm() / expected.norm())
    if not error < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise UserError(f"model: the head of {model.config.model_type} is not a linear layer with a scale or soft cap that we know "
                        f"(logits differ by {error:.0%}); train another model")


# ---------------------------------------------------------------- running


