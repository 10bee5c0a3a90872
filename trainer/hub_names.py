"""Recognise names on the Hugging Face hub."""

from __future__ import annotations

import re

PART = r"[\w-][\w.-]{0,95}"


def is_hub_name(text: str, owned: bool = False) -> bool:
    """Return whether `text` may name something on the hub: NAME or OWNER/NAME; with `owned` the latter."""
    return re.fullmatch(f"({PART}/){'' if owned else '?'}{PART}", text) is not None
