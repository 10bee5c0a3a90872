"""Choose the dtype in which a model of `dtype: auto` computes on a CPU, and say what is given up."""

from __future__ import annotations

import torch

from synth.config import Model
from trainer.runtime.device import fast_bf16

GIVEN_UP = ("computes in bfloat16, which this CPU multiplies faster than float32, so that results may depend on the batch; "
            "batch_invariant true keeps float32")


def cpu_dtype(model: Model, stored: torch.dtype | None) -> str:
    """Return the dtype of a model whose weights are stored as `stored`.

    `auto` is bfloat16 where the CPU multiplies it faster, no weights of 32 bits would be rounded, and nobody asked for batch invariance.
    """
    if model.dtype != "auto":
        return model.dtype
    return "bfloat16" if fast_bf16() and stored in (torch.bfloat16, torch.float16) and not model.batch_invariant else "float32"


def notes_on_dtype(model: Model, computed: str) -> tuple[str, ...]:
    """Return the line about what `dtype: auto` gave up on a CPU; none where it gave up nothing."""
    return (GIVEN_UP,) if model.dtype == "auto" and computed == "bfloat16" else ()
