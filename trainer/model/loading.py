"""The model and its tokenizer: loaded, run on packs up to its last hidden state, and described at its head.

The head and the loss are ours (`kernels.linear_cross_entropy`), so the model's own forward is called only up to the last norm.

Shapes: T tokens of a pack, n samples in it, W model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer import config
from trainer.data.packing import UNFILLED, Batch, Multiples
from trainer.errors import UserError
from trainer.model import quantization
from trainer.model.families import PatchReport, family_of, last_at_rows, patch
from trainer.model.locate import load_tokenizer, one_line, source_of
from trainer.model.packed_attention import PACKED, decoder, fault_in_packing, is_packed, refuse_mask

__all__ = ["HeadSpec", "PatchReport", "apply_activation_checkpointing", "bare", "compute_dtype", "fast_bf16", "forward_hidden", "head",
           "load_model", "load_tokenizer", "multiples_for", "outline", "patch", "supervised_hidden", "use_packed_attention"]
logger = logging.getLogger(__name__)
FEW_SHAPES = Multiples(tokens=64, rows=32)


# ---------------------------------------------------------------- loading


def load_model(cfg: config.Config, device: torch.device | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of `cfg.model` in the compute dtype on `device`, or make it with random weights drawn with `cfg.seed`.

    Weights have the compute dtype. With bf16, fp32 masters that are made from them start at the rounded values, which matters only for
    full fine-tuning of a checkpoint that is itself fp32; precision fp32 keeps every bit. A QLoRA base has its linear layers in 4 bits.
    UserError says what is missing or unfit.
    """
    device = torch.device(device)
    dtype, source = compute_dtype(cfg.precision, device), source_of(cfg.model)
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


def outline(cfg: config.Config) -> PreTrainedModel:
    """The model of `cfg.model` with shapes but no memory (on the meta device), after the checks that need no weights."""
    source = source_of(cfg.model)
    if cfg.model.path is not None:
        _quantized_settings(cfg, source, torch.float32)
    model = _without_weights(cfg.model, source, torch.float32, torch.device("meta"))
    _check_vocabulary(model, load_tokenizer(cfg.model))
    return model


def compute_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def fast_bf16() -> bool:
    """Whether the CPU has bf16 products: without them bf16 is emulated, and slow."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantized_settings(cfg: config.Config, source: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How from_pretrained is to quantise the model: not at all, unless it is for QLoRA and dense as yet. UserError where it cannot be."""
    with one_line("model.path", source):
        found = AutoConfig.from_pretrained(source, trust_remote_code=cfg.model.trust_remote_code)
    if quantization.check_checkpoint(source, found, cfg.adapter) or cfg.adapter != "qlora":
        return None
    return quantization.loading_settings(cfg.quantization, _without_weights(cfg.model, source, dtype, torch.device("meta")), dtype)


def _load_weights(cfg: config.Config, source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    quantized = _quantized_settings(cfg, source, dtype)
    with one_line("model.path", source):
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
    quantization.prepare(model, dtype)
    return model


def _without_weights(settings: config.Model, source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model that a config describes, with weights from the random generator (or none, on the meta device)."""
    trust = settings.trust_remote_code
    with one_line("model.path" if settings.path else "model.config", source), torch.device(device):
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
        if fault := fault_in_packing(model):
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
    error = float((head(model).logits(hidden) - expected).norm() / expected.norm())
    if not error < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise UserError(f"model: the head of {model.config.model_type} is not a linear layer with a scale or soft cap that we know "
                        f"(logits differ by {error:.0%}); train another model")


# ---------------------------------------------------------------- running


class HeadSpec(NamedTuple):
    """logits = cap(logit_scale (hidden weight' + bias)), with cap(z) = softcap tanh(z / softcap) where softcap is set."""

    weight: Tensor  # [V, W]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., W] -> logits [..., V] in fp32 or better, all of them at once: for a few tokens, not for training."""
        raw = nn.functional.linear(hidden, self.weight, self.bias)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32)) * self.logit_scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without PEFT's wrapper around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head(model: nn.Module) -> HeadSpec:
    """What turns the last hidden state into logits: Granite divides them, Cohere multiplies them, Gemma 2 caps them."""
    base = bare(model)
    settings, layer = base.config.get_text_config(), base.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise ValueError(f"head: expected a plain linear layer, got {type(layer).__name__}")
    scale = (getattr(settings, "logit_scale", None) or 1.0) / (getattr(settings, "logits_scaling", None) or 1.0)
    return HeadSpec(layer.weight, layer.bias, getattr(settings, "final_logit_softcapping", None), scale)


def forward_hidden(model: nn.Module, batch: Batch, rows: Tensor | None = None) -> Tensor:
    """The last hidden state [T,W] of a pack's tokens, each seeing only its own sample; or that of the tokens `rows` alone [S,W].

    Nothing reads what follows the last layer's attention at other tokens, so families with our layers do not compute it.
    """
    base = bare(model)
    if rows is not None and not (is_packed(base) and last_at_rows(base)):
        return forward_hidden(model, batch).index_select(0, rows)
    ids, positions = batch.input_ids[None], batch.position_ids[None]
    run = partial(decoder(base), use_cache=False)
    if is_packed(base):
        few = {} if rows is None else {"rows": rows}
        packed = run(input_ids=ids, position_ids=positions, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, **few)
        return packed.last_hidden_state.squeeze(0)
    lengths = batch.cu_seqlens.diff().tolist()
    samples = zip(ids.split(lengths, dim=1), positions.split(lengths, dim=1), strict=True)
    return torch.cat([run(input_ids=i, position_ids=p).last_hidden_state.squeeze(0) for i, p in samples])


def multiples_for(model: nn.Module) -> Multiples:
    """What packs for this model are filled up to. In 16 bits a CPU compiles each product anew for every shape it meets, for a tenth of a
    millisecond and more: few shapes are worth the rows that fill them. Models that run one sample at a time gain nothing."""
    base = bare(model)
    return FEW_SHAPES if base.device.type == "cpu" and base.dtype.itemsize == 2 and is_packed(base) else UNFILLED


def supervised_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden state [S,W] of the pack's supervised rows, which are all that a head needs."""
    return forward_hidden(model, batch, batch.supervised_rows)


def apply_activation_checkpointing(model: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Keep only the inputs of every layer (full), or of every second layer (selective), and compute the rest again in the backward pass.

    Works while the model is in training mode. UserError if the model's layers do not support it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if mode != "none" and not layers:
        raise UserError(f"activation_checkpointing: {bare(model).config.model_type} has no layers that support it; use none")
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = mode == "full" or (mode == "selective" and i % 2 == 0)
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
