"""Check values of options beyond their types: nulls, numbers without bound, impossible paths."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from typing import Any

from trainer.errors import UserError, printable

LARGEST = 2.0**127  # of a number: fp32 holds no larger ones
WHOLE = 2**63  # above any whole number
PATHS = {"output", "path", "config", "tokenizer", "chat_template", "cache_dir", "suite_folder", "task_folder", "adapter", "tuned",
         "llama_cpp"}
PATHS_OR_LISTS = {"train", "eval", "data", "general", "domain"}
EXPANDED = {"output", "chat_template", "cache_dir", "llama_cpp"}  # `~` elsewhere is read where paths are opened, as they may be hub names
QUOTED = "a pattern in quotes, as YAML takes what follows a # for a comment"
PRINTED = {"name", "output"}  # stand in lines of logs
MISREAD = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
INTEGER = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
MOST_DIGITS = 100  # of a number: 309 are too many for a float, and Python does not even read 4,300


def checked(section, prefix: str = ""):
    """Return a section of options, with `~` in its paths replaced by the home folder.

    Raises UserError, which names the option, for null where no null is meant, numbers that are not finite or far too large, and paths that
    no system takes.
    """
    kinds = typing.get_type_hints(type(section))
    changed = {}
    for field in dataclasses.fields(section):
        value, option = getattr(section, field.name), prefix + field.name
        if value is None and type(None) not in typing.get_args(kinds[field.name]) and kinds[field.name] is not Any:
            expected = QUOTED if field.name == "regex" else "a value; give one, or remove the option"
            raise UserError(f"{option}: expected {expected}, got None")
        if dataclasses.is_dataclass(value):
            changed[field.name] = checked(value, f"{option}.")
            continue
        for one in value if isinstance(value, list) else [value]:
            _check_one(option, field.name, one)
        if field.name in EXPANDED and isinstance(value, str):
            changed[field.name] = os.path.expanduser(value)
    return dataclasses.replace(section, **changed)


def _check_one(option: str, name: str, value) -> None:
    """Raise UserError for a value, one of a list or alone, that no option can use."""
    if value is None and name in PATHS_OR_LISTS:
        raise UserError(f"{option}: expected a path, got nothing (null); give one, or remove the entry")
    if dataclasses.is_dataclass(value):
        checked(value, f"{option}: ")
    elif isinstance(value, float) and not (math.isfinite(value) and abs(value) < LARGEST):
        raise UserError(f"{option}: expected a finite number below 1.7e38, got {value}")
    elif isinstance(value, int) and abs(value) >= WHOLE:
        raise UserError(f"{option}: expected a number below 2^63, got {value if abs(value) < 10**40 else 'one of many digits'}")
    elif value == "" and name in PATHS - {"output"}:  # an output that is needed says so itself
        raise UserError(f"{option}: expected a path, got an empty text; give one, or remove the option")
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{option}: expected text, got one with a NUL character; remove it")
    elif isinstance(value, str) and not _is_unicode(value):
        raise UserError(f"{option}: expected text, got one with half of a surrogate pair, {printable(value)!r}; correct it")
    elif isinstance(value, str) and name in PRINTED and ("\n" in value or printable(value) != value):
        raise UserError(f"{option}: expected one line of printable text in UTF-8, got {printable(value)!r}; choose another")
    elif isinstance(value, str) and name in PATHS | PATHS_OR_LISTS:
        _check_path(option, value)


def _is_unicode(text: str) -> bool:
    """Return whether text is UTF-8, but for bytes of file names that are not."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _check_path(option: str, path: str) -> None:
    """Raise UserError for a path with a home of nobody, or longer than a system takes."""
    if re.match(r"~[^/]*", path) and os.path.expanduser(path).startswith("~"):
        raise UserError(f"{option}: expected a path, got {path}; there is no user {path.partition('/')[0][1:]}; write ./~ for a name")
    plain = "://" not in path and not path.startswith(("[", "{"))  # neither an address nor a list that was not read as one
    lengths = [len(os.fsencode(part)) for part in path.split("/")]
    if plain and (sum(lengths) > 4000 - len(lengths) or max(lengths) > 255):
        raise UserError(f"{option}: expected a path of at most 4,000 bytes and names of at most 255, got {sum(lengths):,}; shorten it")


def check_number(text: str, place: str) -> None:
    """Raise UserError for a number of over a hundred digits, or one that YAML 1.1 reads in base 8 or 60."""
    if len(text) > MOST_DIGITS and INTEGER.fullmatch(text):
        raise UserError(f"{place}: expected a number below 2^63, got one of {len(text):,} digits; correct it, or quote it if it is text")
    if MISREAD.fullmatch(text):
        base = 60 if ":" in text else 8
        raise UserError(f"{place}: {text} would be read as a number in base {base}; write a decimal number, or quote it if it is text")
