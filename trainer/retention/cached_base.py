"""Run the base once and cache its last hidden states on disk for the KL (`retention.kl_reference: cached`).

With `live` the base runs in every step: with an adapter that is another forward over the counted samples, with full fine-tuning a second
copy of the model on the device too. What it says of a sample never changes, so `stored` runs it once, before the first step, and each pack
reads its rows while the step before it runs. Of the base only the head stays: an adapter leaves the model's own untrained, full
fine-tuning keeps a copy of it. The same operation then makes the divergence (`kernels.linear_kl`), so it is equal but for rounding: the
base has read each sample in other company.

    bytes = counted tokens of the samples that the run sees x W x bytes of an element        W = 4096 in bf16: 8,192 a token

The 64 largest log-probabilities of a token with their ids would take 384, and leave out the rest of the vocabulary; hidden states are
exact. A step then costs 1.42 times one without divergence, where a live base makes it 1.76 (`python -m benchmarks.run options`: a Llama of
7 million parameters and a vocabulary of 8,192, LoRA, all rows counted; what is left is the divergence's own products with the head). The
pass before it is no saving where each sample is seen once; there the gain is full fine-tuning's memory.

The file lies in the run folder, named after all that decides what the run computes, and goes when the run has finished. It is written aside
and renamed, so it is whole or absent: a resumed run finds it, or makes it again, and does so before it loads its checkpoint, while the
model is still the base. Ranks write their packs' rows into one file. Its pages are memory-mapped: the system drops them when it wants
the memory, yet on a CPU they count in what the process is said to hold.
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
class Layout:
    """Where each sample's rows lie in the file: `counts[i]` of them from row `first[i]`, in the order of its tokens."""

    counts: np.ndarray  # int64[samples], 0 where the run counts no token of the sample
    width: int
    dtype: torch.dtype

    @property
    def first(self) -> np.ndarray:
        return np.cumsum(self.counts) - self.counts

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def file_bytes(self) -> int:
        return max(self.bytes, self.row_bytes)  # an empty file cannot be mapped


def announce(folder: Path, rows: Layout) -> str:
    """A line that says what the file takes. UserError where the disk has less."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if rows.bytes > free:
        raise UserError(f"retention.kl_reference: expected {_size(rows.bytes)} of free disk space in {folder} for the base's hidden "
                        f"states at {rows.rows:,} tokens, found {_size(free)}; choose another --output, count fewer tokens, or set "
                        "retention.kl_reference to live")
    return (f"retention: the base's hidden states at {rows.rows:,} tokens take {_size(rows.bytes)} in {folder} "
            f"({rows.row_bytes:,} bytes a token; {_size(free)} are free)")


def layout(held: KlToBase, samples: Samples, plan: StepPlan, dtype: torch.dtype) -> Layout:
    """The rows of the samples that the plan sees, elements of this dtype."""
    seen, counts = plan.seen(), np.zeros(len(samples), dtype=np.int64)
    counted = seen[held.kl_sources[samples.sources[seen]]]
    counts[counted] = held.targets(samples, counted)
    return Layout(counts, lm_head(held.base.model).weight.shape[1], dtype)


def store(held: KlToBase, samples: Samples, plan: StepPlan, folder: Path, identity: dict, device: torch.device,
          dist: Distributed) -> KlToBase:
    """The same, reading its base from the file of this run: the one in `folder`, or made now by the model, which is not trained yet.

    `identity` is all that decides what the run computes. UserError where the disk refuses it.
    """
    rows = layout(held, samples, plan, lm_head(held.base.model).weight.dtype)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path, aside, begun = folder / f"base-states-{key}.bin", folder / f"base-states-{key}.partial", time.perf_counter()
    found = any(dist.gather(int(dist.is_main and path.exists() and path.stat().st_size == rows.file_bytes)))
    if not found:
        dist.on_main(lambda: _begin(aside, rows))
        error = _write(aside, rows, _read(held, samples, rows, plan.batch_size, device, dist))
        if any(dist.gather(int(error is not None))):  # all ranks see it, so all stop
            dist.on_main(lambda: _remove(aside))
            raise UserError(_refusal(aside, error.strerror if error else "another rank could not"))
        dist.on_main(lambda: publish_file(aside, path))
    if dist.is_main:
        print(f"retention: the base's hidden states are those in {path}" if found else
              f"retention: the base read {np.count_nonzero(rows.counts):,} samples in {time.perf_counter() - begun:.1f} s", flush=True)
    return replace(held, stored=reader(path, rows))


def reader(path: Path, rows: Layout) -> Callable[[Sequence[int]], Tensor]:
    """What gives the rows [K, W] of samples, one after the other, from the file."""
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r")).reshape(-1, rows.row_bytes)  # read-only: it may be larger than the memory
    first, counts = rows.first, rows.counts

    def read(indices: Sequence[int]) -> Tensor:
        found = np.concatenate([mapped[first[i] : first[i] + counts[i]] for i in indices])
        return torch.from_numpy(found).view(rows.dtype)

    return read


def discard(folder: Path) -> None:
    """Remove what runs in this folder stored."""
    for path in folder.glob("base-states-*"):
        path.unlink()


def _begin(aside: Path, rows: Layout) -> None:
    """An empty file that has its space on the disk already, where the system can give it."""
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        discard(aside.parent)
        print(announce(aside.parent, rows), flush=True)
        with open(aside, "wb") as file:
            file.truncate(rows.file_bytes)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, rows.file_bytes)
    except OSError as error:
        _remove(aside)
        raise UserError(_refusal(aside, error.strerror)) from None


def _read(held: KlToBase, samples: Samples, rows: Layout, settings: config.BatchSize, device: torch.device, dist: Distributed
          ) -> Iterator[tuple[np.ndarray, Tensor]]:
    """This rank's share of the samples that have rows, pack by pack: which they are, and their rows [K, W], made by the base."""
    counted = np.flatnonzero(rows.counts)
    packs = pack(samples.lengths[counted], settings.tokens_per_pack, settings.max_samples_per_pack, seed=0)
    for members in packs[dist.rank :: dist.size]:
        batch, = batches(samples, [counted[members]], device, held.collate)
        yield counted[members], held.base.hidden(batch.kl.reference, batch.kl.reference_rows).to("cpu", rows.dtype)


def _write(aside: Path, rows: Layout, made: Iterable[tuple[np.ndarray, Tensor]]) -> OSError | None:
    """Put the rows of samples into their places. Returns what the disk says against it."""
    first = rows.first
    try:
        with open(aside, "r+b") as file:
            for members, states in made:
                for i, own in zip(members, states.split(rows.counts[members].tolist()), strict=True):
                    file.seek(int(first[i]) * rows.row_bytes)
                    file.write(own.contiguous().view(torch.uint8).numpy())
    except OSError as error:
        return error
    return None


def _remove(aside: Path) -> None:
    with contextlib.suppress(OSError):
        aside.unlink()


def _refusal(aside: Path, reason: str) -> str:
    return f"retention.kl_reference: cannot write {aside}: {reason}; choose another --output, or set retention.kl_reference to live"


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
