"""Prefixes and stops of real chat templates: TRL's, and others written here from their published formats."""

import datetime

import pytest

from synth.engines.chat_format import ChatFormat, load_format
from tests.helpers import tiny
from tests.helpers.chat_templates import PUBLISHED, read, tokenizer_for
from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError

TURNS = "{% for m in messages %}"
# As their model cards and reference code format chats.
WRITTEN = {
    "llama2": "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
              "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}" + TURNS +
              "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content.strip() + ' [/INST]' }}"
              "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral_v1": "{{ bos_token }}" + TURNS + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
                  "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "mistral_v3": "{{ bos_token }}" + TURNS + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
                  "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "mistral_tekken": "{{ bos_token }}" + TURNS + "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
                      "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
                      "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "granite": TURNS + "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
    "smollm": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}"
              "{% endif %}" + TURNS + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "zephyr": TURNS + "{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
}
SPECIAL = {"llama2": "", "mistral_v1": "", "mistral_v3": "[INST][/INST]",
           "mistral_tekken": "[INST][/INST][SYSTEM_PROMPT][/SYSTEM_PROMPT]", "zephyr": ""}
NAMES = [*PUBLISHED, *WRITTEN]
DAY = datetime.date(2025, 1, 1)


def make(name: str) -> ChatFormat:
    if name not in WRITTEN:
        return ChatFormat(ChatTemplate(tokenizer_for(read(name)), read(name), name, DAY))
    tokenizer = tokenizer_for(SPECIAL.get(name, WRITTEN[name]))
    tokenizer.eos_token = "</s>" if name != "smollm" else "<|im_end|>"
    return ChatFormat(ChatTemplate(tokenizer, WRITTEN[name], name, DAY))


def tokens(format: ChatFormat, text: str) -> list[int]:
    return format.tokenizer(text, add_special_tokens=False).input_ids


def decoded(format: ChatFormat, ids) -> set[str]:
    return {format.tokenizer.decode([i]) for i in ids}


QUESTION, ANSWER = {"role": "user", "content": "Name two rivers."}, {"role": "assistant", "content": "Here are two."}


@pytest.mark.parametrize("history", [[], [QUESTION, ANSWER]], ids=["first turn", "second turn"])
@pytest.mark.parametrize("name", NAMES)
def test_a_users_turn_continues_the_prefix_and_ends_with_a_stop(name, history):
    """Whatever the user says, the tokens of the whole chat are the prefix, the words, and then a stop; no stop comes earlier."""
    format = make(name)
    prefix = format.user_prompt(history)
    for words in ("What is 3 + 4?", "2 foxes", "é", "写一首诗"):
        chat = [*history, {"role": "user", "content": words}]
        # what closes a turn may be printed only before the next one
        ids = tokens(format, format.template.render(chat, add_generation_prompt=True))
        assert tuple(ids[:len(prefix.token_ids)]) == prefix.token_ids
        rest = ids[len(prefix.token_ids):]
        stop = next((i for i, token in enumerate(rest) if token in format.user_stops.ids), len(rest))
        said = format.tokenizer.decode(rest[:stop])
        for text in format.user_stops.texts:
            said = said.partition(text)[0]
        assert said.removeprefix(prefix.rest).strip() == words, (name, said)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_continues_the_response_prompt_and_ends_with_a_stop(name):
    format = make(name)
    prompt = format.response_prompt([QUESTION])
    for following in ([], [QUESTION, ANSWER]):
        text = format.template.render([QUESTION, ANSWER, *following])
        ids = tokens(format, text)
        start = len(tokens(format, text[:text.index(ANSWER["content"])]))
        stop = next((i for i, token in enumerate(ids) if token in format.response_stops.ids and i > start), len(ids))
        assert following == [] or stop < len(ids) or name in ("gptoss", "muse_glimmer"), (name, decoded(format, format.response_stops.ids))
        if name not in ("gptoss", "muse_glimmer"):
            assert format.tokenizer.decode(ids[start:stop]).strip().removesuffix("<|END_RESPONSE|>") == ANSWER["content"]
    assert QUESTION["content"] in format.tokenizer.decode(prompt)


EXPECTED = {  # name: end of the prefix, some user stops, all response stops
    "llama3_1": ("<|start_header_id|>user<|end_header_id|>\n\n", {"<|eot_id|>", "<|start_header_id|>"}, {"<|eot_id|>", "<|im_end|>"}),
    "gemma": ("<start_of_turn>user\n", {"<end_of_turn>", "<start_of_turn>"}, {"<end_of_turn>", "<|im_end|>"}),
    "gptoss": ("<|start|>user<|message|>", {"<|end|>", "<|start|>"}, {"<|return|>", "<|im_end|>"}),
    "glm4moe": ("<|user|>\n", {"<|user|>", "<|assistant|>"}, {"<|user|>", "<|im_end|>"}),
    "phi3": ("<|user|>\n", {"<|end|>", "<|assistant|>", "<|user|>"}, {"<|end|>", "<|im_end|>"}),
    "cohere2": ("<|USER_TOKEN|>", {"<|END_OF_TURN_TOKEN|>"}, {"<|END_RESPONSE|>", "<|im_end|>"}),
    "deepseekv3": ("<｜User｜>", {"<｜Assistant｜>", "<｜User｜>"}, {"<｜end▁of▁sentence｜>", "<|im_end|>"}),
    "qwen2_5": ("You are a helpful assistant.<|im_end|>\n<|im_start|>user\n", {"<|im_end|>", "<|im_start|>"}, {"<|im_end|>"}),
    "smollm": ("named SmolLM<|im_end|>\n<|im_start|>user\n", {"<|im_end|>"}, {"<|im_end|>"}),
    "mistral_v3": ("[INST]", {"[/INST]", "</s>"}, {"</s>"}),
    "zephyr": ("user|>\n", {"</s>"}, {"</s>"}),
}


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items(), ids=EXPECTED)
def test_prefixes_and_stops_are_those_of_the_published_formats(name, expected):
    format, (ending, user, response) = make(name), expected
    assert format.tokenizer.decode(format.user_prompt([]).token_ids).endswith(ending)
    assert user <= decoded(format, format.user_stops.ids)
    if name == "deepseekv3":
        assert decoded(format, format.response_stops.ids) >= response
    else:
        assert decoded(format, format.response_stops.ids) == response


def test_text_that_ends_a_turn_is_a_stop_only_where_no_token_does():
    assert make("llama2").user_stops.texts == make("mistral_v1").user_stops.texts == ("[/INST]",)
    assert all(make(name).user_stops.texts == () for name in NAMES if name not in ("llama2", "mistral_v1"))


def test_a_space_that_belongs_to_the_first_word_is_left_to_the_model():
    prefix = make("llama2").user_prompt([])
    assert (prefix.rest, make("llama2").tokenizer.decode(prefix.token_ids)) == (" ", "<s>[INST]")
    assert prefix.token_ids.count(make("llama2").tokenizer.bos_token_id) == 1


def test_a_system_prompt_is_in_the_prefix():
    format = make("qwen2_5")
    assert "Be brief." in format.tokenizer.decode(format.user_prompt([], "Be brief.").token_ids)
    with pytest.raises(UserError, match="System role not supported"):
        make("gemma").user_prompt([], "Be brief.")


def test_dates_are_pinned():
    assert "Today Date: 01 Jan 2025" in make("llama3_2").tokenizer.decode(make("llama3_2").user_prompt([]).token_ids)


def test_the_answer_is_the_final_channel():
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Two."
    assert make("gptoss").final_answer(said) == "Two."
    assert make("gptoss").final_answer("<|channel|>analysis<|message|>Hm, and then") is None
    assert make("llama3").final_answer("Two.") == "Two."
    assert make("nemotron_3_nano").final_answer("Hm.</think>Two.") == "<think>Hm.</think>Two."


def test_leaked_special_tokens_are_seen():
    assert make("llama3").leaked_token("one <|eot_id|> two") == "<|eot_id|>" and make("llama3").leaked_token("a | b") is None


@pytest.mark.parametrize(("template", "reason"), [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "prints nothing before them"),
    ("{{ bos_token }}{{ messages | length }}", "does not print a user's words"),
    ("{% for m in messages %}{{ m.content | length }}|{{ m.content }}<|im_end|>{% endfor %}", "depends on them|each message"),
])
def test_templates_without_a_prefix_are_refused_with_the_reason(template, reason):
    with pytest.raises(UserError, match=f"chat template of x: cannot be used to sample instructions: .*({reason})"):
        ChatFormat(ChatTemplate(tiny.tokenizer(), template, "x"))


def test_the_generation_config_knows_more_ends(tmp_path, tokenizer):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    format = load_format(str(tmp_path), tokenizer, "2025-01-01")
    assert {3, 7, tokenizer.eos_token_id} <= set(format.response_stops.ids) and {3, 7} <= set(format.user_stops.ids)
    assert load_format("nowhere", tokenizer, "2025-01-01").eos_ids == ()


@pytest.mark.parametrize("history", [[], [QUESTION, ANSWER]], ids=["first turn", "second turn"])
@pytest.mark.parametrize("answers", ["12345", "AB"])
@pytest.mark.parametrize("name", NAMES)
def test_an_answers_first_token_comes_where_the_template_prints_it(name, history, answers):
    """The tokens of a chat whose last turn is one character are the prompt, and then that: reasoning is closed, the channel marked."""
    format = make(name)
    token_ids, rest = format.choice_prompt([*history, QUESTION], answers)
    if name.startswith("deepseek"):  # it opens thoughts in its prompt, and prints none in its last turn
        assert (token_ids, rest) == ((*format.response_prompt([*history, QUESTION]), *tokens(format, "\n</think>\n\n")), "")
        return
    for answer in answers:
        whole = format.template.render([*history, QUESTION, {"role": "assistant", "content": answer}])
        ids = tokens(format, whole)
        assert tuple(ids[:len(token_ids)]) == token_ids
        assert format.tokenizer.decode(ids[len(token_ids):]).startswith(rest + answer)


def test_a_system_prompt_stands_before_an_answer():
    token_ids, rest = make("llama3").choice_prompt([QUESTION], "12345", "Be brief.")
    assert "Be brief." in make("llama3").tokenizer.decode(token_ids) and rest == ""
