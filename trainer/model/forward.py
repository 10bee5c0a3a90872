"""Run a model on a pack up to its last hidden states, and describe its head.

The head and the loss are ours (`kernels.linear_cross_entropy`), so a model's own forward is called only up to its last norm.

Shapes: T tokens of a pack, S selected rows, W model width, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.data.batch import NO_PADDING, PackedBatch, PadTo
from trainer.errors import UserError
from trainer.model.mixers import runs_by_sample
from trainer.model.pack_context import Branches, checkpoint_contexts, pack_of, run_pack
from trainer.model.packed_attention import is_packed, last_hidden_states
from trainer.model.text_part import head_layer
from trainer.model.vocabulary import without_wrapper

CPU_16BIT_PADDING = PadTo(tokens=64, rows=32)


class LmHead(NamedTuple):
    """Head of a model: logits = cap(logit_scale (hidden weight' + bias)).

    cap(z) = softcap tanh(z / softcap) if softcap is set, else z.
    """

    weight: Tensor  # [V, W]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden [..., W] in fp32 or better.

        All of them are in memory at once: for a few tokens, not for training.
        """
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside PEFT's wrapper, if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lm_head(model: nn.Module) -> LmHead:
    """Return the model's head: Granite divides its logits, Cohere multiplies them, Gemma 2 caps them.

    Raises ValueError for a head that is no plain linear layer.
    """
    base = unwrap_peft(model)
    layer = head_layer(base)  # PEFT's wrapper, if it trains, whose weight has the trained rows
    plain = without_wrapper(layer)
    if type(plain) is not nn.Linear:
        raise ValueError(f"head: expected a plain linear layer, got {type(plain).__name__}")
    config = base.config.get_text_config()
    factors = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier", "output_multiplier")]
    divisors = [getattr(config, name, None) or 1.0 for name in ("logits_scaling", "logits_mup_width_multiplier")]
    if config.model_type == "hyperclovax":  # multiplies by what Granite divides by
        factors, divisors = [config.logits_scaling], []
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")]
    bias = getattr(layer, "bias", plain.bias)
    return LmHead(layer.weight, bias, next(filter(None, caps), None), math.prod(factors) / math.prod(divisors))


def forward_hidden(model: nn.Module, batch: PackedBatch, rows: Tensor | None = None, branches: Branches | None = None) -> Tensor:
    """Return the last hidden states [T,W] of a pack, in which each token sees only its own sample.

    If `rows` [S] is given, return those of these tokens only [S,W]. Families with our layers then skip the other tokens after the last
    layer's attention. `branches` are for models that `can_branch`.
    """
    base = unwrap_peft(model)
    if not is_packed(base):
        hidden = _one_sample_at_a_time(base, batch)
        return hidden if rows is None else hidden.index_select(0, rows)
    pack = pack_of(batch.cu_seqlens, batch.max_seqlen, rows, branches)
    with run_pack(pack):
        hidden = last_hidden_states(base, batch.input_ids[None], batch.position_ids[None]).squeeze(0)
    return hidden if rows is None or pack.rows_are_selected else hidden.index_select(0, rows)


def can_branch(model: nn.Module) -> bool:
    """Return whether attention alone mixes the tokens of a sample.

    Then samples that begin alike may have these tokens in common in a pack.
    """
    base = unwrap_peft(model)
    return is_packed(base) and not any(map(runs_by_sample, base.modules()))


def _one_sample_at_a_time(base: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Return the last hidden states [T,W] of a pack whose samples run through the model one by one."""
    lengths = batch.cu_seqlens.diff().tolist()
    samples = zip(batch.input_ids[None].split(lengths, dim=1), batch.position_ids[None].split(lengths, dim=1), strict=True)
    return torch.cat([last_hidden_states(base, *sample).squeeze(0) for sample in samples])


def padding_for(model: nn.Module) -> PadTo:
    """Return the padding of packs for this model.

    In 16 bits oneDNN compiles each matmul for every new shape on a CPU, so few shapes are worth their padding. Models that run one
    sample at a time gain nothing from it.
    """
    base = unwrap_peft(model)
    return CPU_16BIT_PADDING if base.device.type == "cpu" and base.dtype.itemsize == 2 and is_packed(base) else NO_PADDING


def supervised_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return the last hidden states [S,W] of the supervised rows, which are all that the loss needs."""
    return forward_hidden(model, batch, batch.supervised_rows)


def apply_activation_checkpointing(model: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Recompute every layer (full) or every second one (selective) in the backward pass.

    Only the inputs of these layers are saved. It takes effect while the model is in training mode. Raises UserError if the model's layers
    do not support it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if mode != "none" and not layers:
        raise UserError(f"activation_checkpointing: {unwrap_peft(model).config.model_type} has no layers that support it; use none")
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = mode == "full" or (mode == "selective" and i % 2 == 0)
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts)
