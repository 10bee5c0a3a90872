"""The page to talk on: who may ask it, answers as they are written, mistakes, and the page itself in a browser."""

import http.client
import json
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest

from trainer.errors import UserError
from trainer.evaluation import chat_page, conversation
from trainer.evaluation.chat_page import ChatServer
from trainer.evaluation.conversation import Conversations
from trainer.evaluation.generation import Completion, Stopped

EVIL = "<img src=x onerror=\"document.title='taken'\"> \x1b[2J"


class Talk(Conversations):
    """Conversations whose models answer word by word, without a model."""

    def say(self, text, display):
        if text == "too long":
            raise UserError("the conversation: expected fewer tokens")
        with display(self.shown) as shown:
            for name in self.shown:
                words = [f"{name} answers", f"{name} answers {text}"] + [f"{name} answers {text} {EVIL}"] * (text == "evil")
                try:
                    for so_far in words * (500 if text == "for long" else 1):
                        shown.update(name, so_far)
                except Stopped:
                    self.stopped = True
                self.chats[name] += [{"role": "user", "content": text}, {"role": "assistant", "content": words[-1]}]


@pytest.fixture
def server():
    loaded = SimpleNamespace(label="my <adapter>")
    served = ChatServer(Talk(loaded, ("base", "tuned"), None, 9, 0.0), 0)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def ask(server, path, body=None, host=None, secret=None):
    """Return the status and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", f"/{secret or server.secret}/{path}", data,
                       {"host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_answers_come_word_by_word_and_at_last_with_what_differs(server):
    status, text = ask(server, "say", {"text": "Hello", "who": "both"})
    lines = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and lines[:2] == [{"name": "base", "text": "base answers"}, {"name": "base", "text": "base answers Hello"}]
    assert lines[-1]["pieces"] == {"base": [["base", True], [" ", False], ["answers Hello", False]],
                                   "tuned": [["tuned", True], [" ", False], ["answers Hello", False]]}
    ask(server, "say", {"text": "And?", "who": "base"})
    assert len(server.conversations.chats["base"]) == 4 and len(server.conversations.chats["tuned"]) == 2
    assert json.loads(ask(server, "save", {})[1])["messages"][-1] == {"role": "assistant", "content": "base answers And?"}
    assert ask(server, "reset", {"system": "Be short."})[0] == 200
    assert server.conversations.chats["base"] == [{"role": "system", "content": "Be short."}]
    assert ask(server, "save", {}) == (409, "/save: expected an answer to save, got none")


def test_mistakes_are_told_and_end_nothing(server):
    assert json.loads(ask(server, "say", {"text": "too long"})[1]) == {"error": "the conversation: expected fewer tokens"}
    for body in (b"[1]", b"{", b"[" * 100_000):
        assert ask(server, "say", body)[0] == 400
    assert ask(server, "say", {"text": "\ud800", "who": ["both"]})[0] == 200 and ask(server, "save", {})[0] == 200
    assert ask(server, "dance", {})[0] == 404 and ask(server, "say", {"text": "Hello"})[0] == 200


@pytest.mark.parametrize("wrong", [{"host": "evil.example"}, {"secret": "guess"}, {"host": "127.0.0.1:1"}])
def test_others_get_nothing(server, wrong):
    for body in (None, {"text": "Hello"}):
        status, text = ask(server, "" if body is None else "say", body, **wrong)
        assert status == 404 and server.secret not in text
    assert server.conversations.chats["tuned"] == []


def test_the_page_is_closed_to_other_sites_and_names_are_text(server):
    with urllib.request.urlopen(server.url) as answer:
        page, policy = answer.read().decode(), answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "my &lt;adapter&gt;" in page and "my <adapter>" not in page
    assert "http://" not in page and "https://" not in page


def test_a_reader_who_leaves_stops_the_answer(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("POST", f"/{server.secret}/say", json.dumps({"text": "for long", "who": "tuned"}))
    connection.sock.close()
    deadline = time.monotonic() + 10
    while not hasattr(server.conversations, "stopped") and server.conversations.chats["tuned"] == [] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ask(server, "say", {"text": "Hello"})[0] in (200, 409)


def test_a_second_question_at_once_is_refused(server):
    assert server.busy.acquire()
    assert ask(server, "say", {"text": "Hello"})[0] == 409
    server.busy.release()


def test_an_answer_that_nobody_reads_ends_the_generation(monkeypatch):
    asked = []

    def stream(model, template, ids, room, temperature, show):
        asked.append(len(ids))
        show("so far")
        return Completion("so far", 1, False)

    monkeypatch.setattr(conversation, "stream_completion", stream)
    template = SimpleNamespace(render=lambda chat, add_generation_prompt: "x", tokenizer=lambda text, **_: {"input_ids": [1, 2]})
    talk = Conversations(SimpleNamespace(model=None, template=template, context=8, label="x"), ("tuned",), None, 9, 0.0)
    shown = []

    class Display(dict):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, name, text):
            shown.append((name, text))

    talk.say("Hello", lambda names: Display())
    assert asked == [2] and shown == [("tuned", "so far")] and talk.chats["tuned"][-1]["content"] == "so far"


def test_a_port_that_is_taken_is_one_line(server):
    with pytest.raises(UserError, match="^port: cannot listen at"):
        chat_page.serve(server.conversations, server.server_port)


@pytest.mark.slow(10)
def test_in_a_browser_a_message_is_answered_marked_and_never_markup(server, browser):
    page = browser.new_page()
    page.open(server.url, "phone", "light")
    page.evaluate("find('text').value = 'evil'; find('form').requestSubmit()")
    page.wait_for("find('stop').disabled && document.querySelectorAll('del, ins').length === 2")
    assert page.evaluate("document.querySelectorAll('img').length") == 0 and page.evaluate("document.title") == "Chat with my <adapter>"
    assert "onerror" in page.evaluate("talk.textContent") and "\\x1b[2J" in page.evaluate("talk.textContent")
    assert page.evaluate("document.activeElement.id") == "text"
    assert page.mistakes() == []


@pytest.mark.slow(10)
def test_in_a_browser_the_page_fits_is_readable_and_reachable(server, browser, tmp_path):
    assert browser.mistakes(server.url, tmp_path) == []
