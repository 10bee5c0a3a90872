"""What holds a model to its base while it trains: a divergence from what the base predicts. Off unless `retention.kl_weight` is above 0.

    loss = Σ_i w_i ce_i / Σ_i w_i  +  kl · Σ_k w_k D_k / Σ_k w_k

over the supervised tokens i of a step, and the tokens k that `retention.kl_sources` and `kl_positions` count: of replay samples
or of all, those that are supervised or all but a sample's first. D_k is KL(base ‖ model), KL(model ‖ base) or their
Jensen-Shannon divergence in what is predicted for token k, in nats, so a weight means
the same for any model and length. Both sums of weights are known on the host before a
step runs: how it is divided into packs and ranks changes nothing. To keep a model's old answers by distilling them into it while it learns
is Learning without Forgetting (Li and Hoiem, arXiv 1606.09282).

The base is what training starts from. With an adapter it is the same weights with the adapter switched off, also where training goes on
from a saved adapter; full fine-tuning keeps a frozen second copy. It runs without gradients, on the counted samples of a pack alone,
and leaves one row of hidden states per counted token, which lives as long as the pack. Both heads and the divergence are one operation
(`kernels.linear_kl`), so logits never exist in full. With `retention.kl_reference: cached` it runs before the first step, and the rows come
from a file (`trainer/retention/cached_base.py`).
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
    """The model as it was before training, read without gradients and without dropout."""

    def __init__(self, model: nn.Module):
        """`model` has an adapter, or is not trained: `frozen_copy` makes one that is not."""
        self.model, self.layers, self.modules = model, adapted_layers(model), list(model.modules())

    @torch.no_grad()
    def hidden(self, batch: PackedBatch, rows: Tensor) -> Tensor:
        """Last hidden states [K, W] of a pack's tokens `rows` [K]."""
        training = self.model.training
        self._train(False)
        with adapters_disabled(self.layers):
            hidden = forward_hidden(self.model, batch, rows)
        self._train(training)
        return hidden

    def _train(self, mode: bool) -> None:
        """The model's own `train`, which takes 0.4 ms for 250 modules, once for each pack and back; this takes a tenth of it."""
        for module in self.modules:
            module.__dict__["training"] = mode


def frozen_copy(model: nn.Module) -> nn.Module:
    """A second copy that is never trained. UserError where the device has no room for it."""
    try:
        return copy.deepcopy(model).requires_grad_(False).eval()
    except torch.OutOfMemoryError:
        raise UserError("retention.kl_weight: expected room on the device for a second, frozen copy of the model, which full "
                        "fine-tuning needs, found too little; set retention.kl_reference to cached, train an adapter, whose base is "
                        "the model itself, or set retention.kl_weight to 0") from None


@dataclass(frozen=True)
class KlToBase:
    """What the loop asks about holding a run to its base. Sources are those of the run's samples."""

    settings: config.Retention
    base: FrozenBase | None  # None: no divergence is asked for
    kl_sources: np.ndarray  # bool[sources], those on whose samples the KL is computed
    dft_sources: np.ndarray  # bool[sources], those whose losses DFT weights by their own probability
    stored: Callable[[Sequence[int]], Tensor] | None = None  # the base's hidden states of these samples [K, W]; None: it runs in each step
    kept_head: LmHead | None = None  # the base's, where that of `base`'s model is trained

    def targets(self, samples: Samples, indices: np.ndarray) -> np.ndarray:
        """How many tokens of each of these samples the divergence counts: int64[n]."""
        return samples.supervised[indices] if self.among_supervised else samples.lengths[indices] - 1

    def collate(self, samples: Sequence[Piece]) -> PackedBatch:
        """Collate a pack with its DFT mask and its KL rows."""
        batch = collate(samples)
        if self.dft_sources.any():
            batch.dft_mask = torch.from_numpy(self.dft_sources[batch.source.numpy()[_sample_of(batch.supervised_rows.numpy(), batch)]])
        batch.kl = self._kl_rows(samples, batch)
        return batch

    def _kl_rows(self, samples: Sequence[Piece], batch: PackedBatch) -> KlRows | None:
        """Return the KL rows of a pack, with the pack of their samples for the base to read, or with its cached states."""
        tokens = self._kl_tokens(batch)
        if not len(tokens):
            return None
        rows = np.searchsorted(batch.supervised_rows.numpy(), tokens) if self.among_supervised else tokens
        weights = np.array([sample.weight for sample in samples], dtype=np.float32)[_sample_of(tokens, batch)]
        kl = KlRows(torch.from_numpy(rows), torch.from_numpy(weights))
        kl_samples = [sample for sample in samples if self.kl_sources[sample.source]]
        if self.stored:
            kl.cached_states = self.stored([sample.index for sample in kl_samples])
        else:
            kl.reference = collate(kl_samples)
            kl.reference_rows = torch.from_numpy(self._kl_tokens(kl.reference))
        return kl

    def _kl_tokens(self, batch: PackedBatch) -> np.ndarray:
        """Return the t of a pack at whose next token the KL is computed: int64[K]."""
        if self.among_supervised:
            rows = batch.supervised_rows.numpy()
        else:
            rows = np.delete(np.arange(batch.tokens), batch.cu_seqlens.numpy()[1:] - 1)  # nothing follows a sample's last token
        return rows[self.kl_sources[batch.source.numpy()[_sample_of(rows, batch)]]]

    def look_up(self, batch: PackedBatch, phases: Phases) -> Tensor | None:
        """Return the base's hidden states [K, W] at the KL rows; None where the pack has none."""
        if batch.kl is None:
            return None
        if batch.kl.cached_states is not None:
            return batch.kl.cached_states
        with phases("base"):
            return self.base.hidden(batch.kl.reference, batch.kl.reference_rows)

    @property
    def among_supervised(self) -> bool:
        """Whether every counted token is a supervised one."""
        return self.settings.kl_positions == "supervised"

    def hidden(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The last hidden states at the supervised rows [S, W], and at the counted ones [K, W]."""
        if self.among_supervised:
            hidden = at_rows = supervised_hidden(model, batch)
        else:
            hidden = forward_hidden(model, batch)
            at_rows = hidden.index_select(0, batch.supervised_rows)
        return at_rows, hidden.index_select(0, batch.kl.rows)

    def divergence(self, out: LmHead, hidden: Tensor, batch: PackedBatch, reference: Tensor) -> Tensor:
        """Sum of weight * divergence over the counted rows, whose hidden states are given [K, W]. A frozen head serves both sides."""
        theirs = self.kept_head or lm_head(self.base.model)
        other = (None, None) if theirs.weight is out.weight else (theirs.weight, theirs.bias)
        return linear_kl(
            hidden, out.weight, reference, other[0], divergence=DIVERGENCES[self.settings.kl_direction],
            bias=out.bias, bias_ref=other[1], token_weight=batch.kl.weights, softcap=out.softcap, logit_scale=out.logit_scale,
            reduction="sum")


def _sample_of(rows: np.ndarray, batch: PackedBatch) -> np.ndarray:
    """The samples that these tokens of a pack belong to."""
    return np.searchsorted(batch.cu_seqlens.numpy(), rows, side="right") - 1


def prepare(settings: config.Retention, model: nn.Module, roles: Sequence[str]) -> KlToBase | None:
    """What a run over sources of these roles needs for its options, before anything is trained; None where they ask for nothing."""
    kl, dft = settings.kl_weight > 0, settings.token_weighting == "dft"
    if not kl and not dft:
        return None
    stored, adapter = settings.caches_base, isinstance(model, PeftModel)
    base = FrozenBase(model if stored or adapter else frozen_copy(model)) if kl else None
    kept_head = _copied(lm_head(model)) if stored and not adapter else None
    nowhere = np.zeros(len(roles), dtype=bool)
    return KlToBase(settings, base, chosen(roles, settings.kl_sources) if kl else nowhere,
                     chosen(roles, settings.token_weighting_sources) if dft else nowhere, kept_head=kept_head)


def _copied(out: LmHead) -> LmHead:
    return out._replace(weight=out.weight.detach().clone(), bias=None if out.bias is None else out.bias.detach().clone())


def _where(settings: config.Retention) -> str:
    return f"{settings.kl_sources} rows" + (", prompts and all" if settings.kl_positions == "all" else "")


def chosen(roles: Sequence[str], on: str) -> np.ndarray:
    """bool[sources]: those of the role `on`, or all."""
    return np.array([on in (role, "all") for role in roles], dtype=bool)


def describe(settings: config.Retention, adapter: str, copy_bytes: float) -> list[str]:
    """What a run says of these options when it starts; nothing where they are off. A second copy of the model takes `copy_bytes`."""
    lines = []
    if settings.kl_weight > 0:
        name = {"forward": "KL(base || model)", "reverse": "KL(model || base)", "js": "Jensen-Shannon divergence from the base"}
        where = f"a frozen second copy of the model, {copy_bytes / 1e9:.3g} GB" if adapter == "full" else \
            "the model with its adapter switched off"
        where = "read once and kept on disk" if settings.caches_base else where
        lines.append(f"retention: {settings.kl_weight:g} {name[settings.kl_direction]} on {_where(settings)}; the base is {where}")
    if settings.token_weighting != "none":
        lines.append(f"retention: tokens of {settings.token_weighting_sources} rows weighted by {settings.token_weighting.upper()}")
    if settings.l2_sp > 0:
        lines.append(f"retention: weights decay by lr * {settings.l2_sp:g} a step towards where they began")
    return lines
