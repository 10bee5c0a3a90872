"""Seeds and choices that depend on what is asked, never on when: order, batch size, shards and kills leave a pool as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def seed(*parts: str | int) -> int:
    """A seed of 63 bits from a run's seed, the stage, the model, the item and the sample's number, in that order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform(*parts: str | int) -> float:
    """A number in [0, 1) from the same."""
    return seed(*parts) / 2**63


def choice(weights: Sequence[float], *parts: str | int) -> int:
    """An index, drawn with the given weights."""
    point, total = uniform(*parts) * sum(weights), 0.0
    for i, weight in enumerate(weights):
        total += weight
        if point < total:
            return i
    return max(i for i, weight in enumerate(weights) if weight > 0)
