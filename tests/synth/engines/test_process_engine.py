"""Engines that hold a model: both of them, on the miniature base, against a plain forward pass and against themselves in other batches."""

import gc
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from synth.config import Model
from synth.engines import kind_of, open_engine
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
from synth.engines.model_files import count_parameters, fingerprint
from synth.engines.tokens import Spellings, added_text

ROOT = Path(__file__).parents[3]
BASE = ROOT / "benchmarks/forgetting/miniature/models/base"
BOS, EOT, USER, ASSISTANT = 0, 1, 4, 5
HOW = Sampling(1.0, 0.98, 60, stop_ids=(1, 4, 5, 6))
INSTRUCT = Prompt((BOS, USER))


def needs(kind: str):
    there = kind != "vllm" or kind_of(Model(path="")) == "vllm"
    return pytest.param(kind, marks=pytest.mark.skipif(not there, reason="vLLM is not installed"))


@pytest.fixture(scope="module", params=[needs("vllm"), needs("transformers")])
def engine(request, tmp_path_factory):
    opened = open_engine(Model(path=str(BASE), engine=request.param), tmp_path_factory.mktemp("log") / "base")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def logprobs(plain, ids) -> torch.Tensor:
    with torch.no_grad():
        return plain(torch.tensor([list(ids)])).logits.double().log_softmax(-1)[0]


def instruct(n: int, how: Sampling = HOW, first: int = 0) -> list[CompletionRequest]:
    return [CompletionRequest(("i", k), INSTRUCT, how, k) for k in range(first, first + n)]


def questions(tokenizer, n: int) -> list[tuple[int, ...]]:
    """Prompts of many lengths that ask for an answer."""
    texts = [("What is the capital of " + "abcdefghij"[i % 10] * (1 + i % 23) + "?") for i in range(n)]
    return [(BOS, USER, *tokenizer(text, add_special_tokens=False).input_ids, EOT, ASSISTANT) for text in texts]


def answers(tokenizer, n: int) -> list[CompletionRequest]:
    how = HOW._replace(max_tokens=20)
    return [CompletionRequest(("a", k), Prompt(ids), how, 1_000 + k) for k, ids in enumerate(questions(tokenizer, n))]


def ask(engine, requests) -> dict:
    found = list(engine.complete(requests))
    assert len({result.key for result in found}) == len(found)
    return {result.key: result for result in found}


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


def test_leaked_special_tokens_are_seen(engine):
    found = ask(engine, [CompletionRequest((k,), Prompt((BOS, USER)), Sampling(2.0, 1.0, 200), k) for k in range(60)])
    leaks = {token for result in found.values() for token in re.findall(r"<\|\w+\|>", result.text)}
    assert leaks & {"<|user|>", "<|assistant|>", "<|system|>", "<|bos|>"} and "<|eot|>" not in leaks


def test_the_context_ends_what_does_not_fit(engine):
    [found] = engine.complete([CompletionRequest((1,), Prompt((BOS, USER) + (7,) * 508), Sampling(1.0, 1.0, 50, ()), 2)])
    assert found.tokens <= 2 and found.prompt_tokens == 510


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


# ---------------------------------------------------------------- workers


@pytest.mark.slow
def test_requests_are_taken_as_there_is_room(engine):
    taken, ahead = [], []

    def requests():
        for request in instruct(12_000, HOW._replace(max_tokens=1)):
            taken.append(request.key)
            yield request

    for done, _ in enumerate(engine.complete(requests())):
        ahead.append(len(taken) - done)
    assert len(ahead) == 12_000 and max(ahead) <= engine.workers[0].ready.depth + 300  # and what came in one message


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


@pytest.fixture
def opened(tmp_path):
    engines = []

    def open_(kind, **more):
        engines.append(open_engine(Model(path=str(BASE), engine=kind, **more), tmp_path / "log"))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


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


@pytest.mark.slow
def test_a_worker_that_dies_is_told_in_one_line(opened, tmp_path):
    for during, sign in ((False, signal.SIGKILL), (True, signal.SIGKILL), (True, signal.SIGABRT)):
        engine = opened("transformers")
        stream, seen = engine.complete(instruct(50_000)), []
        with pytest.raises(EngineError, match=rf"its transformers process was killed by signal {int(sign)}.*; see .*log-0\.log") as error:
            if not during:
                os.kill(engine.workers[0].process.pid, sign)
            for result in stream:
                seen.append(result)
                if len(seen) == 100:
                    os.kill(engine.workers[0].process.pid, sign)
        assert "\n" not in str(error.value) and (tmp_path / "log-0.log").exists() and bool(seen) == during


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


PARENT = """
import sys
from pathlib import Path
from synth.config import Model
from synth.engines import open_engine
from synth.engines.interface import CompletionRequest, Prompt, Sampling
engine = open_engine(Model(path=sys.argv[1], engine=sys.argv[2], data_parallel_size=2), Path(sys.argv[3]))
print(*(worker.process.pid for worker in engine.workers), flush=True)
for n, _ in enumerate(engine.complete(CompletionRequest((k,), Prompt((0, 4)), Sampling(1.0, 1.0, 400), k) for k in range(10**6))):
    if n == 20:
        print("busy", flush=True)
"""


def start_parent(kind: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PARENT, str(BASE), kind, str(folder / "log")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_until(holds, seconds=60):
    """Return once `holds()`; generous, since a loaded machine is slow."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [needs("vllm"), needs("transformers")])
def test_workers_end_with_their_parent(kind, tmp_path):
    parent = start_parent(kind, tmp_path)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and parent.stdout.readline() == "busy\n" and not any(map(gone, workers))
    parent.kill()
    parent.wait()
    wait_until(lambda: all(map(gone, workers)))


@pytest.mark.slow
def test_a_parent_that_ends_while_workers_load(tmp_path):
    parent = start_parent("transformers", tmp_path)
    workers = []
    while len(workers) < 2:
        workers = [child.pid for child in psutil.Process(parent.pid).children() if "synth.engines.worker" in child.cmdline()]
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    wait_until(lambda: all(map(gone, workers)))


@pytest.mark.slow
def test_a_forgotten_engine_ends(tmp_path):
    engine = open_engine(Model(path=str(BASE), engine="transformers"), tmp_path / "log")
    process = engine.workers[0].process
    del engine
    gc.collect()
    assert process.poll() is not None


# ---------------------------------------------------------------- models that do not start


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in BASE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def refused(folder, **more) -> str:
    with pytest.raises(EngineError) as error:
        open_engine(Model(path=str(folder), **({"engine": "transformers"} | more)), Path(folder).parent / "log" / "x").close()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "expected a model folder with config.json" in refused(tmp_path / "empty")
    assert "expected a folder or hub name, got what is neither" in refused(tmp_path / "none")
    with pytest.raises(EngineError, match="^a/b-c: no such folder, and no download under this name from the hub"):
        open_engine(Model(path="a/b-c", engine="transformers"), tmp_path / "x")


@pytest.mark.slow
def test_models_with_unfit_files(copy):
    weights = load_file(BASE / "model.safetensors")
    (copy / "model.safetensors").write_bytes(b"x" * 100)
    assert "model.safetensors: expected a safetensors file" in refused(copy)
    some = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(some, copy / "model.safetensors", {"format": "pt"})
    assert re.search(r"expected weights for all of LlamaForCausalLM, got none that fit for 3, such as .*layers\.1\.mlp", refused(copy))
    (copy / "model.safetensors").unlink()
    assert "expected weights in *.safetensors, got none" in refused(copy)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [needs("vllm"), needs("transformers")])
def test_an_unknown_architecture(copy, kind):
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"llama"', '"lama"').replace("LlamaForCausalLM", "LamaForCausalLM"))
    said = refused(copy, engine=kind)
    assert f"{kind}: the architecture is not supported (" in said and re.search(r"; try .*; see .*x-0\.log$", said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [needs("vllm"), needs("transformers")])
def test_a_context_longer_than_the_models_own(copy, kind):
    said = refused(copy, engine=kind, max_model_len=4_096)
    assert re.search("max_model_len: expected at most 512, .*got 4,096|the context is longer than the model's own", said)


@pytest.mark.slow
def test_a_shorter_context(opened):
    engine = opened("transformers", max_model_len=40)
    found = ask(engine, [CompletionRequest((1,), Prompt((BOS, USER) + (7,) * 38), HOW, 1),
                         CompletionRequest((2,), Prompt((BOS, USER) + (7,) * 30), HOW._replace(stop_ids=()), 1)])
    assert found[1,].reason == "prompt of 40 tokens, context of 40" and found[2,].tokens <= 8


def test_vllm_where_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = Model(path=str(BASE))
    assert kind_of(model) == "transformers" and kind_of(replace(model, engine="vllm")) == "vllm"
    with pytest.raises(EngineError, match=r"engine vllm is not installed; pip install 'steadfast-sft\[synth\]', or choose engine"):
        open_engine(replace(model, engine="vllm"), tmp_path / "x")


def test_more_gpus_than_there_are(monkeypatch):
    from synth.engines import process_engine

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    devices, model = process_engine._devices("transformers"), Model(path="m")
    assert devices == ["2", "3", "5", "7"] and process_engine._worker_count(model, devices) == 4
    assert process_engine._worker_count(replace(model, tensor_parallel_size=2), devices) == 2
    assert process_engine._worker_count(replace(model, data_parallel_size=3), devices) == 3
    with pytest.raises(EngineError, match="data_parallel_size, tensor_parallel_size: expected 6 GPUs for 3 x 2, got 4; lower"):
        process_engine._worker_count(replace(model, data_parallel_size=3, tensor_parallel_size=2), devices)
    assert process_engine._worker_count(model, []) == 1 and process_engine._worker_count(replace(model, data_parallel_size=3), []) == 3


def test_what_workers_are_told_before_they_import(monkeypatch):
    from synth.engines import process_engine

    for name in ("OMP_NUM_THREADS", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    model = Model(path="m", batch_invariant=True)
    cpu, gpu = process_engine._environment(model, [], 3), process_engine._environment(model, ["5", "7"], 3)
    assert cpu["OMP_NUM_THREADS"] == "3" and cpu["VLLM_CPU_ATTN_SPLIT_KV"] == "0" and "VLLM_CPU_KVCACHE_SPACE" not in cpu
    assert "VLLM_BATCH_INVARIANT" not in cpu and gpu["VLLM_BATCH_INVARIANT"] == "1" and gpu["CUDA_VISIBLE_DEVICES"] == "5,7"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert process_engine._environment(model, [], 3)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("error, text, words", [
    ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB", "out of memory .*; try a smaller max_model_len"),
    ("ValueError", "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "out of memory"),
    ("ValueError", "To serve at least one request with the models's max seq len (32768), (4.0 GiB KV cache is needed, which is larger than "
     "the available KV cache memory (1.0 GiB).", "the context does not fit into memory .*; try a smaller max_model_len"),
    ("ValidationError", "User-specified max_model_len (4096) is greater than the derived max_model_len", "longer than the model's own"),
    ("ValueError", "Bfloat16 is only supported on GPUs with compute capability of at least 8.0. use dtype half", "the dtype does not fit"),
    ("ValueError", "Model architectures ['X'] are not supported for now.", "the architecture is not supported"),
    ("ValueError", "requires you to execute ... set the option `trust_remote_code=True`", "code of its own .*; try trust_remote_code true"),
    ("KeyError", "'layers.0'", "vllm failed: KeyError: 'layers.0'; see x.log"),
])
def test_what_libraries_raise_becomes_one_line(error, text, words):
    from synth.engines.process_engine import explain_error

    assert re.search(words, explain_error(Model(path="m"), "vllm", error, text, Path("x.log")))


def test_the_last_error_line_of_a_log(tmp_path):
    from trainer.errors import last_error_line

    (tmp_path / "a").write_text("loading\nRuntimeError: no such kernel\n\nbye\n")
    (tmp_path / "b").write_text("loading\nbye\n")
    lines = [last_error_line(tmp_path / name) for name in ("a", "b", "c")]
    assert lines == ["RuntimeError: no such kernel", "bye", ""]


# ---------------------------------------------------------------- files and tokens


def test_fingerprints(copy):
    whole = fingerprint(BASE)
    assert fingerprint(copy) == whole and re.fullmatch("[0-9a-f]{16}", whole)
    (copy / "README.md").write_text("words")
    os.utime(copy / "config.json", (0, 0))
    assert fingerprint(copy) == whole
    seen = {whole}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(fingerprint(copy))
        (copy / name).write_bytes(content)
    assert len(seen) == 5 and fingerprint(copy) == whole
    (copy / "merges.txt").write_text("a b")
    assert fingerprint(copy) not in seen


def test_fingerprints_of_large_files_read_their_ends(copy, monkeypatch):
    from synth.engines import model_files

    monkeypatch.setattr(model_files, "READ_WHOLE", 100_000)
    monkeypatch.setattr(model_files, "PIECE", 10_000)
    whole, path = fingerprint(copy), copy / "model.safetensors"
    content = path.read_bytes()
    for place, seen in ((20, True), (len(content) - 5, True), (len(content) // 2, False)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        assert (fingerprint(copy) != whole) == seen


def test_parameters(plain):
    assert count_parameters(BASE) == sum(weight.numel() for weight in plain.parameters())


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_what_is_written_goes_on_from_the_prompt(before, after):
    from tests.helpers import tiny

    tokenizer = tiny.tokenizer()
    prompt, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, after))
    assert before + added_text(tokenizer, prompt, ids) == before + after


def test_a_space_that_a_sentencepiece_tokenizer_would_drop():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, "c"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([1]) == "b" and added_text(tokenizer, [0], [1]) == " b" and added_text(tokenizer, [0], [2, 1]) == "c b"


# ---------------------------------------------------------------- sums that do not depend on the batch


def put_back(monkeypatch) -> None:
    """Undo at the end of the test what an engine changes in its process."""
    for module, name in ((torch.nn.functional, "linear"), (torch.nn.functional, "silu"), (torch.nn.functional, "gelu"), (torch, "tanh"),
                         (torch, "sigmoid")):
        monkeypatch.setattr(module, name, getattr(module, name))


def test_products_do_not_depend_on_the_rows_beside(monkeypatch):
    from synth.engines.hf import make_rows_independent_of_batch

    weight, x = torch.randn(256, 96), torch.randn(200, 96)
    product = torch.nn.functional.linear
    assert any(not torch.equal(product(x[:n], weight), product(x, weight)[:n]) for n in range(1, 4)), "the cure has nothing to cure here"
    put_back(monkeypatch)
    make_rows_independent_of_batch(1)
    whole = torch.nn.functional.linear(x, weight)
    for n in (*range(1, 20), 33, 64, 127):
        assert torch.equal(torch.nn.functional.linear(x[50:50 + n], weight), whole[50:50 + n])
    assert torch.nn.functional.linear(x[:0], weight).shape == (0, 256) and torch.nn.functional.linear(x[0], weight).shape == (256,)
    assert torch.equal(torch.nn.functional.linear(x[:2].view(2, 1, 96), weight)[:, 0], whole[:2])
    assert torch.equal(torch.nn.functional.linear(x.view(20, 10, 96)[:, -1:], weight)[:, 0], whole[9::10])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "granite", "phi3", "gemma3", "mistral3 mistral"])
def test_families_in_batches_and_alone(family, tmp_path, monkeypatch):
    """Windows of 8 tokens, soft caps, scales: a wave gives what each row gives alone, and what growing it without a cache gives."""
    from synth.engines.hf import TransformersModel
    from synth.engines.protocol import LoadRequest
    from tests.helpers import tiny
    from tests.helpers.wrapped import WRAPPED, save_wrapped, wrapped_class

    put_back(monkeypatch)
    wrapped = family in WRAPPED
    save_wrapped(tmp_path, family) if wrapped else tiny.save_model(tmp_path, family)
    held = TransformersModel(LoadRequest("transformers", Model(path=str(tmp_path)), str(tmp_path), 1))

    def run(requests) -> dict:
        assert not any(held.add(request) for request in requests)
        found = {}
        while held.live:
            found |= {result.key: result for result in held.step()}
        return found

    prompts = [tuple(range(10 + k, 13 + k + k % 6)) for k in range(24)]
    requests = [CompletionRequest((k,), Prompt(ids), Sampling(k % 2, 0.9, 14, ()), k) for k, ids in enumerate(prompts)]
    whole = run(requests)
    assert len({result.tokens for result in whole.values()}) > 1 or {result.tokens for result in whole.values()} == {14}
    for request in requests[::5]:
        assert run([request]) == {request.key: whole[request.key]}
    own_class = wrapped_class(family) if wrapped else AutoModelForCausalLM
    plain, ids = own_class.from_pretrained(tmp_path, dtype=torch.float32).eval(), list(prompts[6])
    for _ in range(whole[6,].tokens):
        ids.append(int(logprobs(plain, ids)[-1].argmax()))
    end = len(ids) - (whole[6,].finish == "stop")
    assert whole[6,].text == added_text(held.tokenizer, prompts[6], ids[len(prompts[6]):end])
    scored = run([LikelihoodRequest((k,), Prompt(ids), (20, 21 + k)) for k, ids in enumerate(prompts)])
    assert run([LikelihoodRequest((7,), Prompt(prompts[7]), (20, 28))]) == {(7,): scored[7,]}


def test_the_nucleus_when_the_likeliest_are_not_enough(monkeypatch):
    from synth.engines import hf

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 500, generator=generator)
    hows = [Sampling(1.0, 0.95, 1)] * 8

    def draws():
        randoms = [[np.random.Generator(np.random.Philox(key=100 * k + i)) for i in range(8)] for k in range(50)]
        return [hf.draw(logits, hows, some) for some in randoms]

    whole = draws()
    monkeypatch.setattr(hf, "TOP_TOKENS", 16)
    assert draws() == whole and len({tuple(some) for some in whole}) == 50
