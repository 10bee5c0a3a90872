"""Small training runs: their data, their options, and what they leave behind."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.data.samples import Piece

QUESTIONS = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}. The answer is {a + b}.") for a in range(12) for b in range(10)]


def write_chats(path: Path, rows=QUESTIONS) -> Path:
    """Write (question, answer) pairs as chats."""
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
                            for q, a in rows))
    return path


def write_domain_and_replay(folder: Path) -> Path:
    """Write chats of many lengths as domain.jsonl and replay.jsonl."""
    rng = np.random.default_rng(0)
    for name, count in (("domain", 40), ("replay", 24)):
        rows = [(f"{name} {i} " * rng.integers(1, 5), "quick fox " * rng.integers(1, 8)) for i in range(count)]
        write_chats(folder / f"{name}.jsonl", rows)
    return folder


def samples(lengths=(9, 14, 5)) -> list[Piece]:
    """Return samples of unequal lengths and weights, some of whose tokens are supervised."""
    rng = np.random.default_rng(0)
    return [Piece(rng.integers(5, 300, n).astype(np.int32), rng.random(n) < 0.6, weight) for n, weight in zip(lengths, (1.0, 0.5, 2.0))]


def arguments(model_folder, chats, output, *more) -> list[str]:
    """Return the command line of a small LoRA run; later options override earlier ones."""
    return [
        "--model.path", str(model_folder), "--data.train", str(chats), "--output", str(output), "--device", "cpu",
        "--data.max_length", "128", "--batch.tokens_per_pack", "256", "--batch.tokens_per_step", "512", "--optim.lr", "5e-3",
        "--logging.tensorboard", "false", "--logging.every", "2", "--data.num_proc", "1", "--lora.rank", "4",
        "--export.check", "false", *more]


def records(folder: Path, kind: str) -> list[dict]:
    """Return the records of one kind in a run's metrics.jsonl, without a last line that is still being written."""
    lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the adapter that a run left."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def text_of(html: str) -> str:
    """Return the text of a page, on one line."""
    html = re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)
    return " ".join(html.split())


class Readbacks(TorchDispatchMode):
    """Notes the operations whose result the host waits for: scalars read, sizes that depend on values."""

    WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default}

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.WAITS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
