"""Define what becomes of an option of another trainer: an option of ours, or a note that says why not.

A table has a rule for each of their options. Options without a rule, and values without a counterpart, get a note; values that mean "not
set" (null, false, "none", empty) get none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trainer.config import Config
from trainer.errors import one_line

UNSET = (None, False, "", [], {}, "none", "no", "null")


@dataclass
class Converted:
    """Our options, by dotted name, and notes on theirs that have no counterpart."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, **options: Any) -> None:
        """Set options, named with two underscores for a dot."""
        self.values |= {name.replace("__", "."): value for name, value in options.items()}

    def note(self, key: str, value: Any, why: str) -> None:
        self.notes.append(one_line(f"{key}: {json.dumps(value, default=str)}: {why}"))

    def nested(self) -> dict[str, Any]:
        """Return the options as a YAML file has them."""
        order = [option.name for option in fields(Config)]
        found: dict[str, Any] = {}
        for name, value in sorted(self.values.items(), key=lambda pair: order.index(pair[0].partition(".")[0])):
            *sections, last = name.split(".")
            place = found
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return found


Rule = Callable[[str, Any, Converted], None]  # their option, its value, and where what becomes of it goes
Table = Mapping[str, Rule]


def option(name: str, kind: Callable[[Any], Any] = lambda value: value) -> Rule:
    """Return the rule of an option that has a counterpart; `kind` converts the value."""
    def rule(key: str, value: Any, converted: Converted) -> None:
        converted.values[name] = kind(value)
    return rule


def choice(name: str, values: Mapping[Any, Any], otherwise: str) -> Rule:
    """Return the rule of an option with a few values; any other value gets the note `otherwise`."""
    def rule(key: str, value: Any, converted: Converted) -> None:
        if isinstance(value, (str, bool)) and value in values:
            if values[value] is not None:
                converted.values[name] = values[value]
        else:
            converted.note(key, value, otherwise)
    return rule


def note(why: str) -> Rule:
    """Return the rule of an option without a counterpart."""
    return lambda key, value, converted: converted.note(key, value, why)


def silent(key: str, value: Any, converted: Converted) -> None:
    """Leave out what another rule reads, or what changes nothing here."""


def apply(table: Table, theirs: Mapping[str, Any], converted: Converted) -> None:
    """Apply a table's rules to a configuration, in its order; note the options that have none."""
    for key, value in theirs.items():
        if key in table:
            if is_set(value):
                try:
                    table[key](key, value, converted)
                except (TypeError, ValueError, AttributeError, KeyError, IndexError):
                    converted.note(key, value, "expected another kind of value; left out")
        elif is_set(value):
            converted.note(key, value, "no counterpart that is known; left out")


def is_set(value: Any) -> bool:
    """Return whether an option has a value that does something."""
    return not any(value is unset or (type(value) is type(unset) and value == unset) for unset in UNSET)
