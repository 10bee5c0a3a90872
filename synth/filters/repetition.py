"""Measure how much of a text is one repeated phrase, as a model writes that is caught in a loop.

For window lengths of 16, 24, 32, 48 ... characters up to a quarter of the text, and for windows that occur four times or more: the share
of characters that the occurrences of one window cover, at most over all windows. A loop of any period is covered whole once it is long
enough for four windows, which may overlap. A repeated phrase with something else between its occurrences (a list that counts) is covered
to at least two thirds; phrases below 16 characters do not count, because natural lists have such. Texts below 50 characters have share 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

SHORTEST_TEXT, SHORTEST_PHRASE, OCCURRENCES = 50, 16, 4


def repetition(text: str, enough: float = 1.0) -> float:
    """Return the largest share of the text, 0 to 1, that the occurrences of one phrase cover.

    Stops early at a share above `enough`. Takes O(n) windows for natural text, O(n log n) otherwise.
    """
    if len(text) < SHORTEST_TEXT or not _recurs(text):
        return 0.0
    best = 0
    for length in _lengths(max(SHORTEST_PHRASE, len(text) // OCCURRENCES)):
        covered = _covered(text, length)
        best = max(best, covered)
        if not covered or best > enough * len(text):  # longer windows do not occur more often
            break
    return best / len(text)


def _lengths(longest: int) -> Iterator[int]:
    """Yield 16, 24, 32, 48 ... up to the longest."""
    length, step = SHORTEST_PHRASE, SHORTEST_PHRASE // 2
    while length <= longest:
        yield length
        length += step
        step = length // 2 if length & (length - 1) == 0 else length // 3


def _recurs(text: str) -> bool:
    """Return whether any window of the shortest length occurs often enough, as in few natural texts."""
    windows = [text[i:i + SHORTEST_PHRASE] for i in range(len(text) - SHORTEST_PHRASE + 1)]
    return len(windows) - len(set(windows)) >= OCCURRENCES - 1 and max(Counter(windows).values()) >= OCCURRENCES


def _covered(text: str, length: int) -> int:
    """Return the most characters that a window of this length covers, among those that occur often enough."""
    seen: dict[str, tuple[int, int, int]] = {}  # window -> occurrences, characters covered, start of the last one
    best = 0
    for i in range(len(text) - length + 1):
        window = text[i:i + length]
        count, covered, last = seen.get(window, (0, 0, i - length))
        count, covered = count + 1, covered + min(length, i - last)
        seen[window] = count, covered, i
        if count >= OCCURRENCES and covered > best:
            best = covered
    return best
