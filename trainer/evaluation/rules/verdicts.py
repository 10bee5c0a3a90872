"""Judge an answer by the rules of its item, strictly and loosely.

    strict   the answer keeps the rule as it stands
    loose    it does so after Markdown's asterisks, its first line, its last line, or several of these are taken away

A loose verdict forgives `Sure, here it is:` and bold type. Both are counted by instruction (a rule of an item) and by prompt (all of them).
An empty answer keeps no rule.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError
from trainer.evaluation.rules.checks import CHECKS, NEED_LANGUAGE, PATTERNS, RELATIONS

KINDS = {str: "text", int: "a number", list[str]: "a list of texts"}  # of arguments, by their types


@dataclass(frozen=True)
class Rule:
    """One rule of an item: the name of its check, and the check's arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Verdicts:
    """Whether an answer keeps each rule of its item."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def make_rule(name: str, arguments: dict[str, Any]) -> Rule:
    """Return a rule, without arguments that are null.

    Raises ValueError if there is no such rule, or its check does not take the arguments, or not of these types.
    """
    if name not in CHECKS:
        raise ValueError(f"expected the name of a rule, such as {next(iter(CHECKS))}, found {name!r}")
    wanted = {key for key, parameter in inspect.signature(CHECKS[name]).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    given = {key: value for key, value in arguments.items() if value is not None}
    if set(given) != wanted:
        raise ValueError(f"expected the arguments {', '.join(sorted(wanted)) or 'none'} of the rule {name}, found "
                         f"{', '.join(sorted(given)) or 'none'}")
    for key, kind in typing.get_type_hints(CHECKS[name]).items():
        if key in wanted and not _is_of(kind, given[key]):
            raise ValueError(f"expected {key} of the rule {name} to be {KINDS[kind]}, found {given[key]!r}")
        if key in PATTERNS:
            _check_pattern(key, given[key])
    for key in wanted & {"relation", "let_relation", "capital_relation"}:
        if given[key] not in RELATIONS:
            raise ValueError(f"expected {key} of the rule {name} to be {' or '.join(RELATIONS)}, found {given[key]!r}")
    return Rule(name, given)


def _is_of(kind: Any, value: Any) -> bool:
    """Return whether an argument is of a type; JSON and Arrow files may write whole numbers as floats."""
    if kind is int:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return kind is Any or isinstance(value, kind)


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"expected {key} to be a regular expression, found {pattern!r}: {error}") from None


def require_language(rules: Sequence[Rule], place: str) -> None:
    """Raise UserError if a rule needs py3langid, and it is not installed."""
    needs = next((rule.name for rule in rules if rule.name in NEED_LANGUAGE), None)
    if needs and importlib.util.find_spec("py3langid") is None:
        raise UserError(f"{place}: the rule {needs} needs the package py3langid, which is not installed; pip install "
                        "'steadfast-sft[eval]'")


def judge_rules(rules: Sequence[Rule], answer: str) -> Verdicts:
    """Return the verdicts on an answer, in the order of the rules."""
    loose = _loosened(answer)
    return Verdicts(tuple(_keeps(rule, [answer]) for rule in rules), tuple(_keeps(rule, loose) for rule in rules))


def _keeps(rule: Rule, answers: Sequence[str]) -> bool:
    return any(CHECKS[rule.name](answer, **rule.arguments) for answer in answers if answer.strip())


def _loosened(answer: str) -> list[str]:
    """Return the answer, and what is left of it without its first line, its last, both, and asterisks."""
    lines = answer.split("\n")
    parts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*parts, *(part.replace("*", "") for part in parts)]
