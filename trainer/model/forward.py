"""Run the model on a pack up to its last hidden states, and describe its head."""

from __future__ import annotations

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
from trainer.model.fused_layers import row_selecting_layer
from trainer.model.packed_attention import decoder, is_packed

FEW_SHAPES = PadTo(tokens=64, rows=32)


class LmHead(NamedTuple):
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


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model, without PEFT's wrapper around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lm_head(model: nn.Module) -> LmHead:
    """What turns the last hidden state into logits: Granite divides them, Cohere multiplies them, Gemma 2 caps them."""
    base = unwrap_peft(model)
    settings, layer = base.config.get_text_config(), base.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise ValueError(f"head: expected a plain linear layer, got {type(layer).__name__}")
    scale = (getattr(settings, "logit_scale", None) or 1.0) / (getattr(settings, "logits_scaling", None) or 1.0)
    return LmHead(layer.weight, layer.bias, getattr(settings, "final_logit_softcapping", None), scale)


def forward_hidden(model: nn.Module, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
    """The last hidden state [T,W] of a pack's tokens, each seeing only its own sample; or that of the tokens `rows` alone [S,W].

    Nothing reads what follows the last layer's attention at other tokens, so families with our layers do not compute it.
    """
    base = unwrap_peft(model)
    if rows is not None and not (is_packed(base) and row_selecting_layer(base)):
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


def padding_for(model: nn.Module) -> PadTo:
    """What packs for this model are filled up to. In 16 bits a CPU compiles each product anew for every shape it meets, for a tenth of a
    millisecond and more: few shapes are worth the rows that fill them. Models that run one sample at a time gain nothing."""
    base = unwrap_peft(model)
    return FEW_SHAPES if base.device.type == "cpu" and base.dtype.itemsize == 2 and is_packed(base) else NO_PADDING


def supervised_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The last hidden state [S,W] of the pack's supervised rows, which are all that a head needs."""
    return forward_hidden(model, batch, batch.supervised_rows)


def apply_activation_checkpointing(model: nn.Module, mode: Literal["none", "selective", "full"]) -> None:
    """Keep only the inputs of every layer (full), or of every second layer (selective), and compute the rest again in the backward pass.

    Works while the model is in training mode. UserError if the model's layers do not support it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if mode != "none" and not layers:
        raise UserError(f"activation_checkpointing: {unwrap_peft(model).config.model_type} has no layers that support it; use none")
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = mode == "full" or (mode == "selective" and i % 2 == 0)
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
