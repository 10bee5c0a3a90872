"""Learn which parameters one server takes, from its refusals.

A refused request is changed and sent again: a parameter that the refusal names is left out, renamed or lowered. Only what helped is
remembered, so a refusal that merely quotes a parameter's name changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from openai import APIStatusError

OMITTED = ("seed", "top_p", "temperature")  # what may be left out, the first that a refusal names first
ENOUGH_LOGPROBS = 5  # of the protocol's 20: one for each digit
LEAST_GUESS = 16  # tokens, below which max_tokens is not halved
ROOM = "max_tokens is what the context of {:,} tokens leaves after the prompt"
LENGTH_WORDS = re.compile(r"context|max_\w*tokens|completion tokens|too long|too large|token limit", re.IGNORECASE)

NUMBER = r"(\d[\d,_]*)"
# What refusals call the context, the tokens of the prompt, those of prompt and completion together, and the most of a completion
CONTEXT = [rf"\d \+ \d+ > {NUMBER}", rf"context (?:length|window|size|limit)\D{{0,40}}{NUMBER}",
           rf"{NUMBER} (?:tokens )?(?:maximum )?context", rf"limit of {NUMBER}", rf"must be <= {NUMBER}"]
PROMPT = [rf"{NUMBER} (?:tokens )?(?:in|from) (?:the |your )?(?:input |prompt|messages)",
          rf"{NUMBER} [`']?(?:input|inputs|prompt)[`']? tokens",
          rf"(?:prompt|input|messages)\D{{0,25}}{NUMBER} tokens", rf"{NUMBER} \+ \d+ >"]
TOTAL = [rf"(?:requested|asked for|total of)\D{{0,20}}{NUMBER}"]
CAP = [rf"at most {NUMBER}", rf"less than or equal to\D{{0,3}}{NUMBER}", rf"<= ?{NUMBER}", rf"> ?{NUMBER}", rf"\[ ?\d+, ?{NUMBER} ?\]",
       rf"between \d+ and {NUMBER}", rf"maximum\D{{0,30}}{NUMBER}"]


class Change(NamedTuple):
    """A change of a request that a refusal asks for."""

    parameter: str
    apply: Callable[[dict], dict]
    remember: Callable[[], None] = lambda: None
    note: str = ""


class Dialect:
    """The form in which one server takes requests."""

    def __init__(self, context: int | None):
        self.context = context  # tokens of prompt and completion, where it is known
        self.limit = "max_tokens"  # this server's name of the option
        self.omitted: set[str] = set()
        self.most: dict[str, int] = {}  # of a number that may not be larger
        self.notes: dict[str, None] = {}  # what is changed in requests, one line each, in order

    def spell(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a request as this server takes it."""
        body = {name: min(value, self.most[name]) if name in self.most else value
                for name, value in body.items() if name not in self.omitted}
        if "max_tokens" in body:
            body[self.limit] = asked = body.pop("max_tokens")
            if self.context and asked >= self.context:  # leaves a token for the prompt; how many that has, a refusal tells
                body[self.limit] = max(1, self.context - 1)
                self.notes[ROOM.format(self.context)] = None
        return body

    def learn(self, changes: list[Change]) -> None:
        """Remember the changes with which a request was answered."""
        for change in changes:
            change.remember()
            if change.note:
                self.notes[change.note] = None

    def change(self, error: APIStatusError, body: dict[str, Any]) -> Change | None:
        """Return the change of a refused request that may help; None where its words name none."""
        if error.status_code not in (400, 422):
            return None
        words = refusal_words(error)
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        if limit in body and LENGTH_WORDS.search(words):
            change = self._shorter(words, limit, body[limit])
            if change or _number(CONTEXT, words):  # which leaves no room: the prompt is too long
                return change
        return self._renamed(words, limit, body) or self._fewer_logprobs(words, body) or self._omission(words, error, body)

    def _shorter(self, words: str, limit: str, asked: int) -> Change | None:
        """Lower max_tokens to what the context leaves after the prompt, or to the most that the server allows."""
        told, prompt = _number(CONTEXT, words), _number(PROMPT, words)
        context = told or self.context
        if prompt is None and (total := _number(TOTAL, words)) and total > asked:
            prompt = total - asked
        if context and prompt is not None:
            room = context - prompt
            return Change(limit, lambda body: body | {limit: room}, note=ROOM.format(context)) if 1 <= room < asked else None
        if not told and (cap := _number(CAP, words)) and cap < asked:
            return Change(limit, lambda body: body | {limit: cap}, lambda: self.most.update({"max_tokens": cap}),
                          f"max_tokens is {cap:,}, the most that the server takes")
        half = min(asked // 2, context - 1 if context and context - 1 < asked else asked)
        if half >= LEAST_GUESS and re.search("context|too long|too large|exceed", words, re.IGNORECASE):
            return Change(limit, lambda body: body | {limit: half}, note="max_tokens is halved where the context leaves less")
        return None

    def _renamed(self, words: str, limit: str, body: dict) -> Change | None:
        other = "max_tokens" if limit == "max_completion_tokens" else "max_completion_tokens"
        if limit not in body or limit not in words or not (other in words or _says_unknown(words)):
            return None

        def apply(body: dict) -> dict:
            return {other if name == limit else name: value for name, value in body.items()}

        return Change(limit, apply, lambda: setattr(self, "limit", other), f"max_tokens is sent as {other}")

    def _fewer_logprobs(self, words: str, body: dict) -> Change | None:
        name = "top_logprobs" if "top_logprobs" in body else "logprobs"
        asked = body.get(name)
        if isinstance(asked, bool) or not asked or "logprob" not in words:
            return None
        allowed = [number for number in map(int, re.findall(r"(?<![\d.])\d{1,3}(?![\d.])", words)) if 1 <= number < asked]
        if not allowed and not ("top_logprobs" in words and asked > ENOUGH_LOGPROBS):
            return None
        most = max(allowed, default=ENOUGH_LOGPROBS)
        return Change(name, lambda body: body | {name: most}, lambda: self.most.update({name: most}),
                      f"{most} log-probabilities are asked for, the most that the server gives")

    def _omission(self, words: str, error: APIStatusError, body: dict) -> Change | None:
        named = [name for name in OMITTED if name in body and re.search(rf"(?<!\w){name}(?!\w)", words)]
        if not named:
            return None
        name = error.param if error.param in named else named[0]
        return Change(name, lambda body: {key: value for key, value in body.items() if key != name}, lambda: self.omitted.add(name),
                      f"{name} is left out, which the server refuses")


def is_about_length(error: APIStatusError) -> bool:
    """Return whether a request is refused because it is too long for the model."""
    return error.status_code in (400, 413, 422) and bool(LENGTH_WORDS.search(refusal_words(error)))


def refusal_words(error: APIStatusError) -> str:
    """Return all that a refusal says."""
    try:
        return f"{error.message} {json.dumps(error.body, ensure_ascii=False)}"[:4000]
    except (TypeError, ValueError, RecursionError):
        return str(error.message)[:4000]


def _says_unknown(words: str) -> bool:
    return bool(re.search(r"unsupported|unrecognized|unknown|not (?:supported|permitted|allowed)|extra", words, re.IGNORECASE))


def _number(patterns: list[str], words: str) -> int | None:
    for pattern in patterns:
        if found := re.search(pattern, words, re.IGNORECASE):
            return int(found[1].replace(",", "").replace("_", ""))
    return None
