"""Compute the KL between the model and its base, the term that keeps a trained model near it.

    objective = Σ_i w_i ce_i / Σ_i w_i  +  kl_weight · Σ_k w_k D_k / Σ_k w_k

with `retention.kl_weight`, over the supervised tokens i of a step and the tokens k that `retention.kl_sources` and `kl_positions` choose:
of replay samples, domain samples or all, the supervised ones or all but a sample's first. D_k is KL(base ‖ model), KL(model ‖ base) or
their Jensen-Shannon divergence in the prediction of token k, in nats, so a weight means the same for any model and length. Both sums
of weights are known on the host before a step runs, so the division of a step into packs and ranks changes nothing. Distilling a
model's old answers into it while it learns is Learning without Forgetting (Li and Hoiem, arXiv 1606.09282). With `kl_mask_target` the
token that the cross entropy teaches is left out of both distributions and the rest renormalised (Xu et al., arXiv 2605.29498), so that
the term keeps the order of the alternatives and does not pull against what is learnt; at prompt tokens, which teach nothing, none is
left out. With `kl_only` the KL's samples are in the second sum alone: answers that the model drew itself have nothing to teach it, but
the base's predictions at each of their tokens have. On domain samples beside `token_weighting: dft`, the forward KL at a weight of 0.05
to 0.1 is Anchored Supervised Fine-Tuning (ASFT, arXiv 2509.23753).

The base is the model as training starts. With an adapter it is the same weights with the adapter switched off, also where training
continues a saved adapter; full fine-tuning keeps a frozen second copy. It runs without gradients, on the KL samples of a pack alone, and
gives one row of hidden states per KL token, which lives as long as the pack. Both heads and the divergence are one operation
(`kernels.linear_kl`), so logits never exist in full. With `retention.kl_reference: cached` the base runs before the first step, and the
rows are read from a file (trainer/retention/cached_base.py).

Shapes: T tokens of a pack, S supervised rows, K KL rows, W model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from kernels import linear_kl
from trainer import config
from trainer.data.batch import KlRows, PackedBatch, collate
from trainer.data.samples import Piece, Samples
from trainer.errors import UserError
from trainer.metrics.timers import Phases
from trainer.model.forward import LmHead, forward_hidden, lm_head, supervised_hidden
from trainer.model.lora import adapted_layers, adapters_disabled

DIVERGENCES = {"forward": "forward", "reverse": "reverse", "js": "jensen_shannon"}  # ours -> the kernel's


class FrozenBase:
    """The model as it was before training, run without gradients and without dropout."""

    def __init__(self, model: nn.Module):
        """`model` has an adapter, which is switched off, or is never trained, as one of `frozen_copy`."""
        self.model, self.adapted_layers, self.modules = model, adapted_layers(model), list(model.modules())

    @torch.no_grad()
    def hidden(self, batch: PackedBatch, rows: Tensor) -> Tensor:
        """Return the last hidden states [K, W] of a pack's tokens `rows` [K]."""
        training = self.model.training
        self._set_training(False)
        with adapters_disabled(self.adapted_layers):
            hidden = forward_hidden(self.model, batch, rows)
        self._set_training(training)
        return hidden

    def head(self) -> LmHead:
        """Return the base's head, which the model's own is too unless it trains."""
        with adapters_disabled(self.adapted_layers):
            return lm_head(self.model)

    def _set_training(self, mode: bool) -> None:
        """Do what `model.train(mode)` does, ten times as fast: it runs twice for each pack."""
        for module in self.modules:
            module.__dict__["training"] = mode


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy that is never trained. Raises UserError where the device has no room for it."""
    try:
        return copy.deepcopy(model).requires_grad_(False).eval()
    except torch.OutOfMemoryError:
        raise UserError("retention.kl_weight: expected room on the device for a second, frozen copy of the model, which full "
                        "fine-tuning needs, found too little; set retention.kl_reference to cached, train an adapter, whose base is "
                        "the model itself, or set retention.kl_weight to 0") from None


@dataclass(frozen=True)
class KlToBase:
    """The KL to the base and the mask of DFT or EAFT: which rows of a pack they are on, and the KL itself."""

    options: config.Retention
    base: FrozenBase | None  # None: the run has no KL
    kl_sources: np.ndarray  # bool[sources], those on whose samples the KL is computed
    weighted_sources: np.ndarray  # bool[sources], those whose losses DFT or EAFT weights by the model's prediction
    cached_states: Callable[[Sequence[int]], Tensor] | None = None  # samples -> the base's hidden states [K, W]; None: the base runs live
    base_head: LmHead | None = None  # a copy, where the head of the model of `base` is trained
    base_reads: Callable[[Piece], Piece] | None = None  # what the base reads in place of a sample: its supervised tokens after other ones
    in_step: bool = False  # the base runs for every pack, since weights are sharded and other ranks may have KL rows

    @property
    def on_supervised(self) -> bool:
        """Return whether every KL token is a supervised one."""
        return self.options.kl_positions == "supervised"

    def num_tokens(self, samples: Samples, indices: np.ndarray) -> np.ndarray:
        """Return the number of KL tokens of each of these samples: int64[n]."""
        return samples.supervised[indices] if self.on_supervised else samples.lengths[indices] - 1

    def taught(self, samples: Samples, indices: np.ndarray) -> np.ndarray:
        """Return those of these samples whose supervised tokens have a loss: int64[m]."""
        return indices[~self.kl_sources[samples.sources[indices]]] if self.options.kl_only else indices

    # ------------------------------------------------------------ on the host: the rows of a pack

    def collate(self, samples: Sequence[Piece]) -> PackedBatch:
        """Collate a pack with its DFT or EAFT mask and its KL rows."""
        batch = collate(samples)
        if self.options.kl_only:
            untaught = self.kl_sources[batch.source.numpy()[_sample_of(batch.supervised_rows.numpy(), batch)]]
            batch.weights[torch.from_numpy(untaught)] = 0.0
            batch.weight_sum = float(batch.weights.sum(dtype=torch.float64))
        if self.weighted_sources.any():
            sources = batch.source.numpy()[_sample_of(batch.supervised_rows.numpy(), batch)]
            mask = torch.from_numpy(self.weighted_sources[sources])
            batch.dft_mask, batch.eaft_mask = (mask, None) if self.options.token_weighting == "dft" else (None, mask)
        batch.kl = self._kl_rows(samples, batch)
        return batch

    def _kl_rows(self, samples: Sequence[Piece], batch: PackedBatch) -> KlRows | None:
        """Return the KL rows of a pack, with the pack that the base reads, or with its cached states."""
        tokens = self._kl_tokens(batch)
        if not len(tokens):
            return None
        rows = np.searchsorted(batch.supervised_rows.numpy(), tokens) if self.on_supervised else tokens
        weights = np.array([sample.weight for sample in samples], dtype=np.float32)[_sample_of(tokens, batch)]
        kl = KlRows(torch.from_numpy(rows), torch.from_numpy(weights))
        if self.options.kl_mask_target:
            targets = torch.full((batch.tokens,), -1)
            targets[batch.supervised_rows] = batch.targets
            kl.targets = targets[tokens]
        kl_samples = [sample for sample in samples if self.kl_sources[sample.source]]
        if self.cached_states:
            kl.cached_states = self.cached_states([sample.index for sample in kl_samples])
        else:
            kl.reference = collate([self.base_reads(sample) for sample in kl_samples] if self.base_reads else kl_samples)
            kl.reference_rows = torch.from_numpy(self._kl_tokens(kl.reference))
        return kl

    def _kl_tokens(self, batch: PackedBatch) -> np.ndarray:
        """Return the t of a pack at whose next token the KL is computed: int64[K]."""
        if self.on_supervised:
            rows = batch.supervised_rows.numpy()
        else:
            rows = np.delete(np.arange(batch.tokens), batch.cu_seqlens.numpy()[1:] - 1)  # nothing follows a sample's last token
        return rows[self.kl_sources[batch.source.numpy()[_sample_of(rows, batch)]]]

    # ------------------------------------------------------------ on the device: the KL of a pack

    def reference(self, batch: PackedBatch, phases: Phases) -> Tensor | None:
        """Return the base's hidden states [K, W] at the KL rows; None where the pack has no such rows.

        They are computed now, or read from the cache.
        """
        if batch.kl is None:
            if self.in_step:
                self.base.hidden(batch, batch.supervised_rows[:1])
            return None
        if batch.kl.cached_states is not None:
            return batch.kl.cached_states
        with phases("base"):
            return self.base.hidden(batch.kl.reference, batch.kl.reference_rows)

    def hidden_and_kl(self, model: nn.Module, batch: PackedBatch, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model; return its hidden states at the supervised rows [S, W], and the weighted KL sum.

        The sum is of weight * KL over the KL rows. `reference` [K, W] is the base's hidden states at the KL rows.
        """
        if self.on_supervised:
            hidden = supervised = supervised_hidden(model, batch)
        else:
            hidden = forward_hidden(model, batch)
            supervised = hidden.index_select(0, batch.supervised_rows)
        head, base_head = lm_head(model), self.base_head or self.base.head()
        base_weight, base_bias = (None, None) if base_head.weight is head.weight else (base_head.weight, base_head.bias)
        kl = linear_kl(
            hidden.index_select(0, batch.kl.rows), head.weight, reference, base_weight, divergence=DIVERGENCES[self.options.kl_direction],
            bias=head.bias, bias_ref=base_bias, token_weight=batch.kl.weights, masked_target=batch.kl.targets, softcap=head.softcap,
            logit_scale=head.logit_scale, reduction="sum")
        return supervised, kl


def _sample_of(rows: np.ndarray, batch: PackedBatch) -> np.ndarray:
    """Return the sample that each of these tokens of a pack belongs to."""
    return np.searchsorted(batch.cu_seqlens.numpy(), rows, side="right") - 1


def prepare(options: config.Retention, model: nn.Module, roles: Sequence[str], in_step: bool = False) -> KlToBase | None:
    """Return the KL, and the mask of DFT or EAFT, of a run over sources of these roles; None without both.

    `model` must not be trained yet. With `in_step` the base runs for every pack of a step that has KL rows.
    """
    has_kl, has_mask = options.kl_weight > 0, options.token_weighting in ("dft", "eaft")
    if not has_kl and not has_mask:
        return None
    cached, has_adapter = options.caches_base, isinstance(model, PeftModel)
    base = FrozenBase(model if cached or has_adapter else frozen_copy(model)) if has_kl else None
    base_head = _copy_head(lm_head(model)) if cached and not has_adapter else None
    no_source = np.zeros(len(roles), dtype=bool)
    return KlToBase(options, base, sources_of(roles, options.kl_sources) if has_kl else no_source,
                    sources_of(roles, options.token_weighting_sources) if has_mask else no_source, base_head=base_head,
                    in_step=in_step)


def _copy_head(head: LmHead) -> LmHead:
    return head._replace(weight=head.weight.detach().clone(), bias=None if head.bias is None else head.bias.detach().clone())


def sources_of(roles: Sequence[str], role: str) -> np.ndarray:
    """Return bool[sources]: those of this role, or every one for `all`."""
    return np.array([role in (own, "all") for own in roles], dtype=bool)


def describe(options: config.Retention, method: str, copy_bytes: float) -> list[str]:
    """Return the console lines of these options, none where they are off.

    A second copy of the model takes `copy_bytes`.
    """
    lines = []
    if options.kl_weight > 0:
        names = {"forward": "KL(base || model)", "reverse": "KL(model || base)", "js": "Jensen-Shannon divergence from the base"}
        positions = " samples, prompts too" if options.kl_positions == "all" else " samples"
        positions += ", their targets masked" if options.kl_mask_target else ""
        positions += ", which have no other loss" if options.kl_only else ""
        base = f"a frozen second copy of the model, {copy_bytes / 1e9:.3g} GB" if method == "full" else "the model without its adapter"
        base = "run once, its hidden states cached on disk" if options.caches_base else base
        lines.append(f"retention: {options.kl_weight:g} * {names[options.kl_direction]} on {options.kl_sources}{positions}; base: {base}")
    if options.token_weighting != "none":
        lines.append(f"retention: tokens of {options.token_weighting_sources} samples weighted by {options.token_weighting.upper()}")
    if options.l2_sp > 0:
        lines.append(f"retention: L2-SP: weights decay by lr * {options.l2_sp:g} a step towards their start")
    return lines
