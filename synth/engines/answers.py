"""Check every field of a server's answers, and limit their bytes.

A server is not trusted, and nothing else of its answers is read. One that does not follow the protocol is Garbled: its request is sent
again, and no other one is touched.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from trainer.errors import one_line

MOST_BYTES = 2**25  # of an answer, also decompressed
MOST_TOKENS = 2**31  # that an answer may claim to have
MOST_CHARACTERS = 1000, 128  # of a text, and beside them of each token that was allowed: no vocabulary has longer ones
ROUNDING = 1e-3  # by which a log-probability may exceed 0
UNFINISHED = (None, "error", "abort", "cancelled", "canceled")  # finish reasons of a server that broke off
ELSEWHERE = ("reasoning_content", "reasoning", "thinking", "refusal")  # fields that may hold the text where the content is empty


class Garbled(Exception):
    """An answer that does not follow the protocol, which is retried."""


class Reply(NamedTuple):
    """A checked answer."""

    text: str
    finish: str | None
    prompt_tokens: int
    tokens: int
    first: list[tuple[str, float]]  # likely first tokens with their log-probabilities; none where the server returns none
    logprob: float | None = None  # of all tokens
    elsewhere: str | None = None  # the field that has text where the content has none
    counted: bool = True  # its token counts are numbers of tokens


def parse(body: bytes) -> Any:
    """Return the JSON of an answer."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Garbled(f"an unreadable answer ({type(error).__name__})") from None


def read_chat(body: bytes, max_tokens: int) -> Reply:
    """Read a chat completion."""
    answer = parse(body)
    choice = _first_choice(answer)
    message = _field(choice, "message", dict)
    text = _text_of(message.get("content"))
    elsewhere = next((name for name in ELSEWHERE if isinstance(message.get(name), str) and message[name].strip()), None)
    if not text.strip() and not elsewhere and _thought(message.get("content")):
        elsewhere = "thinking"
    tokens = _field(_field(choice, "logprobs", dict, {}), "content", list, [])
    tops = _field(tokens[0], "top_logprobs", list, []) if tokens else []
    first = [(_field(one, "token", str), _logprob(one.get("logprob"))) for one in tops]
    return _reply(answer, choice, text, max_tokens, first, elsewhere=None if text.strip() else elsewhere)


def read_completion(body: bytes, max_tokens: int) -> Reply:
    """Read a completion of a prompt of token ids."""
    answer = parse(body)
    choice = _first_choice(answer)
    logprobs = _field(choice, "logprobs", dict, {})
    each = [None if value is None else _logprob(value) for value in _field(logprobs, "token_logprobs", list, [])]
    tops = _field(logprobs, "top_logprobs", list, [])
    first = [(token, _logprob(value)) for token, value in tops[0].items()] if tops and isinstance(tops[0], dict) else []
    total = sum(each) if each and None not in each else None
    return _reply(answer, choice, _field(choice, "text", str), max_tokens, first, total)


def read_models(body: bytes, model: str) -> dict[str, str | int]:
    """Return what a list of models tells of one: its `root` and `max_model_len`, as far as they are there."""
    listed = _field(parse(body), "data", list)
    found = next((one for one in listed if isinstance(one, dict) and one.get("id") == model), {})
    root, length = found.get("root"), found.get("max_model_len")
    return ({"root": one_line(root)} if isinstance(root, str) else {}) | ({"max_model_len": length} if _count(length) else {})


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# ---------------------------------------------------------------- fields


def _first_choice(answer: Any) -> dict:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        told = answer.get("error") if isinstance(answer, dict) else None
        told = told.get("message") if isinstance(told, dict) else told
        raise Garbled("an answer without choices" + (f": {one_line(told)}" if isinstance(told, str) else ""))
    return choices[0]


def _field(parent: Any, name: str, kind: type, default: Any = None) -> Any:
    """Return a field of a JSON object; `default` where it is null or missing, if there is one."""
    value = parent.get(name) if isinstance(parent, dict) else None
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        raise Garbled(f"an answer whose {name} is {'missing' if value is None else type(value).__name__}")
    return value


def _text_of(content: Any) -> str:
    """Return the text of a message's content: a string, null, or parts, thoughts left out."""
    if content is None:
        return ""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Garbled(f"an answer whose content is {type(content).__name__}")
    texts = [part if isinstance(part, str) else _field(part, "text", str) for part in parts
             if not isinstance(part, dict) or part.get("type") not in ("thinking", "reasoning")]
    return "".join(texts)


def _thought(content: Any) -> bool:
    return isinstance(content, list) and any(isinstance(part, dict) for part in content)


def _logprob(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value > ROUNDING:
        raise Garbled("an answer with a log-probability that is none")
    return min(float(value), 0.0) if value > -1e300 else -math.inf


def _count(value: Any) -> int | None:
    """Return a number of tokens; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST_TOKENS or value != int(value):
        return None
    return int(value)


def _reply(answer: dict, choice: dict, text: str, max_tokens: int, first: list, logprob: float | None = None,
           elsewhere: str | None = None) -> Reply:
    fixed, each = MOST_CHARACTERS
    if len(text) > fixed + each * max_tokens:
        raise Garbled(f"an answer of {len(text):,} characters to max_tokens {max_tokens}")
    finish = choice.get("finish_reason")
    if finish is not None and not isinstance(finish, str):
        raise Garbled(f"an answer whose finish_reason is {type(finish).__name__}")
    if finish in UNFINISHED:
        raise Garbled(f"an answer that the server did not finish ({finish})")
    usage = answer.get("usage")
    told = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [None, None]
    counts = [_count(value) for value in told]
    counted = all(value is None or count is not None for value, count in zip(told, counts)) and isinstance(usage, dict | None)
    return Reply(text, finish, counts[0] or 0, counts[1] or 0, first, logprob, elsewhere, counted)


# ---------------------------------------------------------------- bytes


async def limit_bytes(stream: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    """Yield a body's bytes, decompressed, up to MOST_BYTES of them."""
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise Garbled(f"an answer compressed with {one_line(encoding)}, which was not asked for")
    decompressor, count = None if encoding in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32), 0
    async for chunk in stream:
        try:
            chunk = decompressor.decompress(chunk, MOST_BYTES + 1 - count) if decompressor else chunk
        except zlib.error:
            raise Garbled("an answer that cannot be decompressed") from None
        count += len(chunk)
        if count > MOST_BYTES:
            raise Garbled(f"an answer of more than {MOST_BYTES >> 20} MiB")
        yield chunk
