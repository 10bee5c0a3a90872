"""Derive seeds and random choices from names and numbers.

So order, batch size, number of processes and kills do not change a pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def seed(*parts: str | int) -> int:
    """Return a seed of 63 bits for these parts, such as run seed, stage, model, item and sample."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform(*parts: str | int) -> float:
    """Return a number in [0, 1) for these parts."""
    return seed(*parts) / 2**63


def choice(weights: Sequence[float], *parts: str | int) -> int:
    """Return an index for these parts, drawn with the given weights."""
    point, total = uniform(*parts) * sum(weights), 0.0
    for i, weight in enumerate(weights):
        total += weight
        if point < total:
            return i
    return max(i for i, weight in enumerate(weights) if weight > 0)
