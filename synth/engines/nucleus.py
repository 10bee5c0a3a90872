"""Find the nucleus, the likeliest tokens that together reach top_p, without sorting the vocabulary.

NumPy sorts values alone, with the CPU's vector instructions, many times faster than torch sorts values with their places.
Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

LARGEST = 4_096  # among which the nucleus is looked for before all values are sorted; to part them from the others costs no more for many


def nucleus(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Return the token ids of the nucleus of a row [V], ascending.

    Of equal logits at its border those with the highest ids belong to it.
    """
    highest, size = logits.max(), len(logits)
    wanted = top_p * float(np.exp(logits - highest).sum())
    for count in sorted({min(LARGEST, size), size}):
        largest = np.sort(logits if count == size else np.partition(logits, size - count)[size - count:])
        reach = np.cumsum(np.exp(largest - highest)[::-1], dtype=np.float64)
        if reach[-1] >= wanted:
            break
    count = min(int(np.searchsorted(reach, wanted)) + 1, len(reach))  # the token that reaches top_p belongs to the nucleus
    ids = np.flatnonzero(logits >= largest[-count])
    if len(ids) > count:
        border = ids[logits[ids] == largest[-count]]
        ids = np.setdiff1d(ids, border[:len(ids) - count], assume_unique=True)
    return ids


def mask_outside(logits: Tensor, top_p: Iterable[float]) -> Tensor:
    """Set logits [n, V] outside each row's nucleus to -inf, in place, and return them.

    Rows with top_p 1 stay as they are.
    """
    def mask(row: np.ndarray, p: float) -> None:
        ids = nucleus(row, p)
        kept = row[ids]
        row.fill(-np.inf)
        row[ids] = kept

    each_row(mask, [(row, p) for row, p in zip(logits.numpy(), top_p, strict=True) if p < 1])
    return logits


def each_row(function: Callable, arguments: list[tuple]) -> list:
    """Call `function` for every row's arguments, in as many threads as torch has.

    NumPy releases the interpreter's lock.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(*of_row) for of_row in arguments]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda of_row: function(*of_row), arguments))
