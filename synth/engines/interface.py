"""The interface of an engine: complete these token ids; score these choices; how likely are these tokens.

Requests stream in and results stream out, in any order, each bearing its request's key. An engine keeps as many in flight as it can use.
What a result holds depends on its request alone where `EngineInfo.deterministic` says so, never on order or batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

from trainer.errors import UserError

Key = tuple  # what a request is for, e.g. (item, sample); anything that pickles and compares


class Prompt(NamedTuple):
    """What a model is given: token ids, for an engine that holds the model; the chat itself, for a server that renders it."""

    token_ids: tuple[int, ...] | None
    messages: tuple[dict, ...] | None = None


class Sampling(NamedTuple):
    """How a completion is drawn. Temperature 0 is greedy. It ends at any of the stops and at the model's own ends of sequence, and its text
    holds none of them."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()


class CompletionRequest(NamedTuple):
    key: Key
    prompt: Prompt
    sampling: Sampling
    seed: int


class Completion(NamedTuple):
    key: Key
    text: str  # special tokens shown, so that leaked ones can be seen
    tokens: int  # generated, the one that stopped it included
    finish: Literal["stop", "length"]
    logprob: float | None  # of all generated tokens, at temperature 1 and top_p 1; None where a server does not tell
    prompt_tokens: int


class ChoiceRequest(NamedTuple):
    """Which of `choices` (short texts of one token each, e.g. digits) comes next."""

    key: Key
    prompt: Prompt
    choices: tuple[str, ...]


class Choice(NamedTuple):
    key: Key
    probabilities: tuple[float, ...]  # of the choices in their order, before they are normalised
    prompt_tokens: int

    @property
    def mass(self) -> float:
        """What the choices have together: near 1 where the model answers in the form that was asked for."""
        return sum(self.probabilities)


class LikelihoodRequest(NamedTuple):
    """How likely `continuation` is after the prompt."""

    key: Key
    prompt: Prompt
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    key: Key
    logprob: float  # of the continuation's tokens together
    tokens: int


class EmbeddingRequest(NamedTuple):
    """Where the model puts a text: the mean over its tokens of the last layer's hidden states."""

    key: Key
    token_ids: tuple[int, ...]


class Embedding(NamedTuple):
    key: Key
    vector: tuple[float, ...]  # of length 1


class EngineInfo(NamedTuple):
    """What the manifest says of an engine."""

    name: str  # "vllm 0.32.0 (cpu, float32)"
    model: str
    fingerprint: str  # of weights and tokenizer; of a server: what it says it serves
    deterministic: bool  # equal requests give equal results in any batch


class EngineError(UserError):
    """An engine that failed for good: it does not start, its process died, its server is down. The message is one line."""


class Failure(NamedTuple):
    """In place of a result: this one request cannot be served (too long for the context, refused by the server)."""

    key: Key
    reason: str


class Engine(Protocol):
    info: EngineInfo

    def complete(self, requests: Iterable[CompletionRequest]) -> Iterator[Completion | Failure]: ...

    def choose(self, requests: Iterable[ChoiceRequest]) -> Iterator[Choice | Failure]: ...

    def likelihood(self, requests: Iterable[LikelihoodRequest]) -> Iterator[Likelihood | Failure]: ...

    def embed(self, requests: Iterable[EmbeddingRequest]) -> Iterator[Embedding | Failure]: ...  # transformers alone; others: EngineError

    def busy(self) -> float: ...  # seconds so far in which the model itself was at work, as a mean over processes

    def cost(self) -> float: ...  # what a server's price makes of its work so far

    def close(self) -> None: ...
