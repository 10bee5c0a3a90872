"""Define the messages between a worker process and its parent, and the interface of a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from synth.config import Model
from synth.engines.interface import Failure
from trainer.model.saved_adapter import adapter_tokenizer


class LoadRequest(NamedTuple):
    """The model that a worker is to load."""

    kind: str  # vllm or transformers
    model: Model
    folder: str  # of the model's files
    workers: int  # worker processes on this machine, which share its memory
    adapter: str | None = None  # folder of the adapter with which it answers
    merge: bool = False  # merge the adapter into a copy of the weights first, as the engine cannot apply it

    @property
    def tokenizer(self) -> str:
        """Return the folder of the tokenizer: the adapter's, where it has one."""
        return (self.adapter and adapter_tokenizer(Path(self.adapter))) or self.folder


class Ready(NamedTuple):
    """A worker's message when its model is loaded."""

    name: str  # of engine, device and dtype
    deterministic: bool
    depth: int  # requests to queue at this worker
    notes: tuple[str, ...] = ()  # what the engine chose by itself, one line each


class LoadedModel(Protocol):
    """A model in this process."""

    ready: Ready
    live: int  # requests that are not answered yet

    def add(self, request) -> Failure | None:
        """Queue a request; return a Failure where it cannot be served.

        Raises EngineError where no such request ever can.
        """

    def step(self) -> list:
        """Compute a little, and return the results that are complete."""

    def abort(self) -> None:
        """Drop all requests."""
