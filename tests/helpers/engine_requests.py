"""Requests to an engine that holds the miniature base, and what a plain forward pass says of them."""

from pathlib import Path

import pytest
import torch

from synth.config import Model
from synth.engines import kind_of
from synth.engines.interface import CompletionRequest, Prompt, Sampling

ROOT = Path(__file__).parents[2]
BASE = ROOT / "benchmarks/forgetting/miniature/models/base"
BOS, EOT, USER, ASSISTANT = 0, 1, 4, 5
HOW = Sampling(1.0, 0.98, 60, stop_ids=(1, 4, 5, 6))
INSTRUCT = Prompt((BOS, USER))


def needs(kind: str):
    there = kind != "vllm" or kind_of(Model(path="")) == "vllm"
    return pytest.param(kind, marks=pytest.mark.skipif(not there, reason="vLLM is not installed"))


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
