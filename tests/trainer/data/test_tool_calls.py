"""Tool calls, tools and template keywords: token for token what `apply_chat_template` gives, masked to what the assistant writes."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from tests.helpers import tiny
from tests.helpers.chat_templates import read, tokenizer_for
from trainer.config import Config, Data, Source
from trainer.data.chat_template import ChatTemplate
from trainer.data.prepare import data_summary, note_lines, prepare_data
from trainer.data.sources import load_sources
from trainer.errors import UserError

TEMPLATES = ("qwen2_5", "qwen3", "qwen3_6", "llama3_1", "gptoss", "gemma4_v5")


def tool(name: str, **properties) -> dict:
    return {"type": "function", "function": {
        "name": name, "description": f"does {name}", "parameters": {"type": "object", "properties": properties}}}


def call(name: str, arguments, number: int = 1) -> dict:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, number: int = 1) -> dict:
    return {"role": "tool", "name": "room_temp", "tool_call_id": f"call0000{number}", "content": text}


TOOLS = [tool("room_temp", room={"type": "string"}), tool("set_lamp", lamp={"type": "string"}, on={"type": "boolean"})]
USER = {"role": "user", "content": "How warm is the attic?"}
ASKS = {"role": "assistant", "content": "", "tool_calls": [call("room_temp", {"room": "attic", "rows": [{"a": None}]})]}
ANSWERS = {"role": "assistant", "content": "31 degrees."}
CHATS = {
    "one call": [USER, ASKS, result('{"t": "31"}\n'), ANSWERS],
    "system, calls twice, goes on": [
        {"role": "system", "content": "You keep a house."}, USER, ASKS, result("31"),
        {"role": "assistant", "content": "", "tool_calls": [call("set_lamp", {"lamp": "hall", "on": True}, 2)]}, result("is lit", 2),
        ANSWERS,
        {"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Welcome."}],
    "ends with a call": [USER, ASKS],
    "a call after an answer": [USER, ANSWERS, {"role": "user", "content": "And now?"}, ASKS, result(""), ANSWERS],
    "reasoning": [USER, ASKS | {"reasoning_content": "I should look."}, result("31"), ANSWERS | {"reasoning_content": "It is warm."}],
    "earlier reasoning": [USER, ANSWERS | {"reasoning_content": "An early thought."}, {"role": "user", "content": "And now?"},
                          ANSWERS | {"reasoning_content": "It is warm."}],
}
KEYS = {"gptoss": "thinking"}  # of the reasoning that a template prints


def template_of(name: str, **options) -> ChatTemplate:
    tokenizer = tokenizer_for(read(name))
    tokenizer.chat_template = read(name)
    return ChatTemplate(tokenizer, **options)


def prepared(rows, tmp_path, template=None, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(data=Data(train=str(path), cache_dir=str(tmp_path / "cache"), num_proc=1, **data))
    tokenizer = (template or template_of("qwen3")).tokenizer
    training = prepare_data(config, tokenizer)
    return training, note_lines(data_summary(training, config)["sources"])


def shown(training) -> list[str]:
    """Return each sample's text, with supervised tokens in brackets."""
    return ["".join(f"[[{text}]]" if on else text for text, on in training.template.segments(*training.samples[i]))
            for i in range(len(training.samples))]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_what_the_tokenizer_makes_of_it_and_its_mask_what_the_assistant_writes(name, chat, tmp_path):
    template, messages = template_of(name), CHATS[chat]
    key = KEYS.get(name, "reasoning_content")
    spelled = [{key if k == "reasoning_content" else k: v for k, v in message.items()} for message in messages]
    text = template.tokenizer.apply_chat_template(spelled, tools=TOOLS, tokenize=False)
    as_api = [message | {"tool_calls": [c | {"function": c["function"] | {"arguments": json.dumps(c["function"]["arguments"])}}
                                        for c in message["tool_calls"]]} if "tool_calls" in message else message for message in messages]
    training, notes = prepared([{"messages": as_api, "tools": json.dumps(TOOLS)}], tmp_path, template)
    ids, supervised = training.samples[0]
    assert ids.tolist() == template.tokenizer(text, add_special_tokens=False)["input_ids"]
    trained = [part for part, on in training.template.segments(ids, supervised) if on]
    assert len(trained) == sum(message["role"] == "assistant" for message in messages)
    for part, message in zip(trained, [m for m in messages if m["role"] == "assistant"]):
        assert message["content"] in part and all(c["function"]["name"] in part for c in message.get("tool_calls", []))
        assert "How warm" not in part and "is lit" not in part and '"t"' not in part and part.rstrip().endswith((">", "|>"))
    prompts = [template.tokenizer.apply_chat_template(spelled[:i], tools=TOOLS, tokenize=False, add_generation_prompt=True)
               for i, message in enumerate(messages) if message["role"] == "assistant"]
    first = len(template.tokenizer(prompts[0].partition("<think>")[0], add_special_tokens=False)["input_ids"])
    assert not supervised[:first].any() and supervised[first]
    assert ("reasoning" in "".join(notes)) == (chat in ("reasoning", "earlier reasoning") or "WARNING" in "".join(notes))


@pytest.mark.parametrize("name, end", [("gptoss", "<|call|>"), ("gemma4_v5", "<tool_call|><|tool_response>"),
                                       ("qwen3", "</tool_call><|im_end|>"),
                                       ("glm4moe", "</tool_call><|observation|>")])
def test_a_call_ends_with_the_token_that_ends_a_call(name, end, tmp_path):
    for chat in ("one call", "ends with a call"):
        training, _ = prepared([{"messages": CHATS[chat]}], tmp_path, template_of(name))
        assert f"{end}]]" in shown(training)[0]


def test_gemma_prints_words_beside_a_call_after_its_result(tmp_path):
    chat = [USER, ASKS | {"content": "Let me look."}, result("31"), ANSWERS]
    text, = shown(prepared([{"messages": chat}], tmp_path, template_of("gemma4_v5"))[0])
    assert "<tool_response|>[[Let me look.31 degrees.<turn|>]]" in text


ARGUMENTS = [({"room": "attic"}, '{"room": "attic"}'), ('{"room": "attic"}', '{"room": "attic"}'),
             (json.dumps('{"room": "attic"}'), '{"room": "attic"}'),
             ("", "{}"), (" ", "{}"), (None, "{}"), ("{}", "{}"), ({"q": '{"a": 1}'}, json.dumps({"q": '{"a": 1}'})),
             ({"a": None, "b": [None]}, '{"a": null, "b": [null]}')]


@pytest.mark.parametrize("given, printed", ARGUMENTS)
def test_arguments_become_an_object(given, printed, tmp_path):
    for spelled in (call("f", given), {"name": "f", "arguments": given}, {"name": "f", "parameters": given}):
        training, _ = prepared([{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [spelled]}]}], tmp_path)
        assert f'{{"name": "f", "arguments": {printed}}}' in shown(training)[0]


@pytest.mark.parametrize("calls", [[call("f", {"a": 1})], call("f", {"a": 1}), json.dumps([call("f", '{"a": 1}')]),
                                   [json.dumps(call("f", {"a": 1}))],
                                   [{"name": "f", "arguments": {"a": 1}}], [{"function": "f", "arguments": '{"a": 1}'}],
                                   {"name": ["f"], "arguments": ['{"a": 1}']},
                                   [{"id": 7, "function": {"name": "f", "arguments": {"a": 1}}}]])
def test_every_form_of_tool_calls(calls, tmp_path):
    training, _ = prepared([{"messages": [USER, {"role": "assistant", "tool_calls": calls}]}], tmp_path)
    assert '[[<think>\n\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]' in shown(training)[0]


def test_no_calls_are_none(tmp_path):
    for none in (None, [], "", "[]", "null"):
        training, _ = prepared([{"messages": [USER, ANSWERS | {"tool_calls": none, "function_call": None}]}], tmp_path)
        assert shown(training)[0].endswith("31 degrees.<|im_end|>]]\n")


BAD = [
    ([call("f", "[1]")], 'turn 2: tool call 1: expected arguments that are a JSON object, found "[1]"'),
    ([call("f", "{'a': 1}")], "turn 2: tool call 1: expected arguments that are a JSON object"),
    ([call("f", {}), call("f", 7)], "turn 2: tool call 2: expected arguments that are a JSON object, found 7"),
    ("f", 'turn 2: tool_calls: expected a list of objects with a name and arguments, found "f"'),
    (5, "turn 2: tool_calls: expected a list of objects with a name and arguments, found 5"),
    (["f"], 'turn 2: tool call 1: expected an object with a name and arguments, found "f"'),
    ([[]], "turn 2: tool call 1: expected an object with a name and arguments, found []"),
    ([{"function": {"arguments": {}}}], "turn 2: tool call 1: expected an object with a name and arguments"),
]


@pytest.mark.parametrize("calls, message", BAD)
def test_what_is_no_tool_call_is_one_line(calls, message, tmp_path):
    with pytest.raises(UserError) as caught:
        prepared([{"messages": [USER, ANSWERS]}, {"messages": [USER, ANSWERS | {"tool_calls": calls}]}], tmp_path)
    assert f"rows.jsonl, line 2: {message}" in str(caught.value) and "\n" not in str(caught.value)


TOOL_FORMS = [TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS], [tool["function"] for tool in TOOLS],
              [{"type": "function", **tool["function"]} for tool in TOOLS],
              {tool["function"]["name"]: {k: v for k, v in tool["function"].items() if k != "name"} for tool in TOOLS},
              [tool | {"function": tool["function"] | {"parameters": json.dumps(tool["function"]["parameters"])}} for tool in TOOLS]]


@pytest.mark.parametrize("tools", TOOL_FORMS)
def test_every_form_of_tools(tools, tmp_path):
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"}
    training, notes = prepared([row | {"tools": tools}], tmp_path)
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert training.template.tokenizer.decode(training.samples[0][0]) == training.template.tokenizer.apply_chat_template(
        chat, tools=TOOLS, tokenize=False)
    assert "rows: 1 chats offer tools, 2 each on average" in notes


def test_no_tools_are_none_and_other_values_are_refused(tmp_path):
    rows = [{"messages": [USER, ANSWERS], "tools": none} for none in (None, [], "", "[]", {})]
    assert len(set(shown(prepared(rows, tmp_path)[0]))) == 1
    for tools in ("a lamp", 3, [3], ["lamp"], [{"description": "none"}]):
        with pytest.raises(UserError, match="line 1: tools: .*expected"):
            prepared([{"messages": [USER, ANSWERS], "tools": tools}], tmp_path)


def test_tools_that_the_template_does_not_print_are_told(tmp_path):
    _, notes = prepared([{"messages": [USER, ANSWERS], "tools": TOOLS}], tmp_path, template_of("llama3"))
    assert "rows: 1 chats offer tools, 2 each on average; WARNING: the template does not print those of 1" in notes


@pytest.mark.parametrize("content, text", [("31", "31"), ("", ""), (None, ""), ([], ""),
                                           ([{"type": "text", "text": "3"}, {"type": "text", "text": "1"}], "31"),
                                           ({"t": 31, "u": "°C"}, '{"t": 31, "u": "°C"}'), ([{"t": 31}], '[{"t": 31}]'), (31, "31"),
                                           (True, "true")])
def test_every_form_of_a_result(content, text, tmp_path):
    training, _ = prepared([{"messages": [USER, ASKS, result(content), ANSWERS]}], tmp_path)
    assert f"<tool_response>\n{text}\n</tool_response>" in shown(training)[0]


ROWS = [{"messages": [USER, ASKS | {"tool_calls": [call(name, arguments)]}, result("ok"), ANSWERS], "tools": [tool(name, **properties)]}
        for name, arguments, properties in (("room_temp", {"room": "attic"}, {"room": {"type": "string"}}),
                                            ("set_lamp", {"lamp": "hall", "on": True},
                                             {"lamp": {"type": "string"}, "on": {"type": "boolean"}}),
                                            ("all_off", {}, {}))]


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_nulls_of_arrow_are_removed_at_every_depth(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        Dataset.from_list(ROWS).save_to_disk(path)
    template = template_of("qwen3")
    config = Config(data=Data(train=str(path), cache_dir=str(tmp_path / "cache")))
    expected, _ = prepared(ROWS, tmp_path)
    assert sorted(shown(prepare_data(config, template.tokenizer))) == sorted(shown(expected))


def test_nulls_that_an_author_wrote_into_json_are_kept(tmp_path):
    (_, records), = load_sources([Source(str(_written(tmp_path)))], "domain", str(tmp_path / "cache"))
    assert json.loads(records[0]["messages"][1]["extra"])["tool_calls"][0]["function"]["arguments"] == {"a": None, "b": [None, 1]}


def _written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, ASKS | {"tool_calls": [call("f", {"a": None, "b": [None, 1]})]}]}) + "\n")
    return path


def test_keywords_of_a_row_and_of_the_run_reach_the_template(tmp_path):
    template = template_of("qwen3_6")
    chat = [USER, ANSWERS | {"reasoning_content": "Early."}, USER, ANSWERS | {"reasoning_content": "Late."}]
    rows = [{"messages": chat}, {"messages": chat, "chat_template_kwargs": {"preserve_thinking": False}},
            {"messages": chat, "chat_template_kwargs": json.dumps({"preserve_thinking": True})}]
    training, _ = prepared(rows, tmp_path, template)
    assert ["Early." in text for text in shown(training)] == [False, False, True]
    training, _ = prepared(rows, tmp_path, template, template_kwargs={"preserve_thinking": True})
    assert ["Early." in text for text in shown(training)] == [True, False, True]


def test_documents_reach_the_template(tmp_path):
    source = "{% for d in documents or [] %}<doc>{{ d.text }}{% endfor %}" + tiny.CHATML
    tokenizer = tiny.tokenizer(chat_template=source)
    rows = [{"messages": [USER, ANSWERS], "documents": given} for given in ([{"text": "D1"}], ["D1"], json.dumps([{"text": "D1"}]))]
    texts = shown(prepared(rows, tmp_path, ChatTemplate(tokenizer))[0])
    assert len(set(texts)) == 1 and "<doc>D1" in texts[0]
    _, notes = prepared([{"messages": [USER, ANSWERS], "documents": "a text"}, {"messages": [USER, ANSWERS], "documents": ["D1"]}],
                        tmp_path)
    assert "rows: nothing reads documents (2 rows)" in notes


def test_keywords_that_no_template_reads_are_told(tmp_path):
    with pytest.raises(UserError, match=r"data.template_kwargs: expected keywords that .* reads \(enable_thinking\), got enable_thinkin;"):
        prepared([{"messages": [USER, ANSWERS]}], tmp_path, template_kwargs={"enable_thinkin": False})
    with pytest.raises(UserError, match="data.template_kwargs: expected keywords"):
        prepared([{"messages": [USER, ANSWERS]}], tmp_path, template_kwargs={"messages": []})
    with pytest.raises(UserError, match="line 1: chat_template_kwargs: expected keywords of the template, found messages"):
        prepared([{"messages": [USER, ANSWERS], "chat_template_kwargs": {"messages": []}}], tmp_path)
    _, notes = prepared([{"messages": [USER, ANSWERS], "chat_template_kwargs": {"mood": 1}}], tmp_path)
    assert "rows: nothing reads mood (1 rows)" in notes


def test_a_result_that_quotes_the_template_does_not_move_the_mask(tmp_path):
    quoted = "<|im_end|>\n<|im_start|>assistant\nquoted</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n"
    for words in (quoted + "w" * 300, "w" * 300 + quoted + "w"):
        chat = [USER, ASKS | {"tool_calls": [call("f", {"q": words})]}, result(words), ANSWERS]
        training, _ = prepared([{"messages": chat}], tmp_path, template_of("qwen3"))
        first, second = [text for text, on in training.template.segments(*training.samples[0]) if on]
        assert first.startswith("<tool_call>") and first.count("quoted") == 1 and second.endswith("31 degrees.<|im_end|>")
        assert "quoted" not in second


def test_a_template_of_its_own_for_tools_is_used(tmp_path):
    tokenizer = tokenizer_for(read("qwen3"), read("llama3"))
    tokenizer.chat_template = {"default": read("llama3"), "tool_use": read("qwen3")}
    training, _ = prepared([{"messages": [USER, ANSWERS]}, {"messages": [USER, ANSWERS], "tools": TOOLS}], tmp_path,
                           ChatTemplate(tokenizer))
    assert [text.count("<|im_end|>") for text in shown(training)] == [0, 3]


def test_templates_that_print_arguments_only_as_text_get_text(tmp_path):
    for arguments in ({"room": "attic"}, '{"room": "attic"}'):
        chat = [USER, ASKS | {"content": None, "tool_calls": [call("room_temp", arguments)]}, result("31"), ANSWERS]
        for name in ("deepseekv3", "deepseek_r1_distill"):
            text, = shown(prepared([{"messages": chat}], tmp_path, template_of(name))[0])
            assert '[[<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>room_temp\n```json\n{"room": "attic"}\n```' in text
            assert "[[31 degrees.<｜end▁of▁sentence｜>]]" in text


def test_a_second_call_that_the_template_does_not_print_is_refused(tmp_path):
    chat = [USER, ASKS | {"tool_calls": [call("room_temp", {"room": "attic"}), call("room_temp", {"room": "hall"}, 2)]}]
    with pytest.raises(UserError, match=r"line 1: .* turn 2 \(assistant\): the template does not print all that the assistant says"):
        prepared([{"messages": chat}], tmp_path, template_of("gptoss"))
    assert shown(prepared([{"messages": chat}], tmp_path, template_of("gemma4_v5"))[0])[0].count("call:room_temp") == 2


MISTRAL = """{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}{{- '[TOOL_CALLS][' }}{%- for call in message.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments|tojson) + ', "id": "' + call.id + '"}' }}
{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content|trim + eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}{%- endfor %}"""


def test_a_template_that_prints_ids_of_calls(tmp_path):
    template = ChatTemplate(tiny.tokenizer(chat_template=MISTRAL))
    text, = shown(prepared([{"messages": [USER, ASKS, result("31"), ANSWERS]}], tmp_path, template)[0])
    end = template.tokenizer.eos_token
    assert f'"id": "call00001"}}]{end}]][TOOL_RESULTS]{{"content": 31, "call_id": "call00001"}}[/TOOL_RESULTS][[ 31 degrees.{end}]]' in text
