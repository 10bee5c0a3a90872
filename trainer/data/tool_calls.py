"""Read tool calls and tool definitions in every form that files hold into OpenAI's form.

    a call        {"type": "function", "function": {"name": "room_temp", "arguments": {"room": "attic"}}, "id": ...}
    a definition  {"type": "function", "function": {"name": "room_temp", "description": ..., "parameters": {...}}}

Arguments are objects. OpenAI's API writes them as a string of JSON; templates print objects, and would encode the string a second time.
"""

from __future__ import annotations

import json
import re
from typing import Any

from trainer.data.values import RecordError, is_given, read_json, show

ARGUMENTS = ("arguments", "parameters", "args", "input")  # spellings of a call's arguments; the first is ours
CALL_TAGS = re.compile(r"</?(?:tool_call|tool_calls|functioncall|function_call)>")


def read_calls(value: Any) -> list[dict]:
    """Return the calls of a message's `tool_calls`.

    These are a list of objects, one object, or the JSON text of either. Raises RecordError where one is no object with a name, or its
    arguments are no JSON object.
    """
    calls = read_json(value)
    if not is_given(calls):
        return []
    if isinstance(calls, dict):
        calls = _from_lists(calls) or [calls]
    if not isinstance(calls, list):
        raise RecordError(f"tool_calls: expected a list of objects with a name and arguments, found {show(value)}; correct it")
    return [_read_call(read_json(call), n) for n, call in enumerate(calls, 1)]


def _from_lists(calls: dict) -> list[dict] | None:
    """Return calls that are stored as an object of lists, as `datasets` may do it; None if they are not."""
    lists = list(calls.values())
    if "name" not in calls and "function" not in calls or not all(isinstance(values,
                                                                             list) for values in lists) or len({*map(len, lists)}) > 1:
        return None
    return [dict(zip(calls, values)) for values in zip(*lists)]


def _read_call(call: Any, n: int) -> dict:
    if isinstance(call, dict) and isinstance(call.get("function"), str) and not isinstance(read_json(call["function"]), dict):
        call = {"name" if key == "function" else key: value for key, value in call.items()}
    function = read_json(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RecordError(f"tool call {n}: expected an object with a name and arguments, found {show(call)}; correct it")
    key = next((key for key in ARGUMENTS if key in function), ARGUMENTS[0])
    arguments = _read_arguments(function.get(key), n)
    function = {ARGUMENTS[0] if k == key else k: arguments if k == key else v for k, v in function.items() if k not in ("id", "type")}
    function.setdefault(ARGUMENTS[0], arguments)
    own = {k: v for k, v in call.items() if k in ("id", "type")} if "function" not in call else call
    own = {k: str(v) if k == "id" else v for k, v in own.items() if v is not None}
    wrapped = own if "function" in own else own | {"type": "function"}
    return wrapped | {"function": function}


def _read_arguments(value: Any, n: int) -> dict:
    arguments = read_json(value)
    if arguments is None or isinstance(arguments, str) and not arguments.strip():
        return {}
    if not isinstance(arguments, dict):
        raise RecordError(f"tool call {n}: expected arguments that are a JSON object, found {show(value)}; correct or remove the record")
    return arguments


def calls_in_text(text: Any) -> list[dict]:
    """Return the calls that a message of a role such as `function_call` holds.

    They are JSON objects, one after the other or in a list.
    """
    calls: list = read_calls(text) if isinstance(text, (dict, list)) else []
    rest, decoder = CALL_TAGS.sub(" ", text).strip() if isinstance(text, str) else "", json.JSONDecoder()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            raise RecordError(f"expected a tool call as JSON with a name and arguments, found {show(text)}; correct it") from None
        calls += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip(" \r\n\t,;")
    if not calls:
        raise RecordError("expected a tool call as JSON with a name and arguments, found none; complete or remove the record")
    return read_calls(calls)


def read_tools(value: Any, column: str) -> list[dict] | None:
    """Return the tool definitions of a record.

    `value` is a list of objects, its JSON text, one object, or an object of definitions by name. None where there are none. Raises
    RecordError for anything else.
    """
    tools = read_json(value)
    if not is_given(tools):
        return None
    if isinstance(tools, dict):
        tools = [tools] if "function" in tools or isinstance(tools.get("name"), str) else [_named(name, t) for name, t in tools.items()]
    if not isinstance(tools, list):
        raise RecordError(f"{column}: expected a list of tools, or its JSON text, found {show(value)}; correct it")
    return [_read_tool(read_json(tool), column, n) for n, tool in enumerate(tools, 1)]


def _named(name: str, definition: Any) -> Any:
    """Return the definition of the tool `name`, given as its function or as the schema of its parameters."""
    definition = read_json(definition)
    if not isinstance(definition, dict) or "function" in definition:
        return definition
    is_schema = "properties" in definition and "parameters" not in definition
    return {"name": name} | ({"parameters": definition} if is_schema else definition)


def _read_tool(tool: Any, column: str, n: int) -> dict:
    function = read_json(tool.get("function", tool)) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(f"{column}: tool {n}: expected an object with a name and parameters, found {show(tool)}; correct it")
    if isinstance(function.get("parameters"), str):
        function = function | {"parameters": read_json(function["parameters"])}
    if "function" in tool:
        return tool | {"function": function}
    return {"type": "function", "function": {key: value for key, value in function.items() if key != "type"}}
