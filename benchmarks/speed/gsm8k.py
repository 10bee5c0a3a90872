"""Train on GSM8K with the whole trainer, once all weights and once an adapter, as a user would.

A byte-pair tokenizer of 8,192 tokens is trained on the problems, a Llama of 7 M parameters starts from random weights, and
`python -m trainer.run` trains for one epoch. Stock transformers and PEFT then load the results.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import record, show
from benchmarks.harness.public_sets import add_data_argument, gsm8k
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.synthetic_models import byte_pair_encoding, chat_tokenizer, quiet, save_model
from trainer.errors import UserError

RUNS = {
    "full": ["--method", "full", "--optim.lr", "2e-3"],
    "lora": ["--method", "lora", "--lora.rank", "16", "--optim.lr", "5e-3", "--export.format", "both"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser, "GSM8K's train split, JSON lines with question and answer")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--max_steps", type=int, help="stop each run early (default: one epoch)")


def run(arguments: argparse.Namespace) -> dict:
    """Train twice, load the results, and return the record."""
    quiet()
    with tempfile.TemporaryDirectory(prefix="steadfast-gsm8k-") as name:
        folder = Path(name)
        prepare(arguments.data, folder)
        startup = {name: seconds_to_first_step(folder / name, folder, arguments) for name in ("cold", "warm")}
        rows = [measure(kind, options, folder, arguments) for kind, options in RUNS.items()]
    conditions = {
        "data": "GSM8K", "model": "Llama, width 256, 4 layers, vocabulary 8,192, random weights", "runs": RUNS,
        "precision": arguments.precision, "max_steps": arguments.max_steps, "threads": torch.get_num_threads(), "startup_seconds": startup}
    agreement = {f"{row['line']}: logits of what was saved, in stock code": row["logits_agree_within"] for row in rows}
    return record.make("gsm8k-cpu", conditions, agreement, rows, {})


def prepare(data: Path | None, folder: Path) -> None:
    """Save the tokenizer and the random model as hub models are saved, and the problems as problems.jsonl."""
    pairs = gsm8k("train", data)
    rows = (json.dumps({"question": question, "answer": answer}) for question, answer in pairs)
    (folder / "problems.jsonl").write_text("\n".join(rows) + "\n")
    chat_tokenizer(byte_pair_encoding([text for pair in pairs for text in pair])).save_pretrained(folder / "model")
    save_model(folder)


def trained(output: Path, folder: Path, arguments: argparse.Namespace, options: list[str]) -> list[dict]:
    """Run the trainer in a process of its own, and return the records that it wrote."""
    sources = json.dumps([{"path": str(folder / "problems.jsonl"), "columns": {"prompt": "question", "completion": "answer"}}])
    command = [sys.executable, "-m", "trainer.run", "--model.path", str(folder / "model"), "--data.train", sources, "--data.cache_dir",
               str(folder / "cache"), "--data.max_length", "1024", "--batch.tokens_per_step", "4096", "--precision", arguments.precision,
               "--output", str(output), "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"trainer.run failed: {done.stderr.strip()}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def seconds_to_first_step(output: Path, folder: Path, arguments: argparse.Namespace) -> float:
    """Return the seconds from the start of the process to the end of its first step."""
    begun = time.time()
    records = trained(output, folder, arguments, ["--max_steps", "1"])
    return records[0]["time"] - begun


def measure(kind: str, options: list[str], folder: Path, arguments: argparse.Namespace) -> dict:
    """Train for one epoch, and load what the run leaves with stock libraries."""
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
    """Return the largest difference of logits between two independent ways to load what the run left."""
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    ids = tokenizer("A robe takes 2 bolts of blue fiber and half that much white fiber.", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(output / "model").eval()(ids).logits
    if kind == "full":
        other = AutoModelForCausalLM.from_pretrained(output / "model", attn_implementation="eager")
    else:
        other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), output / "adapter")
    return float((merged - other.eval()(ids).logits).abs().max())


# ---------------------------------------------------------------- how a record is shown


def table(record: dict) -> list[list[str]]:
    head = ["trained", "held-out loss before", "after one epoch", "tokens", "tokens per second", "logits agree within"]
    return [head] + [[row["line"], f"{row['heldout_loss_before']:.3f}", f"{row['heldout_loss_after']:.3f}", f"{row['tokens']:,}",
                      f"{row['tokens_per_second']:,.0f}", f"{row['logits_agree_within']:.0e}"] for row in record["summary"]]


def caption(record: dict) -> Caption:
    c, first = record["conditions"], record["summary"][0]
    return Caption(
        f"One epoch of GSM8K through `python -m trainer.run`: {c['model']}; {c['precision']} compute, {record['cpu']}, {c['threads']} "
        "threads. Loss over 3% of the problems, which are not trained on.",
        ("Logits agree: the merged model in transformers against the adapter in PEFT (LoRA), or sdpa against eager attention (full).",
         f"From the start of the process to the end of the first step: {c['startup_seconds']['cold']:.1f} s, "
         f"{c['startup_seconds']['warm']:.1f} s once the tokens are cached.",
         f"{first['steps']} steps each; {origin(record)}."))


def draw(record: dict, figure) -> None:
    """Draw held-out loss over the epoch."""
    axes = show.axes_of(figure)
    for row, colour in zip(record["summary"], (show.OURS, show.SECOND)):
        axes.plot([point["step"] for point in row["heldout"]], [point["loss"] for point in row["heldout"]], marker="o", color=colour,
                  label=row["line"])
    axes.set(xlabel="step", ylabel="held-out loss")
    axes.legend(frameon=False)


SUITE = Suite("gsm8k", "One epoch of GSM8K through the whole trainer, all weights and LoRA", add_arguments, run,
              {"gsm8k": View(table, caption, draw, lambda record: "Held-out loss on GSM8K, from random weights")})
