"""Name the rules by which the stage `clean` drops items, and the form of a drop."""

from __future__ import annotations

from typing import NamedTuple

RULES = ("too short", "too long", "repetition", "language", "contaminated", "near-duplicate")  # in the order in which they are applied


class Drop(NamedTuple):
    """Why an item is dropped."""

    reason: str  # one of RULES
    detail: str
