"""Read flags that say whether, and how much, a turn is trained on, in every spelling that files use.

They become one weight for each turn. A message's weight multiplies the loss of its tokens: 0 or false leaves it out, a fraction counts it
less. It stands in the message (`weight: 0`, `train: false`, `loss_mask: 0`), or in the row: a list with an entry for each message or each
assistant turn, or one flag for all. A row's own `weight` is that of its sample, and a number that it calls `loss` is none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.values import RecordError, as_weight, read_json, show

MASKS = ("train", "trainable", "loss_mask", "supervised")  # 1 says that the turn is trained on, not how much
FLAGS = ("weight", "loss", "loss_weight", "loss_scale", *MASKS)
LISTS = (*FLAGS, "weights", "loss_weights")  # of a row
WORDS = {"true": True, "yes": True, "false": False, "no": False}


def take_weight(message: dict) -> float | None:
    """Remove the flags from a message and return its weight; None if it has none.

    Raises RecordError where they contradict.
    """
    return _agreed({name: message.pop(name) for name in FLAGS if message.get(name) is not None}) if message else None


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


def row_flags(row: dict, taken: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a row that are flags of its turns, and that no other field is read from."""
    if row.keys().isdisjoint(LISTS):
        return {}
    found = {name: read_json(row[name]) for name in LISTS if name in row and name not in taken}
    return {name: value for name, value in found.items() if isinstance(value, list) or name != "weight" and _is_flag(name, value)}


def _is_flag(name: str, value: Any) -> bool:
    """Return whether a row's value is one flag for all its turns."""
    value = WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
    return isinstance(value, bool) or name in (*MASKS, "loss_weight", "loss_scale") and isinstance(value, (int, float))


def apply_flags(messages: list[dict], of_row: dict[str, Any]) -> None:
    """Set the weights of messages from the flags of their row.

    Raises RecordError for a list that fits neither them nor the answers.
    """
    if not of_row:
        return
    answers = [message for message in messages if message["role"] == "assistant"]
    for name, flags in of_row.items():
        if not isinstance(flags, list):
            flags = [flags] * len(answers if _agreed({name: flags}) else messages)
        targets = messages if len(flags) == len(messages) else answers
        if len(flags) != len(targets):
            raise RecordError(f"{name}: expected a list of {len(messages)} flags, one for each message, or {len(answers)}, one for each "
                              f"assistant turn, found {len(flags)}; correct it")
        for message, flag in zip(targets, flags):
            if flag is not None:
                given = {} if message["weight"] is None else {"weight": message["weight"]}
                message["weight"] = _agreed(given | {f"row's {name}" if name == "weight" else name: flag})
