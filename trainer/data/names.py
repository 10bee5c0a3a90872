"""Name sources and item files, no two alike."""

from __future__ import annotations

from collections.abc import Sequence


def distinct(names: Sequence[str]) -> list[str]:
    """Make names distinct: add a number to those that came before, the first that is free."""
    given, taken, numbers = set(names), set(), dict.fromkeys(names, 1)
    found = []
    for name in names:
        candidate = name
        while candidate in taken or candidate != name and candidate in given:
            numbers[name] += 1
            candidate = f"{name} ({numbers[name]})"
        taken.add(candidate)
        found.append(candidate)
    return found
