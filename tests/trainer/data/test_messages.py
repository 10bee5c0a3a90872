"""Messages in every spelling become ours: roles, calls as text, empty ones, content in parts, reasoning."""

import json

import pytest

from trainer.data.messages import read_messages
from trainer.data.values import RecordError

CALL = {"name": "room_temp", "arguments": {"room": "attic"}}
FUNCTION = {"type": "function", "function": CALL}


def roles(*turns) -> list[tuple]:
    return [(m["role"], m["content"], json.loads(m["extra"] or "{}")) for m in read_messages(list(turns), "messages")]


@pytest.mark.parametrize("ours, spellings", [
    ("user", ("user", "human", "User", " USER ", "prompter")), ("assistant", ("assistant", "gpt", "bot", "model", "chatgpt", "ai")),
    ("tool", ("tool", "observation", "function", "ipython", "tool_response", "tool_result", "function_response")),
    ("system", ("system", "System"))])
def test_the_names_of_roles(ours, spellings):
    for name in spellings:
        assert roles({"from": name, "value": "words"}) == [(ours, "words", {})] == roles({"role": name, "content": "words"})


CALL_TEXTS = [json.dumps(CALL), json.dumps([CALL]), CALL, [CALL], f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", json.dumps(FUNCTION),
              json.dumps(CALL | {"arguments": json.dumps(CALL["arguments"])})]


@pytest.mark.parametrize("value", CALL_TEXTS)
@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_a_call_as_a_message_is_the_assistants(role, value):
    assert roles({"from": "human", "value": "Q"}, {"from": role, "value": value}) == [("user", "Q", {}),
                                                                                      ("assistant", "", {"tool_calls": [FUNCTION]})]


def test_calls_in_a_row_are_one_turn_with_the_words_before_them():
    two = roles({"role": "user", "content": "Q"}, {"role": "assistant", "content": "Let me look."},
                {"role": "tool_call", "content": json.dumps(CALL)},
                {"role": "tool_call", "content": json.dumps(CALL) + "\n" + json.dumps(CALL)}, {"role": "tool_response", "content": "1"})
    assert two == [("user", "Q", {}), ("assistant", "Let me look.", {"tool_calls": [FUNCTION] * 3}), ("tool", "1", {})]


def test_the_legacy_function_call_of_a_message():
    legacy = {"name": "room_temp", "arguments": '{"room": "attic"}'}
    assert roles({"role": "assistant", "content": None, "function_call": legacy},
                 {"role": "function", "name": "room_temp", "content": "31"}) == [
        ("assistant", "", {"tool_calls": [FUNCTION]}), ("tool", "31", {"name": "room_temp"})]


@pytest.mark.parametrize("value", ["not json", "", None, "[]", '{"arguments": {}}', '{"name": "f", "arguments": [1]}'])
def test_a_call_that_is_none_names_its_turn(value):
    with pytest.raises(RecordError, match="^turn 1: "):
        roles({"from": "function_call", "value": value})


def test_empty_messages():
    assert roles({"role": "system", "content": ""}, {"role": "tool", "content": ""}) == [("system", "", {}), ("tool", "", {})]
    for role in ("user", "assistant"):
        with pytest.raises(RecordError, match="turn 1: expected text, found an empty string"):
            roles({"role": role, "content": " "})
    assert roles({"role": "assistant", "content": None, "tool_calls": [CALL]}) == [("assistant", "", {"tool_calls": [FUNCTION]})]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_every_key(key):
    assert roles({"role": "assistant", "content": "4", key: "two and two"}) == [("assistant", "4", {"reasoning_content": "two and two"})]
    assert roles({"role": "assistant", "content": "4", key: ""}) == [("assistant", "4", {})]


def test_reasoning_in_parts_and_twice():
    for part in ({"type": "thinking", "thinking": "why"}, {"type": "reasoning", "text": "why"},
                 {"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}):
        assert roles({"role": "assistant", "content": [part, {"type": "text", "text": "A"}]}) == [("assistant", "A",
                                                                                                   {"reasoning_content": "why"})]
    used = [{"type": "text", "text": "A"}, {"type": "tool_use", "id": "c1", "name": "room_temp", "input": {"room": "attic"}}]
    assert roles({"role": "assistant", "content": used}) == [("assistant", "A", {"tool_calls": [{"id": "c1", **FUNCTION} | {"id": "c1"}]})]
    assert roles({"role": "assistant", "content": "A", "reasoning": "why",
                  "reasoning_content": "why"})[0][2] == {"reasoning_content": "why"}
    with pytest.raises(RecordError, match="turn 1: expected one reasoning, found different texts in reasoning_content and reasoning"):
        roles({"role": "assistant", "content": "A", "reasoning": "why", "reasoning_content": "how"})


def test_ids_are_text():
    assert roles({"role": "tool", "content": "1", "tool_call_id": 7}) == [("tool", "1", {"tool_call_id": "7"})]


def test_reasoning_before_a_call():
    text = "<think>\nI should look.\n</think>\n" + json.dumps(CALL)
    assert roles({"from": "function_call", "value": text}) == [("assistant", "",
                                                                {"tool_calls": [FUNCTION], "reasoning_content": "I should look."})]
