"""Read messages in every spelling that files use.

A message becomes {"role", "content", "extra", "weight"}: role is system, developer, user, assistant or tool; content is text; extra holds
the other keys as JSON: tool_calls in OpenAI's form, reasoning_content, name, ...; weight is that of the turn in the loss, or None.

    role or from, content or value                                  one message
    function_call, tool_call                                        content is a call as JSON: the assistant's, joined to its turn before
    reasoning_content, reasoning, thinking, or such a content part  the assistant's reasoning
    the legacy key function_call                                    one of tool_calls
"""

from __future__ import annotations

import json
from typing import Any

from trainer.data.tool_calls import calls_in_text, read_calls, read_tools
from trainer.data.turn_weights import apply_flags, take_weight
from trainer.data.values import RecordError, as_text, is_given, is_parts, join_parts, show

CALL = "call"
SPELLINGS = {
    "system": ("system", "system_prompt"),
    "developer": ("developer",),
    "user": ("user", "human", "prompter", "customer"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bard", "bing", "agent"),
    "tool": ("tool", "observation", "function", "ipython", "tool_response", "tool_responses", "tool_result", "tool_results", "tool_output",
             "function_response", "function_result", "function_output", "environment"),
    CALL: ("function_call", "function_calls", "tool_call", "tool_calls", "function-call", "tool-call"),
}
ROLES = {spelling: role for role, spellings in SPELLINGS.items() for spelling in spellings}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
THOUGHTS = ("thinking", "reasoning")  # types of content parts
KEYS = {"role", "content", "from", "value", *REASONING_KEYS}


def make_message(role: str, content: str, extra: dict | None = None, weight: float | None = None) -> dict:
    """Return a message in our form."""
    extra_json = json.dumps(extra, ensure_ascii=False, default=str) if extra else None
    return {"role": role, "content": content, "extra": extra_json, "weight": weight}


def read_messages(value: Any, column: str, flags: dict[str, Any] | None = None) -> list[dict]:
    """Convert a list of messages.

    `flags` are weights of turns that their row holds (trainer/data/turn_weights.py). Raises RecordError with the number of the turn that is
    no message.
    """
    if not isinstance(value, list) or not value:
        raise RecordError(f"expected a list of messages in '{column}', found {show(value)}")
    read = []
    for n, message in enumerate(value, 1):
        try:
            read.append(_read(message))
        except RecordError as error:
            raise RecordError(f"turn {n}: {error}") from None
    apply_flags(read, flags or {})
    joined: list[dict] = []
    for n, message in enumerate(read, 1):
        is_call = message.pop("is_call")
        if is_call and joined and joined[-1]["role"] == "assistant":
            if joined[-1]["weight"] != message["weight"]:
                raise RecordError(f"turn {n}: expected the weight of the assistant's turn before it, found another; give both the same")
            joined[-1]["extra"].setdefault("tool_calls", []).extend(message["extra"].pop("tool_calls"))
            joined[-1]["extra"] = message["extra"] | joined[-1]["extra"]
        else:
            joined.append(message)
    return [make_message(**message) for message in joined]


def _read(message: Any) -> dict:
    """Convert one message; its extra stays an object."""
    if not isinstance(message, dict):
        raise RecordError(f"expected a message with role and content, found {show(message)}")
    named = message.get("role", message.get("from"))
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise RecordError(f"expected a role (system, developer, user, human, assistant, gpt, tool, observation, function_call, or another "
                          f"name of one), found {show(named)}")
    extra = {key: value for key, value in message.items() if key not in KEYS and value is not None}
    content = message.get("content", message.get("value"))
    weight = take_weight(extra)
    for key in {"id", "tool_call_id"} & extra.keys():
        extra[key] = str(extra[key])
    if role == CALL:
        thought, _, rest = content.rpartition("</think>") if isinstance(content, str) else ("", "", content)
        if is_given(thought := thought.replace("<think>", "").strip()):
            extra["reasoning_content"] = thought
        extra = {"tool_calls": calls_in_text(rest)} | extra
        return {"role": "assistant", "content": "", "extra": extra, "weight": weight, "is_call": True}
    if role == "assistant":
        content = _read_answer(message, content, extra)
    elif role == "tool":
        content = _read_result(content)
    else:
        content = "" if role in ("system", "developer") and _is_blank(content) else as_text(content)
    if "tools" in extra:
        extra["tools"] = read_tools(extra["tools"], "tools")
    return {"role": role, "content": content, "extra": {key: value for key, value in extra.items() if value is not None}, "weight": weight,
            "is_call": False}


def _read_answer(message: dict, content: Any, extra: dict) -> str:
    """Return an assistant's words, and put its reasoning and its tool calls into `extra`."""
    thoughts = {key: _thought(message[key]) for key in REASONING_KEYS if is_given(message.get(key))}
    calls = read_calls(extra.pop("tool_calls", None))
    if is_given(legacy := extra.pop("function_call", None)):
        calls = calls or read_calls(legacy)
    if isinstance(content, list) and any(isinstance(part, dict) and part.get("type") in (*THOUGHTS, "tool_use") for part in content):
        found = [part for part in content if isinstance(part, dict)]
        if text := "".join(_thought(part.get(part["type"], part.get("text"))) for part in found if part.get("type") in THOUGHTS):
            thoughts["content"] = text
        calls = calls or read_calls([part for part in found if part.get("type") == "tool_use"])
        content = [part for part in content if not isinstance(part, dict) or part.get("type") not in (*THOUGHTS, "tool_use")]
    if len({text.strip() for text in thoughts.values()}) > 1:
        raise RecordError(f"expected one reasoning, found different texts in {' and '.join(thoughts)}; keep one of them")
    if thoughts:
        extra["reasoning_content"] = next(iter(thoughts.values()))
    if calls:
        extra["tool_calls"] = calls
    return "" if (calls or thoughts) and _is_blank(content) else as_text(content)


def _thought(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):  # Mistral nests text parts
        value = "".join(str(part.get("text") or part.get("thinking") or "") for part in value)
    return as_text(value, "reasoning")


def _read_result(content: Any) -> str:
    """Return a tool's result as text: a string, the text of parts, or any other value as JSON."""
    if isinstance(content, str):
        return content
    if content is None or content == []:
        return ""
    return join_parts(content) if is_parts(content) else json.dumps(content, ensure_ascii=False, default=str)


def _is_blank(content: Any) -> bool:
    return not is_given(content) or is_parts(content) and not join_parts(content).strip()
