"""Draw values that nobody expects, and damage JSON and bytes; all by a `random.Random` that is given."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

TEXTS = ("", " ", "\n", "x", "null", "true", "0", "-1", "1e400", "nan", ".inf", "9" * 400, "\0", "a\0b", "\ud83d", "\udfff tail",
         "\x1b[2J\x07",
         "\u202eabc", "\u2028", "$x$ and $y", "%s {0} {x!r}", "{{ 7 * 7 }}", "{% for %}", "<script>alert(1)</script>", "'\"`;--", "\\",
         "../..",
         "a" * 300, "a" * 5000, "word " * 400, "é\u0301\U0001f600", "<|im_end|>", "<s></s>", "\ufeff", "\r\n", "[", "{", "*a", "&a",
         "!!int x", "- -",
         "/etc/passwd", "/dev/null", "/proc/self/x/y", "~", "~nobody-here/x", "./", "..", "file:///etc/passwd", "s3://x/y",
         "hf://datasets/x/y",
         "http://127.0.0.1:9/x", "https://", "(((((a+)+)+)+)+)$", "(?P<x", "[a-", "suite:none")
NUMBERS = (0, -1, 1, 2, 3, 0.5, -0.0, 1e-320, 1e-9, 1e9, 1e30, 1.5e308, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -2**63,
           10**30,
           10**400, float("inf"), float("-inf"), float("nan"))
JUNK = (b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"]", b'"', b"\r", b"\0" * 512, b"\xff" * 64, b"\x1f\x8b\x08\x00", b"PK\x03\x04",
        b"PAR1",
        b"[" * 100_000, b"9" * 5_000)


def odd_text(dice: Random) -> str:
    return dice.choice(TEXTS)


def odd_number(dice: Random) -> int | float:
    return dice.choice(NUMBERS)


def odd_value(dice: Random, depth: int = 2) -> Any:
    """Return a JSON value of any type; NaN and infinities as Python's json writes them."""
    kind = dice.choice(("null", "bool", "text", "text", "number", "number", "list", "mapping", "deep") if depth else ("null", "bool",
        "text", "number"))
    if kind == "list":
        return [odd_value(dice, depth - 1) for _ in range(dice.choice((0, 1, 1, 2, 5)))]
    if kind == "mapping":
        return {odd_text(dice): odd_value(dice, depth - 1) for _ in range(dice.choice((0, 1, 1, 2)))}
    if kind == "deep":
        value: Any = odd_value(dice, 0)
        for _ in range(dice.choice((3, 20, 60))):
            value = [value] if dice.random() < 0.5 else {"x": value}
        return value
    return {"null": None, "bool": dice.random() < 0.5, "text": odd_text(dice), "number": odd_number(dice)}[kind]


def mutated(dice: Random, value: Any, times: int = 1) -> Any:
    """Return a copy of a JSON value, changed in some places: replaced, removed, doubled, wrapped, renamed."""
    value = copy.deepcopy(value)
    for _ in range(times):
        places = list(_places(value))
        if not places:
            return odd_value(dice)
        parent, key = dice.choice(places)
        change = dice.choice(("replace", "replace", "replace", "same type", "remove", "wrap", "rename", "double", "swap"))
        if change == "replace":
            parent[key] = odd_value(dice)
        elif change == "same type":
            parent[key] = odd_text(dice) if isinstance(parent[key], str) else odd_number(dice) if isinstance(parent[key],
                (int, float)) else []
        elif change == "remove":
            del parent[key]
        elif change == "wrap":
            parent[key] = [parent[key]] if dice.random() < 0.5 else {dice.choice(("text", "x", "0")): parent[key]}
        elif change == "rename" and isinstance(parent, dict):
            parent[odd_text(dice)] = parent.pop(key)
        elif change == "double" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif change == "swap":
            other, other_key = dice.choice(places)
            parent[key] = copy.deepcopy(other.get(other_key) if isinstance(other,
                dict) else other[other_key] if other_key < len(other) else None)
    return value


def _places(value: Any):
    """Yield every container in a JSON value with every key or position in it."""
    stack = [value]
    while stack:
        node = stack.pop()
        for key, inner in list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else ():
            yield node, key
            stack.append(inner)


def json_text(value: Any, ascii_only: bool = True) -> bytes:
    """Return a value as JSON, lone surrogates as escapes or as the bytes that some programs write."""
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def damaged(dice: Random, content: bytes) -> bytes:
    """Return bytes with one damage: cut off, emptied, flipped, overwritten, shifted, or with junk in them."""
    at = dice.randrange(len(content) + 1)
    change = dice.choice(("cut", "cut", "empty", "flip", "flip", "flips", "zeros", "junk", "remove", "double", "append"))
    if change == "cut":
        return content[:at]
    if change == "empty":
        return b""
    if change in ("flip", "flips") and content:
        flipped = bytearray(content)
        for _ in range(1 if change == "flip" else 40):
            flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
        return bytes(flipped)
    if change == "zeros":
        size = dice.choice((1, 16, 512, 4096))
        return content[:at] + b"\0" * min(size, len(content) - at) + content[at + size:]
    if change == "junk":
        return content[:at] + dice.choice(JUNK) + content[at:]
    if change == "remove":
        return content[:at] + content[at + dice.choice((1, 7, 64)):]
    return content + (content if change == "double" else dice.choice(JUNK))
