"""Compute the load-balancing loss, which keeps routers from sending most tokens to few experts.

    E · Σ_i f_i P_i

over the E experts, with f_i the number of times that a token chose expert i, divided by the tokens, and P_i the mean probability that
routers gave it; both over the tokens of a pack, without padding, and over all layers together. This is the loss of the Switch Transformer
(Fedus et al., arXiv 2101.03961, equations 4 to 6) for routers that choose several experts, as transformers computes it
(`load_balancing_loss_func`): where all are chosen alike it is the number of experts that a token chooses. f has no gradient.

A pack's loss counts by its share of the step's tokens. Unlike the other terms it depends on how a step is divided into packs, since f is
that of a pack; over more tokens it asks less of each sample (arXiv 2501.11873).

Logits are noted by hooks on the routers while a pack's forward runs, and not when a layer is computed again for the backward pass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.errors import UserError
from trainer.model.experts import expert_counts
from trainer.model.forward import unwrap_peft
from trainer.model.fused_layers import keep_all_rows
from trainer.model.packed_attention import decoder

ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # of transformers' function


@dataclass
class RouterBalance:
    """The routers of a model, their logits in the running pack, and the weight of the loss."""

    coefficient: float
    chosen: int  # experts that a token passes through
    function: Callable[..., Tensor]  # transformers' load_balancing_loss_func
    logits: dict[nn.Module, list[Tensor]] = field(default_factory=dict)  # by router: of the whole pack, or of one sample after another
    noting: bool = False

    @contextmanager
    def note(self) -> Iterator[None]:
        """Note the routers' logits inside this context."""
        self.logits, self.noting = {}, True
        try:
            yield
        finally:
            self.noting = False

    def hook(self, router: nn.Module, args: tuple, output: Tensor | tuple, *, index: int) -> None:
        """Note a router's logits, in a forward hook."""
        if self.noting:
            self.logits.setdefault(router, []).append(output[index] if isinstance(output, tuple) else output)

    def loss(self, tokens: int) -> Tensor:
        """Return the loss of the first `tokens` tokens of the noted pack; those after them are padding."""
        logits = tuple(torch.cat(noted).flatten(0, -2) for noted in self.logits.values())  # [T,E] of each router
        rows, experts = logits[0].shape
        real = torch.arange(rows, device=logits[0].device) < tokens  # the function counts under a mask without waiting for the device
        return self.function(logits, experts, self.chosen, real)

    def __str__(self) -> str:
        return f"routers: load-balancing loss, weighted by {self.coefficient:g}"


def prepare(coefficient: float, model: nn.Module) -> RouterBalance | None:
    """Put hooks on the model's routers, and return what they note; None for a coefficient of 0.

    Raises UserError for a model for which transformers has no such loss. Call it after `patch`: the last layer then computes every token.
    """
    if not coefficient:
        return None
    base = unwrap_peft(model)
    function, routers, counts = _loss_function(base), _routers(decoder(base)), expert_counts(base.config.get_text_config())
    if function is None or not routers or counts is None:
        raise UserError("router_aux_loss_coef: expected a mixture of experts for whose routers transformers has a load-balancing loss, got "
                        f"{base.config.get_text_config().model_type}; set it to 0")
    keep_all_rows(base)
    balance = RouterBalance(coefficient, round(counts.chosen), function)
    for router, index in routers:
        router.register_forward_hook(partial(balance.hook, index=index))
    return balance


def _loss_function(base: PreTrainedModel) -> Callable[..., Tensor] | None:
    """Return transformers' load-balancing loss of this model, if it takes what routers of one level give."""
    function = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    return function if function and list(inspect.signature(function).parameters) == ARGUMENTS else None


def _routers(part: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """Return each router, and the place of the logits in what it returns, as transformers records them."""
    recorded = (part._can_record_outputs or {}).get("router_logits", [])
    specs = recorded if isinstance(recorded, list) else [recorded]
    return [(module, spec.index) for name, module in part.named_modules() for spec in specs
            if isinstance(module, spec.target_class) and (spec.layer_name is None or f".{spec.layer_name}." in f".{name}.")]
