"""Measure the losses of the domain's samples under the base once, for `data.curriculum: loss`.

They are in a small file of the run folder, named after all that decides what the run computes, with a checksum, and are removed when the
run has finished. A resumed run reads the file. Where it is damaged, the base measures again, and a checkpoint of another order is refused:
on a GPU rounding may differ from run to run, on a CPU it does not.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.checksums import verify_checksum, write_checksum
from trainer.config import BatchSize
from trainer.data.samples import Samples
from trainer.errors import UserError
from trainer.files import atomic_file
from trainer.retention.token_weighting import base_log_probs, mean_losses
from trainer.runtime.distributed import Distributed


def base_losses(samples: Samples, is_domain: np.ndarray, model: nn.Module, batch_size: BatchSize, folder: Path, identity: dict,
                device: torch.device, dist: Distributed) -> np.ndarray:
    """Return the mean loss of each sample under the base: float64[n], in nats per supervised token.

    It is 0 for those not `is_domain`. `model` must not be trained yet. `identity` is all that decides what the run computes. Raises
    UserError where the file cannot be written.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path, start = folder / f"base-losses-{key}.npy", time.perf_counter()
    losses = dist.gather(_read(path, len(samples)) if dist.is_main else None)[0]
    found = losses is not None
    if not found:
        indices = np.flatnonzero(is_domain)
        losses = np.zeros(len(samples))
        losses[indices] = mean_losses(base_log_probs(model, samples, indices, batch_size, device, dist), samples.supervised[indices])
        dist.on_main(lambda: _write(path, losses))
    if dist.is_main:
        low, middle, high = np.percentile(losses[is_domain], [10, 50, 90])
        cost = f"read from {path}" if found else f"the base read {is_domain.sum():,} samples in {time.perf_counter() - start:.1f} s"
        print(f"curriculum: losses under the base {low:.2f} to {high:.2f} (10% to 90%), median {middle:.2f}; {cost}", flush=True)
    return losses


def order_fingerprint(losses: np.ndarray) -> str:
    """Return a hash of the order that these losses give to the samples."""
    return hashlib.sha256(np.argsort(losses, kind="stable").tobytes()).hexdigest()[:16]


def remove_base_losses(folder: Path) -> None:
    """Remove the files that runs in this folder wrote."""
    for path in folder.glob("base-losses-*"):
        path.unlink()


def _read(path: Path, count: int) -> np.ndarray | None:
    """Return the losses of an earlier start of the run, or None; where they are damaged, that is said."""
    if not path.exists():
        return None
    try:
        verify_checksum(path)
        losses = np.load(path)
        if losses.shape != (count,):
            raise ValueError(f"expected losses of {count:,} samples, got the shape {losses.shape}")
    except (OSError, ValueError) as error:
        print(f"curriculum: {path} is made anew: {error}", flush=True)
        return None
    return losses


def _write(path: Path, losses: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_base_losses(path.parent)
        with atomic_file(path) as tmp, open(tmp, "wb") as file:
            np.save(file, losses)
        write_checksum(path)
    except OSError as error:
        raise UserError(f"data.curriculum: cannot write {path}: {error.strerror}; choose another --output, or set data.curriculum to "
                        "length") from None
