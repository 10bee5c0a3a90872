"""Both local engines on the miniature base, against a plain forward pass and against themselves in other batches."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from synth.config import Model
from synth.engines import open_engine
from synth.engines.interface import (
    ChoiceRequest,
    Completion,
    CompletionRequest,
    EmbeddingRequest,
    EngineError,
    Failure,
    LikelihoodRequest,
    Prompt,
    Sampling,
)
from synth.engines.model_files import fingerprint
from synth.engines.tokens import Spellings
from tests.helpers.engine_requests import BASE, BOS, EOT, HOW, INSTRUCT, USER, answers, ask, instruct, logprobs, needs, questions


@pytest.fixture(scope="module", params=[needs("vllm"), needs("transformers")])
def engine(request, tmp_path_factory):
    opened = open_engine(Model(path=str(BASE), engine=request.param, dtype="float32"), tmp_path_factory.mktemp("log") / "base")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


# ---------------------------------------------------------------- completions


@pytest.mark.slow
def test_what_an_engine_says_of_itself(engine):
    kind, version, where = re.fullmatch(r"(\w+) ([\d.]+) \((.*)\)", engine.info.name).groups()
    assert kind in ("vllm", "transformers") and where == "cpu, float32" and engine.info.deterministic
    assert engine.info.model == str(BASE) and engine.info.fingerprint == fingerprint(BASE) and engine.cost() == 0


@pytest.mark.slow
def test_equal_requests_give_equal_results_whatever_stands_beside_them(engine, tokenizer):
    """In order, reversed with strangers between, and alone: text, tokens and every bit of the log-probability."""
    requests = instruct(60) + answers(tokenizer, 40)
    found = ask(engine, requests)
    strangers = [CompletionRequest(("x", k), Prompt((BOS, USER, 24 + k % 30)), HOW, k) for k in range(50)]
    mixed = [one for pair in zip(requests[::-1], strangers * 2) for one in pair]
    again = {result.key: result for result in engine.complete(mixed) if result.key[0] != "x"}
    assert again == found
    for request in (*requests[:4], *requests[-4:]):
        assert ask(engine, [request]) == {request.key: found[request.key]}


@pytest.mark.slow
def test_seeds_decide(engine):
    same = list(engine.complete([CompletionRequest((k,), INSTRUCT, HOW, 7) for k in range(5)]))
    assert len({result[1:] for result in same}) == 1
    assert len({result.text for result in engine.complete(instruct(30))}) > 20


@pytest.mark.slow
def test_temperature_zero_takes_the_likeliest(engine, plain):
    [found] = engine.complete([CompletionRequest((1,), INSTRUCT, Sampling(0.0, 1.0, 40, HOW.stop_ids), 5)])
    ids, total = list(INSTRUCT.token_ids), 0.0
    for _ in range(40):
        best = logprobs(plain, ids)[-1].max(-1)
        ids, total = [*ids, int(best.indices)], total + float(best.values)
        if ids[-1] in HOW.stop_ids:
            break
    assert found.tokens == len(ids) - 2 and found.logprob == pytest.approx(total, abs=1e-4)
    assert found.text == AutoTokenizer.from_pretrained(BASE).decode(ids[2:-1])


@pytest.mark.slow
def test_first_tokens_are_drawn_from_the_models_distribution(engine, plain, tokenizer):
    """2,000 first tokens at temperature 0.7 and top_p 0.9 against the nucleus computed here: chi-squared, and none from outside it."""
    chances = (logprobs(plain, INSTRUCT.token_ids)[-1] / 0.7).softmax(-1)
    order = chances.argsort(descending=True)
    nucleus = order[: int((chances[order].cumsum(0) < 0.9).sum()) + 1]
    expected = {tokenizer.decode([int(i)]): float(chances[i] / chances[nucleus].sum()) for i in nucleus}
    drawn = [result.text for result in engine.complete(instruct(2000, Sampling(0.7, 0.9, 1)))]
    assert {*drawn} <= {*expected}
    statistic = sum((drawn.count(text) - 2000 * p) ** 2 / (2000 * p) for text, p in expected.items())
    assert statistic < len(expected) + 5 * math.sqrt(2 * len(expected)) + 5


@pytest.mark.slow
def test_logprobs_are_of_the_model_itself(engine, plain, tokenizer):
    """At temperature 1 and without a nucleus, whatever the sampling was, the stop included; and equal to the likelihood of the tokens."""
    found = ask(engine, instruct(20) + instruct(20, HOW._replace(temperature=0.5, top_p=0.7), first=20))
    ids = {key: tokenizer(result.text, add_special_tokens=False).input_ids for key, result in found.items() if result.finish == "stop"}
    ids = {key: (*some, EOT) for key, some in ids.items() if len(some) + 1 == found[key].tokens}
    assert len(ids) >= 35
    for key, some in ids.items():
        whole = (*INSTRUCT.token_ids, *some)
        given = logprobs(plain, whole)
        assert found[key].logprob == pytest.approx(sum(float(given[i - 1, whole[i]]) for i in range(2, len(whole))), abs=2e-4)
    scored = {result.key: result for result in engine.likelihood(LikelihoodRequest(key, INSTRUCT, some) for key, some in ids.items())}
    if engine.info.name.startswith("vllm"):
        assert {key: result.logprob for key, result in scored.items()} == {key: found[key].logprob for key in ids}  # bit for bit
    for key, result in scored.items():
        assert result.logprob == pytest.approx(found[key].logprob, abs=1e-4) and result.tokens == found[key].tokens


@pytest.mark.slow
def test_stops(engine, tokenizer):
    whole = ask(engine, instruct(40))
    assert all(result.finish == "stop" and "<|" not in result.text for result in whole.values())
    question = tokenizer("?", add_special_tokens=False).input_ids[0]
    for how in (HOW._replace(stop_ids=(question,)), HOW._replace(stop_texts=("?",))):
        cut = ask(engine, instruct(40, how))
        for key, result in whole.items():
            before, asked, _ = result.text.partition("?")
            assert cut[key].text == before and cut[key].finish == "stop"
            assert cut[key].tokens == len(tokenizer(before, add_special_tokens=False).input_ids) + 1
    cut = ask(engine, instruct(40, HOW._replace(stop_texts=("capital of", "is th"))))
    assert any(result.text.endswith("What ") for result in cut.values())
    assert all(result.text == re.split("capital of|is th", whole[key].text)[0] for key, result in cut.items())
    short = ask(engine, instruct(40, HOW._replace(max_tokens=5)))
    assert all((result.finish, result.tokens) == ("length", 5) and whole[key].text.startswith(result.text) for key, result in short.items())
    assert {result.prompt_tokens for result in short.values()} == {2}


@pytest.mark.slow
def test_leaked_special_tokens_are_seen(engine):
    found = ask(engine, [CompletionRequest((k,), Prompt((BOS, USER)), Sampling(2.0, 1.0, 200), k) for k in range(60)])
    leaks = {token for result in found.values() for token in re.findall(r"<\|\w+\|>", result.text)}
    assert leaks & {"<|user|>", "<|assistant|>", "<|system|>", "<|bos|>"} and "<|eot|>" not in leaks


@pytest.mark.slow
def test_the_context_ends_what_does_not_fit(engine):
    [found] = engine.complete([CompletionRequest((1,), Prompt((BOS, USER) + (7,) * 508), Sampling(1.0, 1.0, 50, ()), 2)])
    assert found.tokens <= 2 and found.prompt_tokens == 510


@pytest.mark.slow
def test_a_prompt_that_cannot_be_served_fails_alone(engine):
    bad = {("empty",): (), ("long",): (7,) * 512, ("unknown",): (0, 103), ("negative",): (0, -1), ("none",): None}
    requests = [CompletionRequest(key, Prompt(ids), HOW, 1) for key, ids in bad.items()]
    found = ask(engine, [requests[0], *instruct(3), *requests[1:]])
    assert {key: result.reason for key, result in found.items() if isinstance(result, Failure)} == {
        ("empty",): "empty prompt", ("long",): "prompt of 512 tokens, context of 512",
        ("unknown",): "token id 103 outside the vocabulary of 103",
        ("negative",): "token id -1 outside the vocabulary of 103",
        ("none",): "a prompt without token ids, which this engine needs"}
    assert sum(isinstance(result, Completion) for result in found.values()) == 3
    assert [type(result) for result in engine.choose([ChoiceRequest((1,), Prompt(()), ("1",))])] == [Failure]
    failed = list(engine.likelihood([LikelihoodRequest((1,), Prompt(()), (1,)), LikelihoodRequest((2,), INSTRUCT, ()),
                                     LikelihoodRequest((3,), INSTRUCT, (7,) * 510), LikelihoodRequest((4,), INSTRUCT, (7,) * 509)]))
    assert [type(result).__name__ for result in sorted(failed)] == ["Failure", "Failure", "Failure", "Likelihood"]


@pytest.mark.slow
def test_what_vllm_alone_refuses_fails_alone(engine):
    if engine.info.name.startswith("vllm"):
        found = ask(engine, [CompletionRequest((1,), INSTRUCT, HOW._replace(temperature=2.5), 1), *instruct(1)])
        assert "temperature" in found[1,].reason and found["i", 0].tokens


# ---------------------------------------------------------------- choices, likelihoods, embeddings


@pytest.mark.slow
def test_choices_against_a_forward_pass(engine, plain, tokenizer):
    prompts = questions(tokenizer, 40)
    choices = ("1", "2", "a", "s", "?")
    ids = [tokenizer.convert_tokens_to_ids(choice) for choice in choices]
    requests = [ChoiceRequest((k,), Prompt(prompt), choices) for k, prompt in enumerate(prompts)]
    found = {result.key: result for result in engine.choose(requests)}
    for k, prompt in enumerate(prompts):
        expected = logprobs(plain, prompt)[-1].exp()[ids].tolist()
        assert found[k,].probabilities == pytest.approx(expected, rel=2e-5) and found[k,].prompt_tokens == len(prompt)
        assert found[k,].mass == pytest.approx(sum(expected), rel=2e-5)
    assert {result.key: result for result in engine.choose(requests[::-3])} == {(k,): found[k,] for k in range(len(prompts) - 1, -1, -3)}


@pytest.mark.slow
def test_a_choice_without_a_token_is_refused_and_the_engine_lives(engine):
    with pytest.raises(EngineError, match="expected one token for each of 1, 10, got none for '10'; use judge.scoring generated"):
        list(engine.choose(ChoiceRequest((k,), INSTRUCT, ("1", "10")) for k in range(200)))
    assert ask(engine, instruct(3)) == {("i", k): ask(engine, instruct(1, first=k))["i", k] for k in range(3)}


def test_spellings_of_a_choice():
    """A byte-level vocabulary spells a digit with and without the space before it."""
    from tests.helpers import tiny

    tokenizer = tiny.tokenizer(["4 4 4 44 + 4 5 \n4"] * 50, vocab_size=300)
    known = {text: i for text, i in tokenizer.get_vocab().items() if text in ("4", "Ġ4", "5", "Ġ5", "44", "Ġ44")}
    found = Spellings(tokenizer, len(tokenizer), "m")(("4", "5"))
    assert {*found[0]} == {known["4"], known["Ġ4"]} and {*found[1]} <= {known["5"], known.get("Ġ5")} and known["5"] in found[1]


@pytest.mark.slow
def test_likelihood_against_a_forward_pass(engine, plain, tokenizer):
    continuations = [tuple(tokenizer("abcde fghij"[: 1 + k % 11], add_special_tokens=False).input_ids) + (EOT,) for k in range(40)]
    prompts = questions(tokenizer, 40)
    requests = [LikelihoodRequest((k,), Prompt(p), c) for k, (p, c) in enumerate(zip(prompts, continuations))]
    found = {result.key: result for result in engine.likelihood(requests)}
    for k, (prompt, continuation) in enumerate(zip(prompts, continuations)):
        whole = (*prompt, *continuation)
        given = logprobs(plain, whole)
        assert found[k,].logprob == pytest.approx(sum(float(given[i - 1, whole[i]]) for i in range(len(prompt), len(whole))), abs=2e-4)
        assert found[k,].tokens == len(continuation)
    assert {result.key: result for result in engine.likelihood(requests[::-3])} == {(k,): found[k,] for k in range(39, -1, -3)}


@pytest.mark.slow
def test_embeddings(engine, plain, tokenizer):
    texts = questions(tokenizer, 20)
    requests = [EmbeddingRequest((k,), ids) for k, ids in enumerate(texts)]
    if engine.info.name.startswith("vllm"):
        with pytest.raises(EngineError, match="engine vllm computes no embeddings; use engine transformers"):
            engine.embed(requests)
        return
    found = {result.key: result.vector for result in engine.embed([*requests, EmbeddingRequest(("e",), ())]) if result.key != ("e",)}
    for k, ids in enumerate(texts):
        with torch.no_grad():
            mean = plain.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert np.allclose(found[k,], mean / mean.norm(), atol=1e-5) and math.isclose(math.hypot(*found[k,]), 1.0)
    assert {result.key: result.vector for result in engine.embed(requests[::-2])} == {(k,): found[k,] for k in range(19, -1, -2)}


# ---------------------------------------------------------------- queues and shards


@pytest.mark.slow
def test_requests_are_taken_as_there_is_room(engine):
    taken, ahead = [], []

    def requests():
        for request in instruct(6_000, HOW._replace(max_tokens=1)):
            taken.append(request.key)
            yield request

    for done, _ in enumerate(engine.complete(requests())):
        ahead.append(len(taken) - done)
    assert len(ahead) == 6_000 and max(ahead) <= engine.workers[0].ready.depth + 300  # and what came in one message


@pytest.mark.slow
def test_stopping_early_leaves_the_engine_usable(engine):
    whole, before = ask(engine, instruct(30)), engine.busy()
    stream = engine.complete(instruct(3_000))
    assert next(stream).key[0] == "i"
    stream.close()
    assert ask(engine, instruct(30)) == whole and engine.busy() > before
    stream = engine.complete(instruct(3_000))
    next(stream)
    assert ask(engine, instruct(30)) == whole  # a second job ends the first
    with pytest.raises(RuntimeError, match="one job at a time"):
        list(stream)

    def broken():
        yield from instruct(100)
        raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        ask(engine, broken())
    assert ask(engine, instruct(30)) == whole


@pytest.mark.slow
def test_shards_give_what_one_gives(engine, opened, tokenizer):
    requests = instruct(150) + answers(tokenizer, 100)
    two = opened(engine.info.name.split()[0], data_parallel_size=2)
    assert len({worker.process.pid for worker in two.workers}) == 2 and two.info == engine.info
    assert ask(two, requests) == ask(engine, requests)
    assert all(worker.busy > 0 for worker in two.workers) and two.busy() == sum(worker.busy for worker in two.workers) / 2
    processes = [worker.process for worker in two.workers]
    two.close()
    assert all(process.poll() is not None for process in processes)
    two.close()


# ---------------------------------------------------------------- vLLM's own server


def get(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def served(engine, tmp_path_factory):
    """The URL of vLLM's server with the miniature base: in its own process group, which ends with the tests."""
    if not engine.info.name.startswith("vllm"):
        pytest.skip("there is a server of vLLM alone")
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_ATTN_SPLIT_KV": "0",
                        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    process = subprocess.Popen([
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE), "--served-model-name", "mini",
        "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--generation-config", "vllm",
        "--host", "127.0.0.1", "--port", str(port), "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", "300000000",
        "--disable-uvicorn-access-log"],
        env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not get(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, Path(log.name).read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_vllm_server_gives_what_vllm_gives_in_process(engine, served):
    how = Sampling(1.0, 0.98, 60, stop_ids=(1, 4, 5, 6))
    completions = [CompletionRequest(("c", i), Prompt((0, 4)), how, i) for i in range(100)]
    completions += [CompletionRequest(("s", i), Prompt((0, 4)), how._replace(stop_texts=("?", "of")), i) for i in range(20)]
    completions += [CompletionRequest(("leak", i), Prompt((0, 4)), Sampling(2.0, 1.0, 200), i) for i in range(40)]
    choices = [ChoiceRequest(("j", 1), Prompt((0, 4, 24, 1, 5)), ("a", "s", "h"))]
    remote = open_engine(Model(path="mini", engine="openai", base_url=served), Path("unused"))
    try:
        assert remote.info.fingerprint.endswith("max_model_len=512")
        found = ask(remote, completions)
        assert found == ask(engine, completions)
        assert any("<|" in result.text for key, result in found.items() if key[0] == "leak")
        [far], [near] = remote.choose(choices), engine.choose(choices)
        assert far.probabilities == pytest.approx(near.probabilities, abs=0.02)
        failed = ask(remote, [CompletionRequest(("long",), Prompt((7,) * 512), how, 1), CompletionRequest(("empty",), Prompt(()), how, 1)])
        assert all(isinstance(result, Failure) and result.reason.startswith("refused by the server") for result in failed.values())
        plain = Sampling(0.7, 0.9, 50)
        chats = ask(remote, [CompletionRequest((i,), Prompt(None, ({"role": "user", "content": f"q{i}"},)), plain, i) for i in range(2)])
        assert all(isinstance(result, Completion) and result.tokens for result in chats.values())
    finally:
        remote.close()
    unknown = open_engine(Model(path="other", engine="openai", base_url=served), Path("unused"))
    with pytest.raises(EngineError, match="does not know this model or path"):
        ask(unknown, completions[:1])
    unknown.close()
