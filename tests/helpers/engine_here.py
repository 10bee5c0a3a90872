"""Run a model with transformers in the tests' own process, without a worker's start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from synth.config import Model
from synth.engines.adapters import digest_of, find_adapter
from synth.engines.hf import TransformersModel
from synth.engines.interface import EngineInfo
from synth.engines.model_files import fingerprint, locate
from synth.engines.protocol import LoadRequest


class EngineHere:
    """An Engine; takes the place of `synth.engines.open_engine`. It patches torch: call `put_back` before."""

    def __init__(self, model: Model, log: Path):
        folder = locate(model)
        self.loaded = TransformersModel(LoadRequest("transformers", model, str(folder), 1, find_adapter(model)))
        ready = self.loaded.ready
        self.info = EngineInfo(ready.name, model.path, "+".join(filter(None, (fingerprint(folder), digest_of(model)))),
                               ready.deterministic)

    def complete(self, requests: Iterable) -> Iterator:
        waiting = iter(requests)
        while True:
            for request in waiting:
                if failure := self.loaded.add(request):
                    yield failure
                if self.loaded.live >= self.loaded.ready.depth:
                    break
            if not self.loaded.live:
                return
            yield from self.loaded.step()

    choose = likelihood = complete

    def busy(self) -> float:
        return 0.0

    def cost(self) -> float:
        return 0.0

    def notes(self) -> list[str]:
        return []

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        pass


def put_back(monkeypatch) -> None:
    """Undo at the end of the test what an engine changes in its process (synth/engines/hf.py)."""
    for module, name in ((torch.nn.functional, "linear"), (torch.nn.functional, "silu"), (torch.nn.functional, "gelu"), (torch, "tanh"),
                         (torch, "sigmoid")):
        monkeypatch.setattr(module, name, getattr(module, name))
