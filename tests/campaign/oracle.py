"""Judge how a case ended: well or refused in one clear line, in time, without a silent difference."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from tests.campaign.forked import Ended
from trainer.errors import STEERING

LONGEST = 4_000  # characters of an error's line: paths in it may be long
FOREIGN = re.compile(r"'NoneType' object|object has no attribute|is not subscriptable|unhashable type|not supported between instances|"
                     r"object is not iterable|object is not callable|unexpected keyword argument|missing \d+ required positional")


class Outcome(StrEnum):
    """How a case ended; the last four are faults."""

    WELL = "ended well"
    REFUSED = "refused in one line"
    TRACEBACK = "traceback"
    UNCLEAR = "no clear line"
    HANG = "hang"
    SILENT = "silent difference"


FAULTS = (Outcome.TRACEBACK, Outcome.UNCLEAR, Outcome.HANG, Outcome.SILENT)


class Verdict(NamedTuple):
    """The outcome of a case, and what was seen of it."""

    outcome: Outcome
    detail: str
    kills: int = 0  # runs killed on the way, in cases that kill


def judge(ended: Ended, difference: str | None = None, statuses: tuple[int, ...] = (1, 2), quotes_python: bool = False) -> Verdict:
    """Return the verdict on a command that has ended.

    `difference` says what a command that ended with status 0 left wrong. `statuses` are those of refusals. `quotes_python`: the line may
    hold a message of Python, as where a chat template's own code failed.
    """
    lines = [line for line in ended.errors.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if ended.hung:
        return Verdict(Outcome.HANG, f"status {ended.status}: {last}")
    if "Traceback (most recent call last)" in ended.errors + ended.output or "a fault of Steadfast" in last or ended.status < 0:
        return Verdict(Outcome.TRACEBACK, f"status {ended.status}: {last}")
    if ended.status == 0:
        return Verdict(Outcome.SILENT, difference) if difference else Verdict(Outcome.WELL, "")
    told = [line for line in lines if line.startswith(f"{ended.module}: error: ")]
    if ended.status not in statuses or len(told) != 1 or told[0] != last or len(last) > LONGEST or STEERING.search(last):
        return Verdict(Outcome.UNCLEAR, f"status {ended.status}, {len(told)} lines of error: {last}")
    if not quotes_python and FOREIGN.search(last):
        return Verdict(Outcome.UNCLEAR, last)
    return Verdict(Outcome.REFUSED, last)
