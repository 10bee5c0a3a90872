"""Masks of chats.

The oracle: TRL ships real templates in pairs, as published and with `{% generation %}` markers set by hand.
"""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import tiny
from tests.helpers.chat_templates import PUBLISHED, TEMPLATES, encode, read, tokenizer_for
from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError

PAIRED = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))
ENDINGS = re.compile(r"(\s*<[^<> ]+>)+\s*")

SYSTEM = {"role": "system", "content": "Answer the question."}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **extra) -> dict:
    return {"role": "assistant", "content": content, **extra}


def turns(n: int) -> list[dict]:
    return [message for i in range(n) for message in (user(f"What is 3 + {i}?"), assistant(f"The answer is {i + 3}."))]


CHATS = {"one turn": turns(1), "three turns": turns(3),
         "system, one turn": [SYSTEM, *turns(1)], "system, two turns": [SYSTEM, *turns(2)]}


def supervised_text(template: ChatTemplate, chat: list[dict], train_on: str = "assistant") -> list[str]:
    return [text for text, on in template.segments(*encode(template, chat, train_on)) if on]


def differences(name: str, chat: list[dict]) -> list[str] | None:
    """Return the tokens that only one template of a pair supervises.

    None if the two render different text, or both refuse the chat.
    """
    published, marked = read(name), read(f"{name}_training")
    tokenizer = tokenizer_for(published, marked)
    try:
        derived = encode(ChatTemplate(tokenizer, published), chat)
    except UserError:
        with pytest.raises(UserError):
            encode(ChatTemplate(tokenizer, marked), chat)
        return None
    expected = encode(ChatTemplate(tokenizer, marked), chat)
    if derived.input_ids != expected.input_ids:
        return None
    assert sum(derived.supervised)
    return [tokenizer.decode([i]) for i, a, b in zip(derived.input_ids, derived.supervised, expected.supervised) if a != b]


# Five twins also mark what opens the turn, which a generation prompt prints and the model never does.
OPENINGS = {
    "deepseek_r1_distill": ["<｜Assistant｜>"], "deepseekv3": ["<｜Assistant｜>"], "qwen2_5": ["\n"],
    "gptoss": ["<|start|>", "as", "sistan", "t"], "muse_glimmer": ["<|start|>", "as", "sistan", "t"],
}


@pytest.mark.slow
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", PAIRED)
def test_the_derived_mask_is_the_one_that_was_set_by_hand(name, chat):
    differing = differences(name, chat) or []
    # White space after the end of turn may differ.
    assert {token for token in differing if token.strip()} <= set(OPENINGS.get(name, []))


@pytest.mark.slow
def test_the_oracle_covers_the_pairs():
    covered = {label: sum(differences(name, chat) is not None for name in PAIRED) for label, chat in CHATS.items()}
    assert len(PAIRED) == 31
    assert covered == {"one turn": 31, "three turns": 27, "system, one turn": 30, "system, two turns": 26}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_template_supervises_the_words_and_the_end_of_each_turn(name, chat):
    template = ChatTemplate(tokenizer_for(read(name)), read(name))
    if name == "gemma" and chat[0] == SYSTEM:
        with pytest.raises(UserError, match=r"refuses turn 1 \(system\): System role not supported"):
            encode(template, chat)
        return
    found = supervised_text(template, chat)
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    assert len(found) == len(answers)
    for text, words in zip(found, answers):
        before, _, after = text.partition(words)
        assert "What is" not in before and ENDINGS.fullmatch(after)


NASTY = st.text(alphabet=st.sampled_from("ab \n\té☃🙂"), max_size=6)
FAKES = st.sampled_from(["", "<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>\n<|im_start|>user\n", "<|eot_id|>",
                         "[/INST]", "<end_of_turn>\n"])
WORDS = st.builds(lambda a, fake, b: f"{a}{fake}x{b}", NASTY, FAKES, NASTY)
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
          "{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@pytest.mark.parametrize("name, end", [(None, "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("LLAMA2", " </s>")])
def test_words_that_look_like_a_template_do_not_move_the_mask(name, end, talk):
    source = {None: tiny.CHATML, "LLAMA2": LLAMA2}.get(name) or read(name)
    tokenizer = _cached_tokenizer(source)
    template = ChatTemplate(tokenizer, source)
    chat = [message for question, answer in talk for message in (user(question), assistant(answer))]
    ids, supervised = encode(template, chat)
    runs = template.segments(ids, supervised)
    strip = (lambda words: words) if name is None else str.strip
    lead = " " if name == "LLAMA2" else ""
    assert [text for text, on in runs if on] == [lead + strip(answer) + end for _, answer in talk]
    assert tokenizer.decode(ids) == template.render(chat)


_TOKENIZERS: dict = {}


def _cached_tokenizer(source: str):
    if source not in _TOKENIZERS:
        _TOKENIZERS[source] = tokenizer_for(source)
    return _TOKENIZERS[source]


@pytest.fixture
def chatml(tokenizer):
    return ChatTemplate(tokenizer)


def test_the_end_of_turn_is_supervised_and_there_is_one_bos(chatml):
    ids, supervised = encode(chatml, turns(2))
    bos, end = chatml.tokenizer.bos_token_id, chatml.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids[0] == bos and ids.count(bos) == 1 and not supervised[0]
    assert [on for token, on in zip(ids, supervised) if token == end] == [False, True, False, True]


def test_train_on(chatml):
    chat = [SYSTEM, *turns(3)]
    answers = [f"The answer is {i}.<|im_end|>" for i in (3, 4, 5)]
    assert supervised_text(chatml, chat) == answers
    assert supervised_text(chatml, chat, "last") == answers[-1:]
    ids, supervised = encode(chatml, chat, "all")
    assert supervised == [False] + [True] * (len(ids) - 1)
    assert ids == encode(chatml, chat).input_ids
    assert supervised_text(chatml, [*chat, user("And now?")], "last") == answers[-1:]
    assert supervised_text(chatml, [SYSTEM, user("And now?")]) == []


@pytest.mark.parametrize("name", ["phi3_training", "diffusion_gemma_training", "llama3_training"])
def test_the_last_turn_of_a_template_with_markers(name):
    template = ChatTemplate(tokenizer_for(read(name)), read(name))
    text = "".join(supervised_text(template, turns(3), "last"))
    assert text.startswith("The answer is 5.") and text.count("answer") == 1


def test_a_turn_that_a_user_or_an_answer_only_quotes_is_not_one(chatml):
    quoted = "<|im_end|>\n<|im_start|>assistant\nquoted<|im_end|>\n<|im_start|>user\n"
    for words in (quoted + "w" * 100, "w" * 100 + quoted + "w", quoted * 3 + "w"):
        chat = [user(words), assistant(words), user(words), assistant("A")]
        assert supervised_text(chatml, chat) == [words + "<|im_end|>", "A<|im_end|>"]


def test_a_batch_is_its_chats_one_by_one(chatml):
    chats = [turns(1), [SYSTEM, *turns(3)], turns(2)]
    assert chatml.encode_chats(chats) == [encode(chatml, chat) for chat in chats]


THOUGHT = [user("Q1"), assistant("<think>\nfirst thought\n</think>\n\nA1"),
           user("Q2"), assistant("<think>\nsecond thought\n</think>\n\nA2")]


def test_earlier_reasoning_is_masked_as_the_model_sees_it():
    template = ChatTemplate(tokenizer_for(read("qwen3")), read("qwen3"))
    assert supervised_text(template, THOUGHT) == ["A1<|im_end|>", "<think>\nsecond thought\n</think>\n\nA2<|im_end|>"]
    assert "first thought" not in "".join(text for text, _ in template.segments(*encode(template, THOUGHT)))
    plain = [user("Q1"), assistant("A1")]
    assert supervised_text(template, plain) == ["<think>\n\n</think>\n\nA1<|im_end|>"]
    given = [user("Q1"), assistant("A1", reasoning_content="a thought")]
    assert supervised_text(template, given) == ["<think>\na thought\n</think>\n\nA1<|im_end|>"]


def test_a_template_that_never_shows_reasoning():
    template = ChatTemplate(tokenizer_for(read("deepseek_r1_distill")), read("deepseek_r1_distill"))
    assert [text.strip() for text in supervised_text(template, THOUGHT)] == ["A1<｜end▁of▁sentence｜>", "A2<｜end▁of▁sentence｜>"]


def test_a_turn_that_the_template_leaves_open_is_ended_as_earlier_ones_are():
    template = ChatTemplate(tokenizer_for(read("glm4moe")), read("glm4moe"))
    assert supervised_text(template, turns(2)) == [f"\n<think></think>\nThe answer is {i}.<|user|>" for i in (3, 4)]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
TOOLS = [user("Add."), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "7"}, assistant("It is 7.")]


def test_tool_calls_are_supervised_and_results_are_not():
    template = ChatTemplate(tokenizer_for(read("qwen3")), read("qwen3"))
    call, answer = supervised_text(template, TOOLS)
    assert call == '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call><|im_end|>'
    assert answer.endswith("It is 7.<|im_end|>")


def test_tool_calls_that_the_template_does_not_print_are_refused():
    template = ChatTemplate(tokenizer_for(read("llama3")), read("llama3"))
    with pytest.raises(UserError, match=r"turn 2 \(assistant\): the template does not print all that the assistant says"):
        encode(template, TOOLS)


def test_a_template_of_parts_gets_parts():
    template = ChatTemplate(tokenizer_for(read("smolvlm")), read("smolvlm"))
    assert supervised_text(template, turns(1)) == [" The answer is 3.<end_of_utterance>"]


def test_a_chat_that_the_template_refuses_names_turn_and_reason():
    template = ChatTemplate(tokenizer_for(read("gemma")), read("gemma"))
    reason = "Conversation roles must alternate user/assistant/user/assistant/..."
    with pytest.raises(UserError, match=re.escape(f"refuses turn 1 (assistant): {reason}")):
        encode(template, turns(1)[1:])
    expected = f"data.jsonl, record 8: chat template of {template.name} refuses turn 4 (user): {reason}"
    with pytest.raises(UserError, match=re.escape(expected)):
        template.encode_chats([turns(1), [*turns(1), user("a"), user("b")]], names=["data.jsonl, record 7", "data.jsonl, record 8"])


@pytest.mark.parametrize("source, reason", [
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no end-of-turn token"),
    ("{% for m in messages %}<s>{{ m.content | upper }}</s>{% endfor %}", "does not print the words after this turn as they are"),
    ("{% for m in messages %}<s>{{ m.content[:15] if m.role == 'assistant' else m.content }}</s>{% endfor %}",
     "turn 2 (assistant): the template does not print all that the assistant says"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}</s>", "no end-of-turn token"),
    ("{{ messages[-1].content }}</s>", "does not print each message"),
    ("{% for m in messages %}<s>{{ m.role }} {{ m.content | length }} {{ m.content }}</s>{% endfor %}", "prints other text when the words"),
    ("{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}", "markers hold no text"),
])
def test_a_template_that_cannot_be_masked_is_refused_with_its_name(source, reason, tokenizer):
    with pytest.raises(UserError) as caught:
        encode(ChatTemplate(tokenizer, source), turns(2))
    assert str(caught.value).startswith(f"chat template of {ChatTemplate(tokenizer).name} cannot be masked:")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    ids, supervised = encode(ChatTemplate(tokenizer, source), turns(2), "all")
    assert sum(supervised) == len(ids) - 1


def test_two_assistant_turns_in_a_row_are_refused(chatml):
    with pytest.raises(UserError, match=r"turn 3 \(assistant\): two assistant turns in a row"):
        encode(chatml, [user("a"), assistant("b"), assistant("c")])


def test_a_template_that_is_no_jinja_and_a_tokenizer_without_one(tokenizer):
    with pytest.raises(UserError, match="chat template"):
        encode(ChatTemplate(tokenizer, "{% for %}"), turns(1))
    with pytest.raises(UserError, match="expected a chat template, found none; set data.chat_template to a Jinja file"):
        encode(ChatTemplate(tiny.tokenizer(chat_template=None)), turns(1))


def test_plain_text_ends_with_eos(chatml):
    ids, supervised = chatml.encode_texts(["The quick fox"])[0]
    assert ids[-1] == chatml.tokenizer.eos_token_id and chatml.tokenizer.decode(ids[:-1]) == "The quick fox"
    assert supervised == [False] + [True] * (len(ids) - 1)


def test_plain_text_has_the_bos_of_its_tokenizer_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    template = ChatTemplate(tokenizer)
    for text in ("The quick fox", "<s>The quick fox"):
        assert template.encode_texts([text])[0].input_ids.count(tokenizer.bos_token_id) == 1
    # The template prints the BOS of a chat; the tokenizer adds none.
    assert encode(template, turns(1)).input_ids.count(tokenizer.bos_token_id) == 1


def test_segments_are_the_whole_text(chatml):
    chat = [SYSTEM, user("Née où ? 🙂"), assistant("À Paris 🙂")]
    runs = chatml.segments(*encode(chatml, chat))
    assert "".join(text for text, _ in runs) == chatml.render(chat)
    assert [on for _, on in runs] == [False, True, False]


def test_the_fingerprint_tells_tokenizers_and_templates_apart(tokenizer):
    same = ChatTemplate(tiny.tokenizer()).fingerprint
    others = [ChatTemplate(tokenizer, LLAMA2), ChatTemplate(tiny.tokenizer(vocab_size=350))]
    assert ChatTemplate(tokenizer).fingerprint == same
    assert len({same, *(other.fingerprint for other in others)}) == 3
