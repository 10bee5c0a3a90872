"""Define the interface of an engine, its requests and its results.

Requests stream in and results stream out, in any order, each with its request's key. An engine keeps as many in flight as it can use.
Where `EngineInfo.deterministic` is true, a result depends only on its request, not on order or batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

from trainer.errors import UserError

Key = tuple  # identifies a request, e.g. (item, sample); anything that pickles and compares


class Prompt(NamedTuple):
    """Input of a model: token ids for a local engine, messages for a server that renders them itself."""

    token_ids: tuple[int, ...] | None
    messages: tuple[dict, ...] | None = None


class Sampling(NamedTuple):
    """Options of a completion. Temperature 0 is greedy.

    Stops and the model's own ends of sequence end it, and are not part of its text.
    """

    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()


class CompletionRequest(NamedTuple):
    """Generate a text after the prompt."""

    key: Key
    prompt: Prompt
    sampling: Sampling
    seed: int


class Completion(NamedTuple):
    """A generated text."""

    key: Key
    text: str  # with special tokens, so that leaked ones are seen
    tokens: int  # generated, including the stop
    finish: Literal["stop", "length"]
    logprob: float | None  # of all generated tokens, at temperature 1 and top_p 1; None where a server does not return it
    prompt_tokens: int


class ChoiceRequest(NamedTuple):
    """Compute each choice's probability as the next token; choices are texts of one token, e.g. digits."""

    key: Key
    prompt: Prompt
    choices: tuple[str, ...]


class Choice(NamedTuple):
    """Probabilities of the choices."""

    key: Key
    probabilities: tuple[float, ...]  # in the order of the choices, not normalised
    prompt_tokens: int

    @property
    def mass(self) -> float:
        """Return the sum of the probabilities: near 1 where the model answers in the requested form."""
        return sum(self.probabilities)


class LikelihoodRequest(NamedTuple):
    """Compute the log-probability of `continuation` after the prompt."""

    key: Key
    prompt: Prompt
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """The log-probability of a continuation."""

    key: Key
    logprob: float  # sum over the continuation's tokens
    tokens: int


class EmbeddingRequest(NamedTuple):
    """Compute a text's embedding: the mean over its tokens of the last layer's hidden states."""

    key: Key
    token_ids: tuple[int, ...]


class Embedding(NamedTuple):
    """The embedding of a text."""

    key: Key
    vector: tuple[float, ...]  # of length 1


class EngineInfo(NamedTuple):
    """Facts about an engine, for the pool and the manifest."""

    name: str  # "vllm 0.32.0 (cpu, float32)"
    model: str
    fingerprint: str  # of weights and tokenizer; for a server: its description of the model
    deterministic: bool  # equal requests give equal results in any batch


class EngineError(UserError):
    """An engine failed for good: it does not start, its process died, or its server is down.

    The message is one line.
    """


class AdapterRefused(EngineError):
    """An engine cannot apply an adapter, whose merged model it may run."""


class Failure(NamedTuple):
    """A request that cannot be served, e.g. too long for the context, or refused by the server."""

    key: Key
    reason: str


class Engine(Protocol):
    """A running model."""

    info: EngineInfo

    def complete(self, requests: Iterable[CompletionRequest]) -> Iterator[Completion | Failure]: ...

    def choose(self, requests: Iterable[ChoiceRequest]) -> Iterator[Choice | Failure]: ...

    def likelihood(self, requests: Iterable[LikelihoodRequest]) -> Iterator[Likelihood | Failure]: ...

    def embed(self, requests: Iterable[EmbeddingRequest]) -> Iterator[Embedding | Failure]: ...  # others than transformers raise

    def busy(self) -> float: ...  # seconds of computing so far, the mean over processes

    def cost(self) -> float: ...  # so far, by a server's `price`

    def notes(self) -> list[str]: ...  # what a server made us change, or the engine chose by itself, one line each

    def alive(self) -> bool: ...  # its processes still run, as far as is known

    def close(self) -> None: ...
