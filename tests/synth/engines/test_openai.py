"""Servers: every way of going wrong that we have seen or read of, by a scripted one; tests/synth/engines/test_results.py has vLLM's own."""

import json
import math
import socket
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("openai")
from synth.config import Model
from synth.engines import kind_of, open_engine
from synth.engines.interface import ChoiceRequest, Completion, CompletionRequest, EngineError, Failure, LikelihoodRequest, Prompt, Sampling
from tests.helpers.scripted_server import Answer, ScriptedServer, chat_completion, error_answer

HOW = Sampling(0.7, 0.9, 50)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    from synth.engines import endpoint

    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def model(server, **settings) -> Model:
    url = server.url if isinstance(server, ScriptedServer) else server
    return Model(path="m", engine="openai", base_url=url, **settings)


def chat(i: int, **changes) -> CompletionRequest:
    return CompletionRequest(("c", i), Prompt(None, ({"role": "user", "content": f"q{i}"},)), HOW._replace(**changes), 2**63 + i)


def ask(engine, *requests) -> dict:
    return {result.key: result for result in engine.complete(requests)}


@pytest.fixture
def opened():
    """open(server, **settings) -> engine, closed at the end."""
    engines = []

    def open_(server, **settings):
        engines.append(open_engine(model(server, **settings), Path("unused")))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


# ---------------------------------------------------------------- what is sent and understood


def test_a_chat_is_sent_whole_and_its_answer_read(opened):
    with ScriptedServer() as server:
        engine = opened(server, price=[1.0, 10.0])
        found = ask(engine, chat(1), chat(2, stop_texts=("END",)))
    assert found == {("c", i): Completion(("c", i), f"echo q{i}", 3, "stop", None, 7) for i in (1, 2)}
    _, path, headers, first = min(server.requests, key=lambda asked: asked[3]["seed"])
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer none"
    assert first == {"model": "m", "messages": [{"role": "user", "content": "q1"}], "max_tokens": 50, "temperature": 0.7, "top_p": 0.9,
                     "seed": 1}
    assert max(asked[3]["seed"] for asked in server.requests) == 2 and [a[3].get("stop") for a in server.requests].count(["END"]) == 1
    assert engine.cost() == pytest.approx(2 * (7 * 1.0 + 3 * 10.0) / 1e6)
    assert engine.info.fingerprint == "m root=r max_model_len=99" and not engine.info.deterministic and 0 < engine.busy() < 60
    assert kind_of(model(server)) == "openai"


@pytest.mark.parametrize("answer, expected", [
    (chat_completion("x", "length"), Completion(("c", 0), "x", 3, "length", None, 7)),
    (chat_completion(None, "length"), Completion(("c", 0), "", 3, "length", None, 7)),
    (chat_completion("4", message={"reasoning_content": "two and two"}), Completion(("c", 0), "4", 3, "stop", None, 7)),
    (chat_completion(None, message={"reasoning_content": "It is blue."}), Completion(("c", 0), "", 3, "stop", None, 7)),
    (chat_completion([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Bl"},
                      {"type": "output_text", "text": "ue."}]), Completion(("c", 0), "Blue.", 3, "stop", None, 7)),
    (chat_completion("a cut emoji \ud83d"), Failure(("c", 0), "no Unicode text: half of a surrogate pair")),
    (chat_completion("x", "content_filter"), Failure(("c", 0), "withheld by the server's content filter")),
    (chat_completion("x", "tool_calls"), Failure(("c", 0), "ended by tool_calls")),
])
def test_ends_of_answers(opened, answer, expected):
    with ScriptedServer([Answer(200, answer)]) as server:
        assert ask(opened(server), chat(0)) == {("c", 0): expected}


def test_the_limit_by_its_newer_name(opened):
    with ScriptedServer([error_answer(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")]) as server:
        found = list(opened(server, concurrency=1).complete(chat(i) for i in range(2)))
    assert [result.text for result in found] == ["echo q0", "echo q1"]
    assert [sorted(key for key in body if key.startswith("max")) for *_, body in server.requests] == \
        [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]


def test_choices_are_summed_over_their_spellings(opened):
    told = [("4", 0.5), (" 4", 0.2), ("3", 0.1), ("\n3", 0.05), ("x", 0.15)]
    logprobs = {"content": [{"token": "4", "logprob": math.log(0.5), "bytes": None,
                             "top_logprobs": [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in told]}]}
    with ScriptedServer([Answer(200, chat_completion("4", "length", logprobs=logprobs))]) as server:
        [choice] = opened(server).choose([ChoiceRequest(("j", 1), chat(0).prompt, ("3", "4", "5"))])
        assert choice.probabilities == pytest.approx((0.15, 0.7, 0.0)) and choice.mass == pytest.approx(0.85) and choice.prompt_tokens == 7
    assert {key: server.requests[0][3][key] for key in ("logprobs", "top_logprobs", "max_tokens")} == \
        {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}


@pytest.mark.parametrize("answer", [Answer(200, chat_completion("4")), error_answer(400, "logprobs are not supported by this model")])
def test_a_server_without_logprobs_is_no_judge_by_expectation(opened, answer):
    with ScriptedServer(otherwise=lambda body: answer) as server:
        with pytest.raises(EngineError, match=r"returns no log-probabilities of the choices; use judge.scoring generated"):
            list(opened(server).choose([ChoiceRequest(("j", 1), chat(0).prompt, ("1", "2"))]))


def test_what_no_server_can_do(opened):
    with ScriptedServer() as server:
        engine = opened(server)
        with pytest.raises(EngineError, match="use engine vllm or transformers"):
            engine.likelihood([LikelihoodRequest(("l",), Prompt((1,)), (2,))])
        with pytest.raises(EngineError, match="no embeddings"):
            engine.embed([])


# ---------------------------------------------------------------- servers that are unwell

GOOD = json.dumps(chat_completion("x" * 50)).encode()
UNWELL = {
    "429": error_answer(429, "slow down", "rate_limit_exceeded"),
    "500": error_answer(500, "oops"),
    "502 from a proxy": Answer(502, b"<html>Bad gateway</html>", (("content-type", "text/html"),)),
    "truncated JSON": Answer(200, GOOD[:90]),
    "cut off": Answer(200, GOOD[:90], (("content-length", str(len(GOOD))), ("connection", "close"))),
    "no choices": Answer(200, chat_completion("x") | {"choices": []}),
    "choices null": Answer(200, chat_completion("x") | {"choices": None}),
    "content that is no text": Answer(200, chat_completion(5)),
    "garbage": Answer(200, b"\x00\xff<html>"),
    "a page": Answer(200, b"<html>hello</html>", (("content-type", "text/html"),)),
    "a list": Answer(200, b"[1, 2]"),
    "a string": Answer(200, b'"hello"'),
    "message null": Answer(200, chat_completion("x") | {"choices": [{"index": 0, "finish_reason": "stop", "message": None}]}),
    "an error inside 200": Answer(200, {"error": {"message": "overloaded"}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNWELL)
def test_an_unwell_server_is_asked_again(opened, name):
    with ScriptedServer([UNWELL[name]] * 3) as server:
        assert ask(opened(server), chat(5)) == {("c", 5): Completion(("c", 5), "echo q5", 3, "stop", None, 7)}
    assert len(server.requests) == 4 and len({json.dumps(body) for *_, body in server.requests}) == 1


@pytest.mark.slow
def test_everything_at_once(opened, monkeypatch):
    """Four hundred requests through a server of which every third answer goes wrong, in every way: each is answered, once."""
    from synth.engines import endpoint

    monkeypatch.setattr(endpoint, "TRIES", 15)
    faults = list(UNWELL.values())
    with ScriptedServer([faults[i // 3 % len(faults)] if i % 3 == 0 else None for i in range(600)]) as server:
        found = list(opened(server, concurrency=8).complete(chat(i) for i in range(400)))
    assert sorted((result.key[1], result.text) for result in found) == [(i, f"echo q{i}") for i in range(400)]
    assert len(server.requests) == 600 and server.most <= 8


@pytest.mark.slow
@pytest.mark.parametrize("name, reason", [
    ("500", "status 500: oops"), ("truncated JSON", "an unreadable answer"), ("no choices", "an answer without choices"),
    ("content that is no text", "an answer whose content is int"),
    ("garbage", "an unreadable answer"), ("cut off", "the connection broke off"),
])
def test_a_request_that_a_server_fails_is_left_for_the_next_call(opened, name, reason):
    with ScriptedServer(otherwise=lambda body: UNWELL[name] if "q1" in str(body) else Answer(200, chat_completion("fine"))) as server:
        found = []
        with pytest.raises(EngineError, match=f"1 of the requests are unanswered: no usable answer in 6 tries: {reason}.*run the same"):
            for result in opened(server).complete(chat(i) for i in range(3)):
                found.append(result.key[1])
        assert sorted(found) == [0, 2] and len(server.requests) == 8
        recorded = ask(opened(server, on_server_error="record"), chat(1), chat(2))
    assert recorded["c", 1].reason.startswith(f"no usable answer in 6 tries: {reason}") and recorded["c", 2].text == "fine"


@pytest.mark.slow
def test_the_pause_that_a_server_asks_for(opened):
    with ScriptedServer([error_answer(429, "slow down", retry_after="0.6"), error_answer(503, "busy", retry_after="0.3")]) as server:
        ask(opened(server), chat(0))
    first, second, third = (asked[0] for asked in server.requests)
    assert 0.6 <= second - first < 10 and 0.3 <= third - second < 10


@pytest.mark.slow
def test_pauses_grow(opened, monkeypatch):
    from synth.engines import endpoint

    monkeypatch.setattr(endpoint, "PAUSE", 0.08)
    with ScriptedServer([UNWELL["500"]] * 4) as server:
        ask(opened(server), chat(0))
    gaps = [b[0] - a[0] for a, b in zip(server.requests, server.requests[1:])]
    assert all(gap >= 0.04 * 2**i for i, gap in enumerate(gaps)) and sum(gaps) < 60


def test_a_slow_server_is_given_up_and_asked_again(opened):
    with ScriptedServer([Answer(200, chat_completion("late"), delay=1.5)]) as server:
        engine = opened(server)
        engine.endpoints[0].client.timeout = 0.3
        assert ask(engine, chat(0))["c", 0].text == "echo q0"


@pytest.mark.parametrize("charset", ["utf-8", "utf-16", "idna", "base64"])
def test_one_refused_request_fails_alone(opened, charset):
    refused = error_answer(400, "This model's maximum context length is 99 tokens.\nYou asked for 300.", "context_length_exceeded",
                           content_type=f"application/json; charset={charset}")
    with ScriptedServer(otherwise=lambda body: refused if "q1" in str(body) else Answer(200, chat_completion("fine"))) as server:
        found = ask(opened(server), *(chat(i) for i in range(3)))
    assert found["c", 1] == Failure(("c", 1), "refused by the server: This model's maximum context length is 99 tokens. You asked for 300.")
    assert len(server.requests) == 3


@pytest.mark.slow
@pytest.mark.parametrize("answer, words", [
    (error_answer(401, "bad key"), r"refuses the key in OPENAI_API_KEY \(401\): bad key; set another one"),
    (error_answer(403, "not you"), r"refuses the key .*403"),
    (error_answer(404, "The model does not exist"),
     r"does not know this model or path \(404\): The model does not exist; correct path or base_url"),
    (error_answer(429, "You exceeded your current quota", "insufficient_quota"), r"quota is used up"),
    (error_answer(429, "slow down"), r"still answered 429 after 6 tries: slow down; lower concurrency"),
    (error_answer(400, "temperature must be 1"), r"failed 20 requests in a row: refused by the server: temperature must be 1"),
    (error_answer(500, "broken"), r"failed 20 requests in a row: no usable answer in 6 tries: status 500: broken"),
])
def test_a_server_at_fault_for_good_ends_the_work(opened, answer, words):
    with ScriptedServer(otherwise=lambda body: answer) as server:
        engine = opened(server, concurrency=4)
        with pytest.raises(EngineError, match=words) as error:
            list(engine.complete(chat(i) for i in range(60)))
    assert "\n" not in str(error.value) and server.url in str(error.value)


@pytest.mark.slow
def test_what_had_come_before_the_end_is_kept(opened):
    def until_30(body):
        return Answer(200, chat_completion("fine")) if int(body["messages"][0]["content"][1:]) < 30 else error_answer(401, "over")

    with ScriptedServer(otherwise=until_30) as server:
        kept, engine = [], opened(server, concurrency=2)
        with pytest.raises(EngineError, match="401"):
            for result in engine.complete(chat(i) for i in range(60)):
                kept.append(result.key[1])
    assert {*range(28)} <= {*kept} <= {*range(30)}  # two may be in flight when the first one is refused


@pytest.mark.slow
def test_the_list_of_models(opened):
    with ScriptedServer(models=error_answer(401, "no")) as server, pytest.raises(EngineError, match="refuses the key"):
        opened(server)
    with ScriptedServer(models=error_answer(404, "no such path")) as server:
        assert opened(server).info.fingerprint == "m"
    with ScriptedServer(models=Answer(200, b"<html>")) as server, pytest.raises(EngineError, match="does not list its models"):
        opened(server)


def test_a_server_that_is_down(opened):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
    before = {*threading.enumerate()}
    with pytest.raises(EngineError, match=f"m: no server answers at {url} .*; start it, or correct base_url"):
        opened(url)
    assert {*threading.enumerate()} <= before


@pytest.mark.slow
def test_a_server_that_goes_down_meanwhile(opened):
    with ScriptedServer() as server:
        engine = opened(server)
        assert ask(engine, chat(0))["c", 0].text == "echo q0"
    engine.endpoints[0].client = engine.endpoints[0].client.copy()
    with pytest.raises(EngineError, match="no server answers|in a row"):
        list(engine.complete(chat(i) for i in range(60)))


def test_keys(opened, monkeypatch):
    with pytest.raises(EngineError, match="expected an API key for https://api.example.com/v1 in the environment variable MY_KEY"):
        opened("https://api.example.com/v1", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret")
    with ScriptedServer() as server:
        ask(opened(server, api_key_env="MY_KEY"), chat(0))
    assert server.requests[0][2]["authorization"] == "Bearer secret"


# ---------------------------------------------------------------- how fast


@pytest.mark.slow
def test_work_is_spread_and_bounded(opened):
    slow = lambda body: Answer(200, chat_completion("fine"), delay=0.05)  # noqa: E731
    with ScriptedServer(otherwise=slow) as one, ScriptedServer(otherwise=slow) as other:
        engine = opened([one.url, other.url], concurrency=5)
        taken, most = [], []

        def requests():
            for i in range(200):
                taken.append(i)
                yield chat(i)

        for n, _ in enumerate(engine.complete(requests())):
            most.append(len(taken) - n)
    at_once = one.most, other.most  # a machine under load may never see the fifth at the slower one
    assert max(at_once) == 5 and min(at_once) >= 3 and min(len(one.requests), len(other.requests)) > 60 and max(most) <= 21


@pytest.mark.slow
def test_requests_per_minute(opened):
    with ScriptedServer() as server:
        list(opened(server, requests_per_minute=600).complete(chat(i) for i in range(8)))
    gaps = [b[0] - a[0] for a, b in zip(server.requests, server.requests[1:])]
    assert sum(gaps) >= 0.69 and sorted(gaps)[len(gaps) // 2] == pytest.approx(0.1, abs=0.05)


def test_stopping_early_leaves_no_request_behind(opened):
    with ScriptedServer(otherwise=lambda body: Answer(200, chat_completion("fine"), delay=0.05)) as server:
        engine = opened(server, concurrency=2)
        for _ in engine.complete(chat(i) for i in range(100)):
            break
        time.sleep(0.2)
        asked = len(server.requests)
        assert asked <= 5
        assert len(ask(engine, *(chat(i) for i in range(10)))) == 10 and len(server.requests) == asked + 10
