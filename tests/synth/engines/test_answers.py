"""A server may say anything: one bad answer costs one try, long ones are given up, and prompts and keys stay with the server named."""

import gzip
import json
import math
import time
import zlib

import pytest

pytest.importorskip("openai")
from hypothesis import given, settings
from hypothesis import strategies as st

from synth.config import Model
from synth.engines import answers, endpoint, open_engine
from synth.engines.answers import Garbled, read_chat, read_completion, read_models
from synth.engines.interface import ChoiceRequest, Completion, CompletionRequest, EngineError, Prompt, Sampling
from tests.helpers.scripted_server import Answer, ScriptedServer, chat_completion, error_answer

HOW = Sampling(0.7, 0.9, 64)
GOOD = chat_completion("fine")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def opened():
    """open(server, **settings) -> engine, closed at the end."""
    engines = []

    def open_(server, **settings):
        engines.append(open_engine(Model(path="m", engine="openai", base_url=getattr(server, "url", server), **settings), None))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


def prompt(i: int) -> Prompt:
    return Prompt(None, ({"role": "user", "content": f"q{i}"},))


def ask(engine, count: int = 1) -> list:
    return sorted(engine.complete(CompletionRequest((i,), prompt(i), HOW, i) for i in range(count)))


def body(**changes) -> bytes:
    return json.dumps(GOOD | changes).encode()


def choice(**changes) -> bytes:
    return body(choices=[GOOD["choices"][0] | changes])


def scored(logprob) -> dict:
    top = [{"token": "4", "logprob": logprob, "bytes": None}, {"token": "5", "logprob": -3.0, "bytes": None}]
    return {"content": [{"token": "4", "logprob": -1.0, "bytes": None, "top_logprobs": top}]}


BAD = {
    "content is a number": choice(message={"role": "assistant", "content": 5}),
    "content is an object": choice(message={"role": "assistant", "content": {"text": "x"}}),
    "a part without text": choice(message={"role": "assistant", "content": [{"type": "image", "image": "x"}]}),
    "message is a list": choice(message=["x"]),
    "choices is an object": body(choices={"0": 1}),
    "choice is null": body(choices=[None]),
    "finish is a list": choice(finish_reason=["stop"]),
    "unfinished": choice(finish_reason=None),
    "broken off": choice(finish_reason="error"),
    "deep JSON": b'{"choices": ' + b"[" * 100_000,
    "long number": b'{"choices": ' + b"9" * 10_000 + b"}",
    "text of two megabytes": choice(message={"role": "assistant", "content": "x" * 2_000_000}),
    "logprobs is a list": choice(logprobs=[1]),
    "logprob above 0": choice(logprobs=scored(1000.0)),
    "logprob of NaN": choice(logprobs=scored(math.nan)),
    "logprob is text": choice(logprobs=scored("x")),
    "token is a number": choice(logprobs={"content": [{"top_logprobs": [{"token": 4, "logprob": -1.0}]}]}),
    "an error": b'{"error": {"message": "overloaded"}}',
    "gzip that is none": b"",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_costs_one_try(name, opened):
    bad = Answer(200, BAD[name], (("content-encoding", "gzip"),)) if "gzip" in name else Answer(200, BAD[name])
    bad = bad._replace(body=b"not gzip") if "gzip" in name else bad
    with ScriptedServer([bad]) as server:
        found = ask(opened(server, concurrency=1), 3)
    assert [result.text for result in found] == ["echo q0", "echo q1", "echo q2"] and len(server.requests) == 4


@pytest.mark.parametrize("usage", [
    {"prompt_tokens": math.nan, "completion_tokens": 1}, {"prompt_tokens": 2**63, "completion_tokens": 2**64},
    {"prompt_tokens": -1, "completion_tokens": "7"}, {"prompt_tokens": 1e300, "completion_tokens": 2}, [1]])
def test_token_counts_that_are_none_are_taken_as_0_and_said(usage, opened):
    with ScriptedServer([Answer(200, GOOD | {"usage": usage})]) as server:
        engine = opened(server)
        result, = ask(engine)
    assert isinstance(result, Completion) and result.prompt_tokens == 0 and result.tokens in (0, 1, 2)
    assert engine.notes() == ["token counts that are none are taken as 0"]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud83d"),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                        ["choices", "message", "content", "type", "text", "finish_reason", "logprobs", "token_logprobs", "top_logprobs",
                         "token", "logprob", "usage", "prompt_tokens", "data", "id", "max_model_len"]), inner, max_size=5), max_leaves=12)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(JSON)
def test_whatever_a_server_says_is_read_or_garbled(value):
    for sent in (value, {"choices": [value]}, {"choices": [{"message": value, "logprobs": value, "text": "x"}]}, {"data": [value]}):
        data = json.dumps(sent).encode()
        for read in (lambda data: read_chat(data, 10), lambda data: read_completion(data, 10), lambda data: read_models(data, "m")):
            try:
                reply = read(data)
            except Garbled:
                continue
            if not isinstance(reply, dict):
                assert isinstance(reply.text, str) and 0 <= reply.tokens <= answers.MOST_TOKENS
                assert all(isinstance(token, str) and logprob <= 0 for token, logprob in reply.first)


def test_text_that_no_file_can_hold_stays_out_of_reasons(opened):
    with ScriptedServer([Answer(200, chat_completion("x", "odd\ud83d\x1b[2J\n")), error_answer(400, "no\ud83d\x1b]0;x\n")]) as server:
        first, second = ask(opened(server, concurrency=1), 2)
    assert first.reason == r"ended by odd\ud83d\x1b[2J" and second.reason.startswith(r"refused by the server: no\ud83d\x1b]0;x")


# ---------------------------------------------------------------- how long, how much


def test_a_request_that_never_ends_is_given_up(opened, monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.5)

    class Slow(bytes):
        """Bytes that come one by one."""

    with ScriptedServer([Answer(200, Slow(choice()))]) as server:
        write = server.server.RequestHandlerClass.send

        def drip(self, answer):
            if not isinstance(answer.body, Slow):
                return write(self, answer)
            self.send_response(200)
            self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            for i in range(20):
                time.sleep(0.1)
                try:
                    self.wfile.write(answer.body[i:i + 1])
                except OSError:
                    break
            self.close_connection = True

        server.server.RequestHandlerClass.send = drip
        began = time.monotonic()
        assert ask(opened(server))[0].text == "echo q0" and time.monotonic() - began < 1.9


@pytest.mark.parametrize("compress, encoding", [(bytes, "identity"), (gzip.compress, "gzip"), (zlib.compress, "deflate"),
                                                (bytes, "br")])
def test_a_body_without_end_is_given_up(compress, encoding, opened, monkeypatch):
    monkeypatch.setattr(answers, "MOST_BYTES", 2**20)
    huge = Answer(200, compress(choice(more="x" * 2**22)), (("content-encoding", encoding),))
    with ScriptedServer([huge, huge._replace(status=500)]) as server:
        assert ask(opened(server))[0].text == "echo q0" and len(server.requests) == 3
        assert server.requests[0][2]["accept-encoding"] == "identity"


def test_a_compressed_answer_is_read(opened):
    with ScriptedServer([Answer(200, gzip.compress(choice()), (("content-encoding", "gzip"),))]) as server:
        assert ask(opened(server))[0].text == "fine"


@pytest.mark.parametrize("pause", ["Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 +9999", "nan", "1e999", "-5", "soon",
                                   "9" * 400])
def test_pauses_that_no_clock_shows(pause, opened, monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_PAUSE", 0.02)
    with ScriptedServer([error_answer(429, "slow down", retry_after=pause)]) as server:
        assert ask(opened(server))[0].text == "echo q0"


# ---------------------------------------------------------------- who gets what


@pytest.mark.slow
def test_prompts_go_to_no_other_server(opened):
    with ScriptedServer() as other:
        there = Answer(307, b"", (("location", f"{other.url}/chat/completions"),))
        with ScriptedServer(otherwise=lambda body: there) as server:
            with pytest.raises(EngineError, match="sends requests on to another server, 127.0.0.1; set base_url to that one"):
                ask(opened(server))
        assert not other.requests
    with ScriptedServer([Answer(307, b"", (("location", "/v1/elsewhere"),))]) as server:
        assert ask(opened(server))[0].text == "echo q0" and server.requests[1][1] == "/v1/elsewhere"


def test_a_key_goes_over_no_plain_line_outside_the_local_network(opened, monkeypatch):
    from synth.engines import keys

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with ScriptedServer() as server:
        assert ask(opened(server))[0].text == "echo q0"
        monkeypatch.setattr(keys, "is_local", lambda host: False)
        with pytest.raises(EngineError, match="expected https, to send the key in OPENAI_API_KEY outside the local network, got http://127"):
            opened(server)
        ask(opened(server, key_over_http=True))
    assert server.requests[-1][2]["authorization"] == "Bearer secret"


def test_a_score_above_1_does_not_arise_from_rounding(opened):
    with ScriptedServer([Answer(200, chat_completion("4", "length", logprobs=scored(1e-6)))]) as server:
        [found] = opened(server).choose([ChoiceRequest((0,), prompt(0), ("4",))])
    assert found.probabilities == (1.0,)
