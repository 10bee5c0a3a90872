"""Search with regular expressions of users and of model folders within limits of time and memory.

Some take longer than anybody waits: Python's `re` tries every way in which repeats inside repeats can share a text,
such as `(a+)+$` on a row of letters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

from trainer.errors import UserError, one_line
from trainer.limits import LimitError, limits

SECONDS = 5.0  # of CPU time; a search takes some milliseconds in the longest answer
GIBIBYTES = 0.5


@contextlib.contextmanager
def bounded(option: str, pattern: str, remedy: str = "correct it") -> Iterator[None]:
    """Limit searches with a pattern.

    Raises UserError for one that takes too long, or is no regular expression, with the `remedy` for that.
    """
    try:
        with limits(SECONDS, GIBIBYTES):
            yield
    except LimitError as error:
        raise UserError(f"{option}: expected a pattern that is soon found or not, {one_line(repr(pattern))} takes {error}; "
                        "write it without repeats inside repeats") from None
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{option}: {one_line(repr(pattern))} is not a regular expression: {error}; {remedy}") from None


def require_bounded(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Check that libraries may match these patterns with the names of a model's layers. Raises UserError."""
    names = list(names)
    for pattern in patterns:
        with bounded(option, pattern):
            matchers = [re.compile(rf"(^|.*\.)({pattern})"), re.compile(rf"(^|.*\.)({pattern})($|\..*)"), re.compile(rf"({pattern})$")]
            for name in names:
                for matcher in matchers:
                    matcher.match(name)
