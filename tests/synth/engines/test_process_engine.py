"""Worker processes of an engine: how they die, and models that do not start."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from synth.config import Model
from synth.engines import kind_of, open_engine, process_engine
from synth.engines.interface import CompletionRequest, EngineError, Prompt
from synth.engines.protocol import LoadRequest
from tests.helpers.engine_requests import BASE, BOS, HOW, ROOT, USER, ask, instruct, needs

# ---------------------------------------------------------------- workers


@pytest.mark.slow
def test_a_worker_that_dies_is_told_in_one_line(opened, tmp_path):
    for during, sign in ((False, signal.SIGKILL), (True, signal.SIGABRT)):
        engine = opened("transformers")
        stream, seen = engine.complete(instruct(50_000)), []
        with pytest.raises(EngineError, match=rf"its transformers process was killed by signal {int(sign)}.*; see .*log-0\.log") as error:
            if not during:
                os.kill(engine.workers[0].process.pid, sign)
            for result in stream:
                seen.append(result)
                if len(seen) == 100:
                    os.kill(engine.workers[0].process.pid, sign)
        assert not engine.alive()
        assert "\n" not in str(error.value) and (tmp_path / "log-0.log").exists() and bool(seen) == during


LITTER = """#!/bin/sh
touch "$TMPDIR/vllm_dist_1"
exec sleep 60
"""


def test_what_a_worker_leaves_in_the_temporary_folder_is_removed(tmp_path, monkeypatch):
    shared, program = tmp_path / "tmp", tmp_path / "program"
    (shared / ".steadfast-worker.killed").mkdir(parents=True)
    program.write_text(LITTER)
    program.chmod(0o700)
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    monkeypatch.setattr("sys.executable", str(program))
    worker = process_engine.WorkerProcess(LoadRequest("vllm", Model(path="m"), "m", 1), tmp_path / "log", dict(os.environ))
    while not (found := list(shared.rglob("*"))) or found[-1].name != "vllm_dist_1":
        time.sleep(0.01)
    assert len(found) == 2 and worker.process.poll() is None
    worker.close()
    assert list(shared.iterdir()) == [] and gone(worker.process.pid)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


PARENT = """
import sys
from pathlib import Path
from synth.config import Model
from synth.engines import open_engine
from synth.engines.interface import CompletionRequest, Prompt, Sampling
engine = open_engine(Model(path=sys.argv[1], engine=sys.argv[2], data_parallel_size=int(sys.argv[4])), Path(sys.argv[3]))
print(*(worker.process.pid for worker in engine.workers), flush=True)
for n, _ in enumerate(engine.complete(CompletionRequest((k,), Prompt((0, 4)), Sampling(1.0, 1.0, 400), k) for k in range(10**6))):
    if n == 20:
        print("busy", flush=True)
"""


def start_parent(kind: str, folder: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-c", PARENT, str(BASE), kind, str(folder / "log"), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_until(holds, seconds=60):
    """Return once `holds()`; generous, since a loaded machine is slow."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


@pytest.mark.slow
def test_a_busy_worker_ends_with_its_parent(tmp_path):
    parent = start_parent(kind_of(Model(path="")), tmp_path, 1)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 1 and parent.stdout.readline() == "busy\n" and not any(map(gone, workers))
    parent.kill()
    parent.wait()
    wait_until(lambda: all(map(gone, workers)))


@pytest.mark.slow
def test_a_parent_that_ends_while_workers_load(tmp_path):
    parent = start_parent("transformers", tmp_path, 2)
    workers = []
    while len(workers) < 2:
        workers = [child.pid for child in psutil.Process(parent.pid).children() if "synth.engines.worker" in child.cmdline()]
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    wait_until(lambda: all(map(gone, workers)))


# ---------------------------------------------------------------- models that do not start


def refused(folder, **more) -> str:
    with pytest.raises(EngineError) as error:
        open_engine(Model(path=str(folder), **({"engine": "transformers"} | more)), Path(folder).parent / "log" / "x").close()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "expected a model folder with config.json" in refused(tmp_path / "empty")
    assert "expected a folder or hub name, got what is neither" in refused(tmp_path / "none")
    with pytest.raises(EngineError, match="^a/b-c: no such folder, and no download under this name from the hub"):
        open_engine(Model(path="a/b-c", engine="transformers"), tmp_path / "x")


@pytest.mark.slow
def test_models_with_unfit_files(copy):
    weights = load_file(BASE / "model.safetensors")
    (copy / "model.safetensors").write_bytes(b"x" * 100)
    assert "model.safetensors: expected a safetensors file" in refused(copy)
    some = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(some, copy / "model.safetensors", {"format": "pt"})
    assert re.search(r"expected weights for all of LlamaForCausalLM, got none that fit for 3, such as .*layers\.1\.mlp", refused(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**31}))
    assert "expected at most 10,000 layers in the config of" in refused(copy)
    (copy / "model.safetensors").unlink()
    assert "expected weights in *.safetensors, got none" in refused(copy)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [needs("vllm"), needs("transformers")])
def test_an_unknown_architecture(copy, kind):
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"llama"', '"lama"').replace("LlamaForCausalLM", "LamaForCausalLM"))
    said = refused(copy, engine=kind)
    assert f"{kind}: the architecture is not supported (" in said and re.search(r"; try .*; see .*x-0\.log$", said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [needs("vllm"), needs("transformers")])
def test_a_context_longer_than_the_models_own(copy, kind):
    said = refused(copy, engine=kind, max_model_len=4_096)
    assert re.search("max_model_len: expected at most 512, .*got 4,096|the context is longer than the model's own", said)


@pytest.mark.slow
def test_a_shorter_context_and_a_forgotten_engine_ends(tmp_path):
    engine = open_engine(Model(path=str(BASE), engine="transformers", max_model_len=40), tmp_path / "log")
    found = ask(engine, [CompletionRequest((1,), Prompt((BOS, USER) + (7,) * 38), HOW, 1),
                         CompletionRequest((2,), Prompt((BOS, USER) + (7,) * 30), HOW._replace(stop_ids=()), 1)])
    assert found[1,].reason == "prompt of 40 tokens, context of 40" and found[2,].tokens <= 8
    process = engine.workers[0].process
    assert process.poll() is None and engine.alive()
    del engine
    gc.collect()
    assert process.poll() is not None


def test_vllm_where_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = Model(path=str(BASE))
    assert kind_of(model) == "transformers" and kind_of(replace(model, engine="vllm")) == "vllm"
    with pytest.raises(EngineError, match=r"engine vllm is not installed; pip install 'steadfast-sft\[synth\]', or choose engine"):
        open_engine(replace(model, engine="vllm"), tmp_path / "x")


def test_more_gpus_than_there_are(monkeypatch):
    from synth.engines import process_engine

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    devices, model = process_engine._devices("transformers"), Model(path="m")
    assert devices == ["2", "3", "5", "7"] and process_engine._worker_count(model, devices) == 4
    assert process_engine._worker_count(replace(model, tensor_parallel_size=2), devices) == 2
    assert process_engine._worker_count(replace(model, data_parallel_size=3), devices) == 3
    with pytest.raises(EngineError, match="data_parallel_size, tensor_parallel_size: expected 6 GPUs for 3 x 2, got 4; lower"):
        process_engine._worker_count(replace(model, data_parallel_size=3, tensor_parallel_size=2), devices)
    assert process_engine._worker_count(model, []) == 1 and process_engine._worker_count(replace(model, data_parallel_size=3), []) == 3


def test_what_workers_are_told_before_they_import(monkeypatch):
    from synth.engines import process_engine

    for name in ("OMP_NUM_THREADS", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    model = Model(path="m", batch_invariant=True)
    cpu, gpu = process_engine._environment(model, [], 3), process_engine._environment(model, ["5", "7"], 3)
    assert cpu["OMP_NUM_THREADS"] == "3" and cpu["VLLM_CPU_ATTN_SPLIT_KV"] == "0" and "VLLM_CPU_KVCACHE_SPACE" not in cpu
    assert "VLLM_BATCH_INVARIANT" not in cpu and gpu["VLLM_BATCH_INVARIANT"] == "1" and gpu["CUDA_VISIBLE_DEVICES"] == "5,7"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert process_engine._environment(model, [], 3)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("error, text, words", [
    ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB", "out of memory .*; try a smaller max_model_len"),
    ("ValueError", "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "out of memory"),
    ("ValueError", "To serve at least one request with the models's max seq len (32768), (4.0 GiB KV cache is needed, which is larger than "
     "the available KV cache memory (1.0 GiB).", "the context does not fit into memory .*; try a smaller max_model_len"),
    ("ValidationError", "User-specified max_model_len (4096) is greater than the derived max_model_len", "longer than the model's own"),
    ("ValueError", "Bfloat16 is only supported on GPUs with compute capability of at least 8.0. use dtype half", "the dtype does not fit"),
    ("ValueError", "Model architectures ['X'] are not supported for now.", "the architecture is not supported"),
    ("ValueError", "requires you to execute ... set the option `trust_remote_code=True`", "code of its own .*; try trust_remote_code true"),
    ("KeyError", "'layers.0'", "vllm failed: KeyError: 'layers.0'; see x.log"),
])
def test_what_libraries_raise_becomes_one_line(error, text, words):
    from synth.engines.process_engine import explain_error

    assert re.search(words, explain_error(Model(path="m"), "vllm", error, text, Path("x.log")))


def test_the_last_error_line_of_a_log(tmp_path):
    from trainer.errors import last_error_line

    (tmp_path / "a").write_text("loading\nRuntimeError: no such kernel\n\nbye\n")
    (tmp_path / "b").write_text("loading\nbye\n")
    lines = [last_error_line(tmp_path / name) for name in ("a", "b", "c")]
    assert lines == ["RuntimeError: no such kernel", "bye", ""]
