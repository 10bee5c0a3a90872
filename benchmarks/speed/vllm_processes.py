"""Start the processes of synthesis benchmarks: bare vLLM, our engine, and a run on an empty pool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from synth.config import Config, Model
from synth.engines.interface import Engine
from synth.engines.process_engine import ProcessEngine
from synth.pool.store import Pool
from synth.pool.synthesis_run import SynthesisRun
from synth.stages.instruct import plan
from trainer.errors import UserError


@contextmanager
def bare_vllm(folder: str) -> Iterator:
    """Start a process that calls vLLM on files of requests, and yield the function that asks it."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_ATTN_SPLIT_KV": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.speed.bare_vllm", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env=environment)

    def answer() -> str:
        line = process.stdout.readline()
        if not line:
            raise UserError("synthesis: the bare vLLM process ended; python -m benchmarks.speed.bare_vllm MODEL shows why")
        return line

    def ask(requests: Path) -> dict:
        print(requests, file=process.stdin, flush=True)
        return json.loads(answer())

    try:
        answer()  # ready
        yield ask
    finally:
        process.kill()
        process.wait()


@contextmanager
def engine_of(model: Model, work: Path) -> Iterator[Engine]:
    engine = ProcessEngine(model, "vllm", work / "engine")
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def fresh_run(model: Model, work: Path, settings: Config) -> Iterator[SynthesisRun]:
    """Yield a run with an empty pool in which the items are planned."""
    with tempfile.TemporaryDirectory(dir=work) as folder, Pool(Path(folder) / "pool.sqlite") as pool:
        with pool.transaction():
            pool.insert("items", (plan(settings, item) for item in range(settings.instruct.num_instructions)))
        with SynthesisRun(settings, pool, say=lambda line: None) as run:
            yield run
