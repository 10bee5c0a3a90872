"""How much of a text is one phrase over and over: models that lose the thread write the same words until they are stopped.

For window lengths of 16, 24, 32, 48 ... characters up to a quarter of the text: the characters that the occurrences of one window cover,
for windows that occur four times or more; the largest share over all windows. A loop of any period is covered whole once it is long
enough for four windows, which may overlap. A repeated phrase with something else between its occurrences (a list that counts) is covered
to at least two thirds, and not at all below 16 characters: natural lists are made of short ones. No text below 50 characters repeats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

SHORTEST_TEXT, SHORTEST_PHRASE, OCCURRENCES = 50, 16, 4


def repetition(text: str, enough: float = 1.0) -> float:
    """The share of the text, 0 to 1, that occurrences of one phrase cover; or one above `enough`, where that is found sooner.

    O(n) for natural text, O(n log n) windows otherwise.
    """
    if len(text) < SHORTEST_TEXT or not _recurs(text):
        return 0.0
    best = 0
    for length in _lengths(max(SHORTEST_PHRASE, len(text) // OCCURRENCES)):
        covered = _covered(text, length)
        best = max(best, covered)
        if not covered or best > enough * len(text):  # where no window occurs often enough, no longer one does
            break
    return best / len(text)


def _lengths(longest: int) -> Iterator[int]:
    """16, 24, 32, 48 ... up to the longest."""
    length, step = SHORTEST_PHRASE, SHORTEST_PHRASE // 2
    while length <= longest:
        yield length
        length += step
        step = length // 2 if length & (length - 1) == 0 else length // 3


def _recurs(text: str) -> bool:
    """Whether any window of the shortest phrase's length occurs often enough, as in few natural texts."""
    windows = [text[i:i + SHORTEST_PHRASE] for i in range(len(text) - SHORTEST_PHRASE + 1)]
    return len(windows) - len(set(windows)) >= OCCURRENCES - 1 and max(Counter(windows).values()) >= OCCURRENCES


def _covered(text: str, length: int) -> int:
    """Characters that the occurrences of one window of this length cover, at most, among windows that occur often enough."""
    seen: dict[str, tuple[int, int, int]] = {}  # window -> its occurrences, what they cover, where the last one begins
    best = 0
    for i in range(len(text) - length + 1):
        window = text[i:i + length]
        count, covered, last = seen.get(window, (0, 0, i - length))
        count, covered = count + 1, covered + min(length, i - last)
        seen[window] = count, covered, i
        if count >= OCCURRENCES and covered > best:
            best = covered
    return best
