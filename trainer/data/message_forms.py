"""Find the forms of messages that a chat template prints, and bring messages into them.

Templates differ in the key under which they read reasoning, in whether they know a developer, in how a turn that only calls a tool
must look, and in whether content is text or a list of parts. Each form is found by rendering small chats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

from trainer.data.bounded_render import RefusedError
from trainer.data.messages import REASONING_KEYS
from trainer.data.turn_spans import ASSISTANT_WORDS, REASONING, TOOL_WORDS, USER_WORDS, Message

USER = {"role": "user", "content": USER_WORDS}


class Render(Protocol):
    """Renders messages as they stand, with the usual keywords and those that are asked for.

    Raises RefusedError for a chat that the template refuses.
    """

    def __call__(self, chat: list[Message], asked: Mapping[str, Any] | None = None, **options: Any) -> str: ...


class MessageForms:
    """The forms of messages that one chat template prints."""

    def __init__(self, render: Render):
        self._render = render

    def spell(self, messages: list[Message]) -> list[Message]:
        """Return the messages with the template's own key for reasoning and its own role for a developer.

        That role is system where the template knows no other.
        """
        if all(len(message) == 2 and message["role"] != "developer" for message in messages):
            return messages
        key, spelled = self.reasoning_key if any("reasoning_content" in message for message in messages) else None, []
        for message in messages:
            if key and "reasoning_content" in message:
                message = {key if name == "reasoning_content" else name: value for name, value in message.items()}
            if message["role"] == "developer" and not self._has_developer:
                message = message | {"role": "system"}
            spelled.append(message)
        return spelled

    def shape(self, messages: list[Message]) -> list[Message]:
        """Return the messages with content and calls in the shape that the template prints."""
        chat = [_as_parts(message) for message in messages] if self._in_parts else messages
        if any(message.get("tool_calls") for message in messages) and self._call_form != ("", False):
            chat = [_with_call_form(message, *self._call_form) for message in chat]
        return chat

    @cached_property
    def reasons(self) -> bool:
        """Return whether the model is meant to reason.

        Its template then prints reasoning, and no keyword has to ask for it.
        """
        try:
            default, on, off = (self._render([USER], asked, add_generation_prompt=True)
                                for asked in ({}, {"enable_thinking": True}, {"enable_thinking": False}))
        except RefusedError:
            return False
        return (self.reasoning_key is not None or REASONING in default) and (default == on or default != off)

    @cached_property
    def reasoning_key(self) -> str | None:
        """Return the key of a message whose value the template prints as the reasoning of a last turn.

        None if it prints none.
        """
        answer = {"role": "assistant", "content": ASSISTANT_WORDS}
        return next((key for key in REASONING_KEYS if self._prints(TOOL_WORDS, [USER, answer | {key: TOOL_WORDS}])), None)

    @cached_property
    def _has_developer(self) -> bool:
        """Return whether the template prints a developer's message, or refuses both it and a system message."""
        developer, system = (self._prints(ASSISTANT_WORDS, [{"role": role, "content": ASSISTANT_WORDS}, USER])
                             for role in ("developer", "system"))
        return developer or not system

    @cached_property
    def _in_parts(self) -> bool:
        """Return whether the template prints only messages whose content is a list of parts (multimodal)."""
        return not self._prints(USER_WORDS, [USER]) and self._prints(USER_WORDS, [_as_parts(USER)])

    @cached_property
    def _call_form(self) -> tuple[str | None, bool]:
        """Return the content of a turn that only calls a tool, and whether arguments are to be JSON text.

        The content is "" or None. Both are what the template prints rightly: OpenAI's API writes both null and text, and DeepSeek's
        templates print nothing else.
        """
        arguments = {"q": TOOL_WORDS}
        for content, as_text in (("", False), ("", True), (None, False), (None, True)):
            call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
            chat = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                text = self._render([_with_call_form(message, content, as_text) for message in chat])
            except RefusedError:
                continue
            if TOOL_WORDS in text and str(arguments) not in text and json.dumps(json.dumps(arguments, ensure_ascii=False))[:-1] not in text:
                return content, as_text
        return "", False

    def _prints(self, words: str, chat: list[Message]) -> bool:
        """Return whether the template takes a chat and prints these words of it."""
        try:
            return words in self._render(chat)
        except RefusedError:
            return False


def _with_call_form(message: Message, content: str | None, as_text: bool) -> Message:
    """Return a message whose calls have this content where there are no words.

    Arguments are JSON text, or an object.
    """
    if not message.get("tool_calls"):
        return message
    calls = [call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
             for call in message["tool_calls"]] if as_text else message["tool_calls"]
    return message | {"content": message["content"] or content, "tool_calls": calls}


def _as_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message["content"]}]}
