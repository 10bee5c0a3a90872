"""Messages between a worker process and the process that started it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from synth.config import Model
from synth.engines.interface import Failure


class Opening(NamedTuple):
    """What a worker is to hold."""

    kind: str  # vllm or transformers
    model: Model
    folder: str  # of the model's files
    shards: int  # how many workers there are on this machine


class Ready(NamedTuple):
    """What a worker says when it is up."""

    name: str
    deterministic: bool
    depth: int  # requests that it wants to have at hand


class Held(Protocol):
    """A model in this process."""

    ready: Ready
    live: int  # requests that it has and has not answered

    def add(self, request) -> Failure | None: ...  # EngineError where no such request can ever be served

    def step(self) -> list: ...  # some work; the results that are done

    def abort(self) -> None: ...  # forget all requests
