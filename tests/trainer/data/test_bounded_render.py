"""Templates that fail in any way, never end, or fill the memory: one line each, in little time."""

import resource
import signal

import pytest

from tests.helpers import tiny
from trainer.data import bounded_render
from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError

CHAT = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "It is 7."}]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
FAILING = [
    "{{ 1 / 0 }}", "{{ ''.encode('nope') }}", "{% for i in range(1000000) %}{% endfor %}", "{{ messages.pop() }}", "{{ [].index(3) }}",
    "{{ {}.popitem() }}", "{% macro r() %}{{ r() }}{% endmacro %}{{ r() }}", "{{ '%c' % 9999999 }}", "{{ '\\ud800' }}",
    "{{ messages.foo.bar.baz }}", "{{ none() }}", "{% include 'other' %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ (10 ** 10000000) | string | length }}", "{{ 2 ** (2 ** 40) }}", "{{ 'a' * 10000000000 }}", "{{ messages[0].content * 100000 }}",
    "{{ strftime_now('%Y' * 100000) }}", "{{ 'x'.zfill(3000000000) }}", "{{ messages | tojson(indent=99999999) }}",
    "{{ 'x' | center(9999999999) }}", "{{ ('x' * 100000000).join('abcdefghijklmnop') | length }}",
    "{% generation %}{{ messages[0].content * 100000 }}{% endgeneration %}",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def little_time(monkeypatch):
    monkeypatch.setattr(bounded_render, "SECONDS", 0.2)
    monkeypatch.setattr(bounded_render, "GIBIBYTES", 0.2)


@pytest.mark.parametrize("text", FAILING)
def test_a_template_that_fails_is_one_line(tokenizer, text):
    with pytest.raises(UserError, match=r"chat template of hostile"):
        ChatTemplate(tokenizer, CHATML + text, "hostile").encode_chats([CHAT])


@pytest.mark.parametrize("text", ENDLESS)
def test_a_template_without_an_end_is_one_line(tokenizer, little_time, text):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=r"chat template of hostile"):
        ChatTemplate(tokenizer, CHATML + text, "hostile").encode_chats([CHAT])
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_long_chat_is_no_offence(tokenizer):
    words = "\u4e03 is seven. " * 20_000
    template = ChatTemplate(tokenizer, CHATML + "{{ messages | tojson(ensure_ascii=true) }}")
    assert words in template.render([*CHAT, {"role": "user", "content": words}])
