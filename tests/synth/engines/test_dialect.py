"""Refusals as servers word them: what is changed in the next request, what is remembered, and what is said of it."""

import json
import math
from functools import partial

import httpx2
import pytest

pytest.importorskip("openai")
from openai import BadRequestError

from synth.config import Model
from synth.engines import open_engine
from synth.engines.dialect import Dialect, is_about_length
from synth.engines.interface import ChoiceRequest, CompletionRequest, EngineError, Failure, Prompt, Sampling
from tests.helpers.scripted_server import Answer, ScriptedServer, chat_completion, error_answer

BODY = {"max_tokens": 2048, "temperature": 0.7, "top_p": 0.9, "seed": 3}


def refusal(words, status: int = 400, param: str | None = None) -> BadRequestError:
    request = httpx2.Request("POST", "http://s/v1")
    body = words if isinstance(words, dict) else {"message": words, "param": param}
    return BadRequestError(f"Error code: {status} - {body}", response=httpx2.Response(status, request=request), body=body)


def changed(words, context: int | None = None, body: dict = BODY, **more) -> dict | None:
    change = Dialect(context).change(refusal(words, **more), body)
    return change and change.apply(body)


# ---------------------------------------------------------------- words

LENGTHS = [
    ("This model's maximum context length is 512 tokens. However, you requested 2088 tokens (40 in the messages, 2048 in the completion). "
     "Please reduce the length of the messages or completion.", 472),
    ("'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length is 512 tokens and your request has "
     "40 input tokens (2048 > 512 - 40).", 472),
    ("You passed 40 input tokens and requested 2048 output tokens. However, the model's context length is only 512 tokens, resulting in a "
     "maximum input length of 0 tokens.", 472),
    ("Requested token count exceeds the model's maximum context length of 512 tokens. You requested a total of 2088 tokens: 40 tokens from "
     "the input messages and 2048 tokens for the completion.", 472),
    ("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 512. Given: 40 `inputs` tokens and 2048 `max_new_tokens`", 472),
    ("Prompt contains 40 tokens and 0 draft tokens, too large for model with 512 maximum context length", 472),
    ("The input (40 tokens) plus max_tokens (2048) exceeds the limit of 512", 472),
    ("input length and `max_tokens` exceed context limit: 40 + 2048 > 512, decrease input length or `max_tokens` and try again", 472),
    ("max_tokens is too large: 2048. This model supports at most 1024 completion tokens, whereas you provided 2048.", 1024),
    ("`max_tokens` must be less than or equal to `1024`, the maximum value for `max_tokens` is less than the `context_window`", 1024),
    ("Invalid max_tokens value, the valid range of max_tokens is [1, 1024]", 1024),
    ("max_tokens: 2048 > 1024, which is the maximum allowed number of output tokens for this model", 1024),
    ("the request exceeds the available context size (512 tokens), try increasing it", 511),
    ("The request is longer than the context.", 1024),
    ("This model's maximum context length is 512 tokens. However, your messages resulted in 600 tokens.", None),
    ("'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length is 512 tokens and your request has "
     "512 input tokens.", None),
]


@pytest.mark.parametrize("words, expected", LENGTHS)
def test_max_tokens_is_what_the_words_leave(words, expected):
    found = changed(words)
    assert found == (BODY | {"max_tokens": expected} if expected else None) and is_about_length(refusal(words))


def test_the_context_may_be_known_beforehand():
    assert Dialect(512).spell(BODY)["max_tokens"] == 511
    assert changed("the prompt of 40 tokens is too long", 512, BODY | {"max_tokens": 511})["max_tokens"] == 472
    assert changed("context exceeded", 512, BODY | {"max_tokens": 511})["max_tokens"] == 255


@pytest.mark.parametrize("words, gone", [
    ("Unrecognized request argument supplied: seed", {"seed"}),
    ("`temperature` and `top_p` cannot both be specified for this model. Please use only one.", {"top_p"}),
    ("Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is supported.", {"temperature"}),
    ({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, {"seed"}),
    ("seeding, stop_p", None),
])
@pytest.mark.parametrize("status", [400, 422])
def test_a_parameter_that_a_refusal_names_is_left_out(words, gone, status):
    assert changed(words, status=status) == (gone and {name: value for name, value in BODY.items() if name not in gone})


def test_the_parameter_that_the_protocol_names_goes_first():
    assert "temperature" not in changed("seed and temperature", param="temperature")
    assert changed("seed", status=500) is None


@pytest.mark.parametrize("words, expected", [
    ("Invalid value for 'top_logprobs': must be less than or equal to 5.", 5), ("top_logprobs must be between 0 and 8", 8),
    ("top_logprobs is too large", 5), ("Requested sample logprobs of 20, which is greater than max allowed: 3", 3),
    ("This model does not support logprobs.", None),
])
def test_the_number_of_logprobs(words, expected):
    found = changed(words, body={"logprobs": True, "top_logprobs": 20})
    assert (found and found["top_logprobs"]) == expected


# ---------------------------------------------------------------- requests

UNLISTED = Answer(200, {"object": "list", "data": []})
serve = partial(ScriptedServer, models=UNLISTED)
HOW = Sampling(0.7, 0.9, 2048)
DIGITS = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in (("4", 0.5), ("5", 0.2), ("3", 0.1), ("2", 0.1), ("1", 0.05))]


def scored(count: int) -> Answer:
    logprobs = {"content": [{"token": "4", "logprob": -0.7, "bytes": None, "top_logprobs": DIGITS[:count]}]}
    return Answer(200, chat_completion("4", "length", logprobs=logprobs))


@pytest.fixture
def opened():
    """open(server, **settings) -> engine, closed at the end."""
    engines = []

    def open_(server, **settings):
        engines.append(open_engine(Model(path="m", engine="openai", base_url=server.url, concurrency=1, **settings), None))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


def ask(engine, count: int) -> list:
    prompts = [Prompt(None, ({"role": "user", "content": f"q{i}"},)) for i in range(count)]
    return sorted(engine.complete(CompletionRequest((i,), prompt, HOW, i) for i, prompt in enumerate(prompts)))


def judged(engine, count: int) -> list:
    return list(engine.choose(ChoiceRequest((i,), Prompt(None, ({"role": "user", "content": "q"},)), tuple("12345")) for i in range(count)))


def refuse(*names: str):
    """Return a server's answer that refuses the parameters of these names, one at a time."""
    def answer(body):
        found = next((name for name in names if name in body), None)
        return error_answer(400, f"Unsupported parameter: {found}") if found else Answer(200, chat_completion("fine"))

    return answer


def test_refused_parameters_are_left_out_after_one_try_and_said(opened):
    with serve(otherwise=refuse("seed", "top_p", "temperature", "max_tokens")) as server:
        engine = opened(server)
        assert [result.text for result in ask(engine, 3)] == ["fine"] * 3
        assert len(server.requests) == 3 + 4
        assert set(server.requests[-1][3]) == {"model", "messages", "max_completion_tokens"}
        assert engine.notes() == ["seed is left out, which the server refuses", "top_p is left out, which the server refuses",
                                  "temperature is left out, which the server refuses", "max_tokens is sent as max_completion_tokens"]


def test_a_refusal_that_merely_quotes_a_parameter_changes_nothing(opened):
    def answer(body):
        if body["messages"][0]["content"] == "q1":
            return error_answer(400, "your prompt is against our rules: 'what temperature?'")
        return Answer(200, chat_completion("fine"))

    with serve(otherwise=answer) as server:
        engine = opened(server)
        found = ask(engine, 4)
        assert isinstance(found[1], Failure) and "against our rules" in found[1].reason and engine.notes() == []
        assert "temperature" in server.requests[-1][3] and len(server.requests) == 5


def test_max_tokens_follows_what_the_context_leaves(opened):
    def answer(body):
        total = body["max_tokens"] + 40
        words = f"This model's maximum context length is 512 tokens. However, you requested {total} tokens (40 in the messages)."
        return Answer(200, chat_completion("fine")) if total <= 512 else error_answer(400, words)

    with serve(otherwise=answer) as server:
        engine = opened(server)
        assert [result.text for result in ask(engine, 2)] == ["fine"] * 2 and server.requests[-1][3]["max_tokens"] == 472
        assert engine.notes() == ["max_tokens is what the context of 512 tokens leaves after the prompt"]


def test_a_context_that_leaves_nothing_names_the_options(opened):
    words = "This model's maximum context length is 99 tokens. However, your messages resulted in 600 tokens."
    with serve(otherwise=lambda body: error_answer(400, words)) as server:
        found = []
        with pytest.raises(EngineError, match="lower respond.max_tokens or judge.max_tokens, or set the model's max_model_len, then go on"):
            found += opened(server).complete(CompletionRequest((i,), Prompt(None, ({"role": "user", "content": "q"},)), HOW, i)
                                             for i in range(30))
    assert found == [] and len(server.requests) <= 21


def test_refusals_of_a_server_that_has_answered_nothing_are_held_back(opened):
    with serve(otherwise=lambda body: error_answer(400, "no")) as server:
        assert [result.reason for result in ask(opened(server), 3)] == ["refused by the server: no"] * 3
    with serve([error_answer(400, "no")] * 3) as server:
        found = ask(opened(server), 5)
    assert [type(result) for result in found].count(Failure) == 3 and len(found) == 5


def test_a_judge_that_gives_five_logprobs_is_asked_for_five(opened):
    def answer(body):
        if body["top_logprobs"] > 5:
            return error_answer(400, "Invalid value for 'top_logprobs': must be less than or equal to 5.")
        return scored(body["top_logprobs"])

    with serve(otherwise=answer) as server:
        engine = opened(server)
        assert [choice.probabilities for choice in judged(engine, 3)] == [pytest.approx((0.05, 0.1, 0.1, 0.5, 0.2))] * 3
        assert [body["top_logprobs"] for *_, body in server.requests] == [20, 5, 5, 5]
        assert engine.notes() == ["5 log-probabilities are asked for, the most that the server gives"]


def test_a_judge_that_gives_three_logprobs_cannot_score(opened):
    def answer(body):
        few = body["top_logprobs"] <= 3
        return scored(3) if few else error_answer(400, "top_logprobs must be between 0 and 3")

    with serve(otherwise=answer) as server:
        with pytest.raises(EngineError, match="returns at most 3 log-probabilities, fewer than the 5 choices; use judge.scoring generated"):
            judged(opened(server), 2)


@pytest.mark.parametrize("token", ["<think>", "\n<think>", "<|channel|>", "[THINK]", "<|START_THINKING|>", "<seed:think>", "<thinking>"])
def test_a_judge_that_thinks_says_so(opened, token):
    top = [{"token": token, "logprob": -0.01, "bytes": None}, {"token": "4", "logprob": -5.0, "bytes": None}]
    logprobs = {"content": [{"token": token, "logprob": 0.0, "bytes": None, "top_logprobs": top}]}
    with serve(otherwise=lambda body: Answer(200, chat_completion(token, "length", logprobs=logprobs))) as server:
        with pytest.raises(EngineError, match="thinks before it answers: .*judge.scoring generated with room .* judge.max_tokens") as error:
            judged(opened(server), 2)
    assert json.dumps(token) in str(error.value)


def test_a_judge_whose_thoughts_the_server_takes_out_says_so(opened):
    body = chat_completion(None, "length", message={"reasoning_content": "Hm"})
    with serve(otherwise=lambda _: Answer(200, body)) as server:
        with pytest.raises(EngineError, match="thinks before it answers: it begins with its reasoning_content"):
            judged(opened(server), 2)


def test_an_answer_whose_text_is_elsewhere_is_empty_and_said(opened):
    body = chat_completion(None, message={"reasoning_content": "It is blue."})
    with serve(otherwise=lambda _: Answer(200, body)) as server:
        engine = opened(server)
        assert [result.text for result in ask(engine, 3)] == [""] * 3 and len(server.requests) == 3
        assert len(engine.notes()) == 1 and "whose text is in reasoning_content, are recorded as empty" in engine.notes()[0]
