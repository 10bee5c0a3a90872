"""Write one JSON record for each run of a suite.

It holds what was measured, where, on which code, and every raw measurement.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.files import atomic_file

RESULTS = Path(__file__).parents[1] / "results"
VERSIONS = ("torch", "triton", "transformers", "peft", "trl", "datasets", "numpy", "bitsandbytes", "flash-attn", "liger-kernel",
            "cut-cross-entropy")
PLACES = ("--results", "--keep", "--data", "--work")  # options that say where files are on this machine


def make(suite: str, conditions: dict, agreement: dict[str, float], summary: list[dict], raw: dict[str, list[dict]]) -> dict:
    """Return the record of a run that ends now, on this machine and this state of the code."""
    return {
        "suite": suite, "time": datetime.now(UTC).isoformat(timespec="seconds"), **code(), "command": command(), **machine(),
        "versions": versions(), "conditions": conditions, "agreement": agreement, "summary": summary, "raw": raw,
    }


def code(root: Path = RESULTS.parents[1]) -> dict:
    """Return the commit, and whether tracked files differ from it; None outside a repository.

    Results and the pages that show them do not count: a run adds to them.
    """
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    pages = ":!benchmarks/results", ":!README.md", ":!benchmarks/README.md", ":!kernels/README.md", ":!trainer/README.md"
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *pages)
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def command() -> str:
    """Return the command that runs it again, without options that name places on this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec and spec.name.startswith("benchmarks.") else "benchmarks.run"
    return shlex.join(["python", "-m", module, *without_places(sys.argv[1:])])


def without_places(words: list[str]) -> list[str]:
    """Return a command's words without options that say where files are."""
    kept, following = [], iter(words)
    for word in following:
        if word in PLACES:
            next(following, None)
        elif not word.startswith(tuple(f"{place}=" for place in PLACES)):
            kept.append(word)
    return kept


def origin(record: dict) -> str:
    """Return the command that made a record, the day and the commit."""
    changes = " with changes" if record["dirty"] else ""
    return f"`{origin_command(record)}`, {record['time'][:10]}, commit {(record['commit'] or 'none')[:8]}{changes}"


def origin_command(record: dict) -> str:
    return shlex.join(without_places(shlex.split(record["command"])))


def machine() -> dict:
    cuda = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name() if cuda else "cpu", "cpu": cpu_model(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}


def cpu_model() -> str:
    """Return the processor's name, and the instruction set that torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    except FileNotFoundError:
        name = platform.processor() or platform.machine()
    bf16 = ", bf16 matmul" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{bf16})"


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(record: dict, folder: Path = RESULTS) -> Path:
    """Save as <suite>-<time>-<commit>.json, atomically."""
    stamp = record["time"].replace("-", "").replace(":", "").partition("+")[0]
    path = folder / f"{record['suite']}-{stamp}-{(record['commit'] or 'nocommit')[:8]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as tmp:
            tmp.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"results: cannot write {path}: {error.strerror}") from None
    return path


def newest(folder: Path = RESULTS) -> dict[str, dict]:
    """Return the latest record of each suite, by the time written in it."""
    records: dict[str, dict] = {}
    for path in sorted(folder.glob("[!.]*.json")):
        record = json.loads(path.read_text())
        if record["suite"] not in records or record["time"] >= records[record["suite"]]["time"]:
            records[record["suite"]] = record
    return records
