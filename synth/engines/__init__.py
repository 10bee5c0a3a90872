"""Engines: what runs a language model for us. One small interface, three of them, chosen by what is installed.

vLLM and transformers run in processes of their own (workers.py starts them, worker.py is what they run), so that their memory always comes
back; a server is asked from here (openai.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from synth.config import Model
from synth.engines.interface import Engine, EngineError


def kind_of(model: Model) -> str:
    """Which engine runs `model`: the one its settings name, or vLLM where it is installed, else transformers."""
    if model.engine != "auto":
        return model.engine
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


def open_engine(model: Model, log: Path) -> Engine:
    """Start the engine that runs `model`. What its processes say goes to `<log>-<shard>.log`.

    EngineError, of one line, where it does not start.
    """
    kind = kind_of(model)
    if kind == "openai":
        from synth.engines.openai import Server

        return Server(model)
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EngineError(f"{model.path}: engine vllm is not installed; pip install 'steadfast-sft[synth]', or choose engine transformers")
    from synth.engines.process_engine import Workers

    return Workers(model, kind, Path(log))
