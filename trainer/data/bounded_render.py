"""Render chat templates within limits of time, memory and text: whoever wrote one may have meant harm.

Jinja's sandbox keeps a template from the machine, but not from its time and memory. Here a rendering runs under a timer of this process's
CPU time and under a limit of its address space, its integers stay small (Python cannot interrupt arithmetic on huge ones), and its text
may be some times as long as the chat and the template that it is made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from trainer.data.turn_spans import Message, Span
from trainer.limits import LimitError, limits

SECONDS = 5.0  # of CPU time; a template takes 50 microseconds for a chat, and some milliseconds for a book
GIBIBYTES = 0.5  # beside what the process has
MOST_BITS = 10_000  # of an integer
SHORT_TEXT = 100_000  # characters, which any template may print
MOST_TIMES = 20  # the length of a text as a multiple of what it is made from: JSON escapes take 12 characters each


class RefusedError(Exception):
    """A chat that a template refuses, or for which it fails; the text is the reason."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounded integers."""

    intercepted_binops = frozenset({"*", "**"})

    def make_globals(self, d):
        """Return the globals of a template as a plain dict: each rendering copies them, Jinja's own slowly."""
        return {**self.globals, **(d or {})}

    def call_binop(self, context, operator: str, left, right):
        """Compute an operation that the template asks for. Raises LimitError for integers that are too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MOST_BITS:
                raise LimitError(f"an integer of {bits} bits")
        return super().call_binop(context, operator, left, right)


chat_template_utils.ImmutableSandboxedEnvironment = _Sandbox  # transformers compiles templates in the class of this name


def render(template: str, chat: list[Message], given: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """Render a chat, and return its text with the spans that the template marks.

    Raises jinja2.TemplateSyntaxError, RefusedError for a chat for which the template fails, and LimitError.
    """
    try:
        with limits(SECONDS, GIBIBYTES):
            texts, spans = chat_template_utils.render_jinja_template([chat], chat_template=template, **given)
        text = texts[0]
        if len(text) > SHORT_TEXT:
            most = SHORT_TEXT + MOST_TIMES * (len(template) + len(repr(chat)) + len(repr(given)))
            if len(text) > most:
                raise LimitError(f"a text of {len(text):,} characters")
        text.encode()  # lone surrogates are no text
    except (jinja2.TemplateSyntaxError, LimitError):
        raise
    except Exception as error:  # a template can raise whatever Python can
        raise RefusedError(str(error) if isinstance(error, (jinja2.TemplateError, TypeError, ValueError)) and str(error)
                           else f"{type(error).__name__}: {error}") from error
    return text, spans[0] if spans else []
