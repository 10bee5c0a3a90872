"""Run the base once and cache its last hidden states on disk, for the KL.

This is `retention.kl_reference: cached`. With `live` the base runs in every step: with an adapter that is another forward pass over the KL
samples, with full fine-tuning a second copy of the model on the device too. The base's states of a sample never change, so `cached` runs it
once, before the first step, and each pack reads its rows while the step before it runs. Of the base only the head stays: an adapter leaves
the model's own untrained, full fine-tuning keeps a copy of it. The KL is computed by the same operation (`kernels.linear_kl`) and is equal
but for rounding, as the base has read each sample in another pack.

    bytes = KL tokens of the samples that the run sees x W x bytes of an element        W = 4096 in bf16: 8,192 a token

The 64 largest log-probabilities of a token with their ids would take 384 bytes, and leave out the rest of the vocabulary; hidden states
are exact. `python -m benchmarks.run options` times a step with either. The pass before the first step saves nothing where each
sample is seen once; the gain is then the memory of full fine-tuning.

The file is in the run folder, named after all that decides what the run computes, and is removed when the run has finished. It is written
atomically, with a checksum: a resumed run finds it whole, or makes it again, before it loads its checkpoint, while the model is still the
base. Ranks write their packs' rows into one file. Its pages are memory-mapped: the system drops them when it needs the memory, yet on a
CPU they count as the process's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer import config
from trainer.checksums import verify_checksum, write_checksum
from trainer.data.batch import batches
from trainer.data.packing import pack
from trainer.data.samples import Samples
from trainer.data.step_plan import StepPlan
from trainer.errors import UserError
from trainer.files import publish_file
from trainer.model.forward import lm_head
from trainer.retention.kl import KlToBase
from trainer.runtime.distributed import Distributed


@dataclass(frozen=True)
class CachedRows:
    """The place of each sample's rows in the file: `counts[i]` rows from row `first[i]`, in token order."""

    counts: np.ndarray  # int64[samples], 0 where the sample has no KL tokens, or the run does not see it
    width: int
    dtype: torch.dtype

    @property
    def first(self) -> np.ndarray:
        """Return the first row of each sample: int64[samples]."""
        return np.cumsum(self.counts) - self.counts

    @property
    def total(self) -> int:
        """Return the number of rows."""
        return int(self.counts.sum())

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return self.width * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Return the bytes of all rows."""
        return self.total * self.row_bytes

    @property
    def file_bytes(self) -> int:
        """Return the size of the file, which is never empty, as an empty file cannot be mapped."""
        return max(self.bytes, self.row_bytes)


def size_line(folder: Path, rows: CachedRows) -> str:
    """Return the console line of the file's size. Raises UserError where the disk has less room."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if rows.bytes > free:
        raise UserError(f"retention.kl_reference: expected {_size(rows.bytes)} of free disk space in {folder} for the base's hidden "
                        f"states at {rows.total:,} tokens, found {_size(free)}; choose another --output, count fewer tokens, or set "
                        "retention.kl_reference to live")
    return (f"retention: the base's hidden states at {rows.total:,} tokens take {_size(rows.bytes)} in {folder} "
            f"({rows.row_bytes:,} bytes a token; {_size(free)} are free)")


def cached_rows(kl: KlToBase, samples: Samples, plan: StepPlan, dtype: torch.dtype) -> CachedRows:
    """Return the rows of the samples that the plan sees, of elements of this dtype."""
    seen, counts = plan.seen(), np.zeros(len(samples), dtype=np.int64)
    indices = seen[kl.kl_sources[samples.sources[seen]]]
    counts[indices] = kl.num_tokens(samples, indices)
    return CachedRows(counts, lm_head(kl.base.model).weight.shape[1], dtype)


def with_cached_base(kl: KlToBase, samples: Samples, plan: StepPlan, folder: Path, identity: dict, device: torch.device,
                     dist: Distributed) -> KlToBase:
    """Return `kl` with cached states, read from this run's file in `folder` or computed now.

    The model must not be trained yet. `identity` is all that decides what the run computes. Raises UserError where the file cannot be
    written.
    """
    rows = cached_rows(kl, samples, plan, lm_head(kl.base.model).weight.dtype)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path, tmp, start = folder / f"base-states-{key}.bin", folder / f"base-states-{key}.partial", time.perf_counter()
    found = any(dist.gather(int(dist.is_main and _is_whole(path, rows))))
    if not found:
        dist.on_main(lambda: _allocate(tmp, rows))
        error = _write(tmp, rows, _base_states(kl, samples, rows, plan.batch_size, device, dist))
        if any(dist.gather(int(error is not None))):  # every rank learns of it, so every rank stops
            dist.on_main(lambda: _remove(tmp))
            raise UserError(_refusal(tmp, error.strerror if error else "another rank could not"))
        dist.on_main(lambda: _publish(tmp, path))
    if dist.is_main:
        print(f"retention: the base's hidden states are those in {path}" if found else
              f"retention: the base read {np.count_nonzero(rows.counts):,} samples in {time.perf_counter() - start:.1f} s", flush=True)
    return replace(kl, cached_states=row_reader(path, rows))


def row_reader(path: Path, rows: CachedRows) -> Callable[[Sequence[int]], Tensor]:
    """Return a function from samples to their rows [K, W] in the file, one sample after the other."""
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r")).reshape(-1, rows.row_bytes)  # read-only: it may be larger than the memory
    first, counts = rows.first, rows.counts

    def read(indices: Sequence[int]) -> Tensor:
        states = np.concatenate([mapped[first[i] : first[i] + counts[i]] for i in indices])
        return torch.from_numpy(states).view(rows.dtype)

    return read


def remove_cache(folder: Path) -> None:
    """Remove the files that runs in this folder cached."""
    for path in folder.glob("base-states-*"):
        path.unlink()


def _allocate(tmp: Path, rows: CachedRows) -> None:
    """Make an empty file, with its space on the disk allocated where the system can do so."""
    try:
        tmp.parent.mkdir(parents=True, exist_ok=True)
        remove_cache(tmp.parent)
        print(size_line(tmp.parent, rows), flush=True)
        with open(tmp, "wb") as file:
            file.truncate(rows.file_bytes)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, rows.file_bytes)
    except OSError as error:
        _remove(tmp)
        raise UserError(_refusal(tmp, error.strerror)) from None


def _base_states(kl: KlToBase, samples: Samples, rows: CachedRows, batch_size: config.BatchSize, device: torch.device,
                 dist: Distributed) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Run the base on this rank's packs; yield the samples of each pack and their KL rows [K, W].

    Samples without KL rows are in no pack.
    """
    indices = np.flatnonzero(rows.counts)
    packs = pack(samples.lengths[indices], batch_size.tokens_per_pack, batch_size.max_samples_per_pack, seed=0)
    for members in packs[dist.rank :: dist.size]:
        batch, = batches(samples, [indices[members]], device, kl.collate)
        yield indices[members], kl.base.hidden(batch.kl.reference, batch.kl.reference_rows).to("cpu", rows.dtype)


def _write(tmp: Path, rows: CachedRows, states_of_packs: Iterable[tuple[np.ndarray, Tensor]]) -> OSError | None:
    """Write the rows of samples to their places; return the disk's error, if any."""
    first = rows.first
    try:
        with open(tmp, "r+b") as file:
            for indices, states in states_of_packs:
                for i, own in zip(indices, states.split(rows.counts[indices].tolist()), strict=True):
                    file.seek(int(first[i]) * rows.row_bytes)
                    file.write(own.contiguous().view(torch.uint8).numpy())
    except OSError as error:
        return error
    return None


def _publish(tmp: Path, path: Path) -> None:
    try:
        publish_file(tmp, path)
        write_checksum(path)
    except OSError as error:
        raise UserError(_refusal(path, error.strerror)) from None


def _is_whole(path: Path, rows: CachedRows) -> bool:
    """Return whether an earlier start of the run left the file, whole.

    Where it is damaged, that is said.
    """
    try:
        if not path.exists() or path.stat().st_size != rows.file_bytes:
            return False
        verify_checksum(path)
    except (OSError, ValueError) as error:
        print(f"retention: {path} is made anew: {error}", flush=True)
        return False
    return True


def _remove(tmp: Path) -> None:
    with contextlib.suppress(OSError):
        tmp.unlink()


def _refusal(tmp: Path, reason: str) -> str:
    return f"retention.kl_reference: cannot write {tmp}: {reason}; choose another --output, or set retention.kl_reference to live"


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
