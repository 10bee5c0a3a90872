"""`python -m trainer.run`: fine-tune a language model on chats. Parse, build, loop, report."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers

from trainer import checkpoint, cli
from trainer.config import Config, validate
from trainer.distributed import World, world
from trainer.dry_run import show
from trainer.errors import UserError
from trainer.export import merge_and_save, save_adapter
from trainer.inputs import Inputs, account, prepare_inputs, save_account
from trainer.log import Log
from trainer.loop import Job, Outcome, fit
from trainer.lora import add_adapter
from trainer.metrics import model_size, peak_flops
from trainer.model import apply_activation_checkpointing, compute_dtype, dtype_name, load_model, load_tokenizer, patch
from trainer.optim import FlatAdamW
from trainer.report import write_report

USAGE = """\
usage: python -m trainer.run --model.path MODEL --data.train FILE [--section.option value ...]
       python -m trainer.run --config run.yaml [--section.option value ...]

Fine-tunes a language model on chats with packed sequences, and leaves an adapter that PEFT loads.

The two commonest commands:
  python -m trainer.run --model.path my-model --data.train chats.jsonl --output runs/first
  python -m trainer.run --model.path my-model --data.train domain.jsonl --replay.data general.jsonl --replay.ratio 0.5

First, see what would be trained on, with masks, lengths and memory:      add --dry_run
Train all weights instead of an adapter:                                  add --adapter full
Go on after an interruption:                                              add --resume auto
Several GPUs:                             torchrun --nproc-per-node 8 -m trainer.run ...

--help lists every option; --print_config prints them as YAML with their values."""


@dataclass
class RunResult:
    """Where a run ended and what it left behind."""

    folder: Path
    steps: int
    loss: float  # mean training loss of the last log interval
    heldout_loss: float | None
    reason: str
    signal: int | None = None


def main() -> int:
    def run(config: Config) -> int:
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        result = train(config)
        return 128 + result.signal if result and result.signal else 0

    return cli.main(run, Config, "trainer.run", USAGE)


def train(config: Config) -> RunResult | None:
    """The whole run: returns its result, or None after a dry run. Raises UserError for anything the user can mend."""
    validate(config)
    device = choose_device(config.device)
    with world(device.type) as ranks:
        tokenizer = load_tokenizer(config.model)
        with ranks.main_first():
            inputs = prepare_inputs(config, tokenizer)
        if config.dry_run:
            show(config, inputs, device)
            return None
        job, state = build(config, inputs, device, ranks)
        if state.step >= inputs.plan.total:
            raise UserError(f"resume: {job.folder} is already trained to its last step, {state.step}; raise epochs in a new output folder")
        outcome = fit(job, state)
        if ranks.is_main:
            leave(job, tokenizer, outcome)
        ranks.barrier()
    return RunResult(job.folder, outcome.steps, outcome.loss, outcome.heldout_loss, outcome.reason, outcome.signal)


def choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected a CUDA GPU, found none; use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def build(config: Config, inputs: Inputs, device: torch.device, ranks: World) -> tuple[Job, checkpoint.State]:
    """Model, adapter, patches, optimiser and run folder; from the newest checkpoint where the run goes on from one."""
    model, _ = load_model(config, device)
    torch.manual_seed(config.seed)
    if config.adapter == "lora":
        model = add_adapter(model, config.lora)
    patched = patch(model, config.model.patch)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    optimizer = FlatAdamW(model.parameters(), config.optim)
    ranks.broadcast([group.master.data for group in optimizer.groups])
    if config.compile:
        compile_layers(model)

    folder = Path(config.output)
    identity = checkpoint.identity(config, inputs.samples.fingerprint, ranks.size)
    state = start(folder, config, identity, optimizer)
    size = model_size(model)
    log = None
    if ranks.is_main:
        open_folder(folder, config)
        save_account(folder / "data.json", account(inputs, config) | {
            "model": {"path": config.model.path or config.model.config, "family": patched.family, "parameters": size.parameters,
                      "trainable": size.trainable}, "backends": patched.backends})
        greet(config, inputs, device, patched, size)
        log = Log(folder, config, inputs.plan.total, state.step)
    return Job(config, folder, model, size, optimizer, inputs.samples, inputs.plan, inputs.heldout, identity, device, ranks, log), state


def start(folder: Path, config: Config, identity: dict, optimizer: FlatAdamW) -> checkpoint.State:
    """A fresh state, or that of the newest checkpoint. An output that holds another run is never overwritten silently."""
    last = checkpoint.newest(folder / "checkpoints")
    if config.resume == "auto" and last:
        print(f"resuming from {last}")
        return checkpoint.load(last, identity, optimizer)
    if last:
        raise UserError(f"output: {folder} holds checkpoints of an earlier run, the newest {last.name}; add --resume auto to go on from "
                        "it, or choose another --output")
    return checkpoint.State(step=0, best=None, stale=0, identity=identity)


def open_folder(folder: Path, config: Config) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "datasets", "tokenizers")}
        cli.save_yaml(config, folder / "config.yaml", versions={"python": platform.python_version(), **versions},
                      command=shlex.join(sys.orig_argv))
    except OSError as error:
        raise UserError(f"output: cannot write the run folder {folder}: {error.strerror}; choose another --output") from None


def greet(config: Config, inputs: Inputs, device: torch.device, patched, size) -> None:
    """Say, once, what runs where."""
    dtype = compute_dtype(config.precision, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {name}; compute {dtype_name(dtype)}, fp32 masters; peak {peak_flops(device, dtype)[1]}")
    print(patched)
    print(f"parameters: {size.parameters:,}, trained {size.trainable:,} ({config.adapter})")
    for share in account(inputs, config)["sources"]:
        print(f"{share['role']} {share['name']}: {share['samples']:,} samples, {share['share_rows']:.1%} of rows, "
              f"{share['share_tokens']:.1%} of tokens; dropped {share['dropped']}, truncated {share['truncated']}, split {share['split']}")
    print(f"plan: {inputs.plan.total} steps of {inputs.plan.packs_per_step} packs of {config.batch.tokens_per_pack} tokens", flush=True)


def compile_layers(model: torch.nn.Module) -> None:
    """Compile each decoder layer by itself: they are alike, so one graph serves all."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)


def leave(job: Job, tokenizer, outcome: Outcome) -> None:
    """Write what the run made, and its page. A run stopped by a signal leaves its checkpoint only."""
    job.optimizer.release()
    if outcome.reason != "signal":
        full, wanted = job.config.adapter == "full", job.config.export
        if not full and wanted in ("adapter", "both"):
            save_adapter(job.model, job.folder / "adapter", tokenizer)
        if full or wanted in ("merged", "both"):
            merge_and_save(job.model, tokenizer, job.folder / "model")
    else:
        print(f"stopped by signal {outcome.signal}; go on with the same command and --resume auto", file=sys.stderr)
    write_report(job.folder)
    print(f"report: {job.folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
