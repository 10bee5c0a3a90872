"""Read flags that say whether, and how much, a turn is trained on: one weight for each turn, in every spelling that files use.

A message's weight multiplies the loss of its tokens: 0 or false leaves it out, a fraction counts it less. It stands in the message
(`weight: 0`, `train: false`, `loss_mask: 0`), or in a list of the row with an entry for each message or each assistant turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.values import RecordError, as_weight, show

MASKS = ("train", "trainable", "loss_mask", "supervised")  # 1 says that the turn is trained on, not how much
FLAGS = ("weight", "loss", "loss_weight", "loss_scale", *MASKS)
LISTS = (*FLAGS, "weights", "loss_weights")  # of a row
WORDS = {"true": True, "yes": True, "false": False, "no": False}


def take_weight(message: dict) -> float | None:
    """Remove the flags from a message and return its weight; None if it has none. Raises RecordError where they contradict."""
    return _agreed({name: message.pop(name) for name in FLAGS if message.get(name) is not None})


def _agreed(flags: dict[str, Any]) -> float | None:
    """Return the one weight that all flags give."""
    values = {name: _value(name, flag) for name, flag in flags.items()}
    numbers = {value for value in values.values() if not isinstance(value, bool)} | {0.0 for value in values.values() if value is False}
    if len(numbers) > 1 or numbers == {0.0} and True in values.values():
        found = ", ".join(f"{name} {show(flag)}" for name, flag in flags.items())
        raise RecordError(f"expected flags that agree on whether the turn is trained on, found {found}; keep one of them")
    return numbers.pop() if numbers else 1.0 if values else None


def _value(name: str, flag: Any) -> float | bool:
    if isinstance(flag, str):
        flag = WORDS.get(flag.strip().lower(), flag)
    if isinstance(flag, bool):
        return flag
    weight = as_weight(flag, name, "true, false or a number of 0 or more")
    return True if name.rpartition(".")[2] in MASKS and weight == 1 else weight


def row_lists(row: dict, taken: Sequence[str]) -> dict[str, list]:
    """Return the columns of a row that are lists of flags, but for those that another field is read from."""
    return {name: row[name] for name in LISTS if name not in taken and isinstance(row.get(name), list)}


def apply_lists(messages: list[dict], lists: dict[str, list]) -> None:
    """Set the weights of messages from the lists of their row. Raises RecordError for one that fits neither them nor the answers."""
    answers = [message for message in messages if message["role"] == "assistant"]
    for name, flags in lists.items():
        targets = messages if len(flags) == len(messages) else answers
        if len(flags) != len(targets):
            raise RecordError(f"{name}: expected a list of {len(messages)} flags, one for each message, or {len(answers)}, one for each "
                              f"assistant turn, found {len(flags)}; correct it")
        for message, flag in zip(targets, flags):
            if flag is not None:
                given = {} if message["weight"] is None else {"weight": message["weight"]}
                message["weight"] = _agreed(given | {f"row's {name}" if name == "weight" else name: flag})
