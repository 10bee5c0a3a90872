"""Choose and start an engine, which runs one language model with vLLM, transformers or a server.

All three have one small interface (interface.py).

vLLM and transformers run in worker processes (process_engine.py starts them, worker.py is their program), so that their memory is always
returned. A server is called from this process (openai.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from synth.config import Model
from synth.engines.interface import Engine, EngineError


def kind_of(model: Model) -> str:
    """Return the kind of engine that runs `model`; auto is vllm where it is installed, else transformers."""
    if model.engine != "auto":
        return model.engine
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


def open_engine(model: Model, log: Path) -> Engine:
    """Start the engine that runs `model`; its processes write to `<log>-<number>.log`.

    Raises EngineError, of one line, where it does not start.
    """
    kind = kind_of(model)
    if kind == "openai":
        from synth.engines.openai import OpenAIEngine

        return OpenAIEngine(model)
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EngineError(f"{model.path}: engine vllm is not installed; pip install 'steadfast-sft[synth]', or choose engine transformers")
    from synth.engines.process_engine import ProcessEngine

    return ProcessEngine(model, kind, Path(log))
