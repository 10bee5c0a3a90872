"""GSM8K through the whole trainer, once with every weight trained and once with an adapter, as a user would run it.

A byte-pair tokenizer of 8,192 tokens is trained on the problems, a Llama of 7 M parameters starts from random weights, and
`python -m trainer.run` goes over the problems once. What it leaves is then loaded by stock transformers and PEFT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.harness import record
from benchmarks.speed.training import TEMPLATE, byte_pair_encoding, quiet, save_model
from trainer.errors import UserError

RUNS = {
    "full": ["--method", "full", "--optim.lr", "2e-3"],
    "lora": ["--method", "lora", "--lora.rank", "16", "--optim.lr", "5e-3", "--export", "both"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl: lines with question and answer")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--max_steps", type=int, help="stop each run early (default: one epoch)")


def run(arguments: argparse.Namespace) -> dict:
    quiet()
    with tempfile.TemporaryDirectory(prefix="steadfast-gsm8k-") as name:
        folder = Path(name)
        prepare(arguments.data, folder)
        startup = {name: seconds_to_first_step(folder / name, folder, arguments) for name in ("cold", "warm")}
        rows = [measure(kind, options, folder, arguments) for kind, options in RUNS.items()]
    conditions = {
        "data": arguments.data.name, "model": "Llama, width 256, 4 layers, vocabulary 8,192, random weights", "runs": RUNS,
        "precision": arguments.precision, "max_steps": arguments.max_steps, "threads": torch.get_num_threads(), "startup_seconds": startup}
    agreement = {f"{row['line']}: logits of what was saved, in stock code": row["logits_agree_within"] for row in rows}
    return record.make("gsm8k-cpu", conditions, agreement, rows, {})


def prepare(data: Path, folder: Path) -> None:
    """The tokenizer and the random model, saved the way hub models are."""
    try:
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        texts = [row[column] for row in rows for column in ("question", "answer")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--data: expected JSON lines with question and answer, found otherwise in {data} ({error})") from None
    core = byte_pair_encoding(texts)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="<|im_end|>",
                            chat_template=TEMPLATE).save_pretrained(folder / "model")
    save_model(folder, seed=0)


def trained(output: Path, folder: Path, arguments: argparse.Namespace, options: list[str]) -> list[dict]:
    """One run of the trainer in a process of its own; the records that it wrote."""
    sources = json.dumps([{"path": str(arguments.data), "columns": {"prompt": "question", "completion": "answer"}}])
    command = [sys.executable, "-m", "trainer.run", "--model.path", str(folder / "model"), "--data.train", sources, "--data.cache_dir",
               str(folder / "cache"), "--data.max_length", "1024", "--batch.tokens_per_step", "4096", "--precision", arguments.precision,
               "--output", str(output), "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"trainer.run failed: {done.stderr.strip()}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def seconds_to_first_step(output: Path, folder: Path, arguments: argparse.Namespace) -> float:
    """From starting the process to having made one step, everything included."""
    begun = time.time()
    records = trained(output, folder, arguments, ["--max_steps", "1"])
    return records[0]["time"] - begun


def measure(kind: str, options: list[str], folder: Path, arguments: argparse.Namespace) -> dict:
    """One epoch, and whether others can load what it left."""
    output = folder / kind
    steps = ["--max_steps", str(arguments.max_steps)] if arguments.max_steps else []
    records = trained(output, folder, arguments, ["--data.eval_fraction", "0.03", "--eval.every", "50", *options, *steps])
    evals, end = [r for r in records if r["kind"] == "eval"], records[-1]
    return {
        "line": kind, "steps": end["steps"], "tokens": end["tokens"], "seconds": end["seconds"], "tokens_per_second": end["tokens_per_s"],
        "heldout_loss_before": evals[0]["loss"], "heldout_loss_after": evals[-1]["loss"], "heldout": evals,
        "logits_agree_within": largest_difference(kind, folder, output)}


@torch.no_grad()
def largest_difference(kind: str, folder: Path, output: Path) -> float:
    """Largest difference of logits between two independent ways to load what the run left."""
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    ids = tokenizer("A robe takes 2 bolts of blue fiber and half that much white fiber.", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(output / "model").eval()(ids).logits
    if kind == "full":
        other = AutoModelForCausalLM.from_pretrained(output / "model", attn_implementation="eager")
    else:
        other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), output / "adapter")
    return float((merged - other.eval()(ids).logits).abs().max())
