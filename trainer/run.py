"""`python -m trainer.run`: fine-tune a language model on chats. Parse, build, loop, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
import transformers

from trainer import cli
from trainer.config import Config, profiled_steps, validate
from trainer.data.packing import UNFILLED, Multiples
from trainer.data.prepare import Inputs, account, heldout_line, prepare_inputs
from trainer.errors import UserError
from trainer.evaluation.items import ItemFile
from trainer.metrics.log import Log
from trainer.metrics.profiler import require_within
from trainer.metrics.throughput import model_size, peak_flops
from trainer.model import lora, quantization
from trainer.model.loading import (
    PatchReport,
    apply_activation_checkpointing,
    compute_dtype,
    dtype_name,
    fast_bf16,
    load_model,
    load_tokenizer,
    multiples_for,
    patch,
    weights_fingerprint,
)
from trainer.optim.adamw import FlatAdamW
from trainer.retention import auto_replay, cached_base, kl, monitor, token_weighting
from trainer.runtime import checkpoint
from trainer.runtime.distributed import World, world
from trainer.training import run_folder
from trainer.training.dry_run import show
from trainer.training.loop import Job, fit

USAGE = """\
usage: python -m trainer.run --model.path MODEL --data.train FILE [--section.option value ...]
       python -m trainer.run --config run.yaml [--section.option value ...]

Fine-tunes a language model on chats with packed sequences, and leaves an adapter that PEFT loads.

The two commonest commands:
  python -m trainer.run --model.path my-model --data.train chats.jsonl --output runs/first
  python -m trainer.run --model.path my-model --data.train domain.jsonl --replay.data general.jsonl --replay.ratio 0.5

First, see what would be trained on, with masks, lengths and memory:      add --dry_run
Keep what it knows, with as little replay as that takes:                  add --replay.auto --retention.items F --retention.floor 0.95
Hold the base in 4 bits (QLoRA), or train all weights:                    add --adapter qlora, or --adapter full
Go on after an interruption:                                              add --resume auto
See where the time of a step goes, and every wait for the GPU:            add --logging.profile 20-25
Several GPUs:                             torchrun --nproc-per-node 4 -m trainer.run ...

--help lists every option; --print_config prints them as YAML with their values."""


@dataclass
class RunResult:
    """Where a run ended and what it left behind."""

    folder: Path
    steps: int
    loss: float | None  # mean training loss of the last log interval
    heldout_loss: float | None
    reason: str
    signal: int | None = None
    retention: dict | None = None  # of runs with retention.items: the measurement of what is exported, or of the last state if stopped

    @property
    def status(self) -> int:
        """The exit status of the command."""
        if self.signal:
            return 128 + self.signal
        return monitor.FLOOR_MISSED if self.retention and not self.retention.get("held", True) else 0


def main() -> int:
    def run(config: Config) -> int:
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        result = train(config)
        return result.status if result else 0

    return cli.main(run, Config, "trainer.run", USAGE)


def train(config: Config) -> RunResult | None:
    """The whole run: returns its result, or None after a dry run. Raises UserError for anything the user can mend."""
    validate(config)
    quantization.require(config)
    device = choose_device(config.device)
    run_folder.refuse_used(Path(config.output), config.resume)
    items = monitor.read(config)
    with world(device.type) as ranks:
        if config.replay.auto and not config.dry_run:
            try:
                config = auto_replay.choose(config, lambda probe: run_one(probe, items, device, ranks, leave=False), ranks)
            except auto_replay.Stopped as stopped:
                if ranks.is_main:
                    print(f"stopped by signal {stopped.result.signal} in a probe; go on with the same command and --resume auto",
                          file=sys.stderr)
                return stopped.result
        return run_one(config, items, device, ranks)


def run_one(config: Config, items: Sequence[ItemFile], device: torch.device, ranks: World, leave: bool = True) -> RunResult | None:
    """Train once. A probe does not `leave` what it trained."""
    tokenizer = load_tokenizer(config.model)
    if ranks.size > 1:
        ranks.on_main(lambda: prepare_inputs(config, tokenizer))  # the others then find its caches
    inputs = prepare_inputs(config, tokenizer)
    require_work_for_all(inputs, ranks)
    require_within(profiled_steps(config.logging.profile), inputs.plan.total)
    if config.dry_run:
        ranks.on_main(lambda: show(config, inputs, device))
        return None
    job, state = build(config, inputs, device, ranks, items)
    ending = fit(job, state)
    kept = None if ending.signal else job.watch
    if leave:
        if kept:
            ranks.on_main(lambda: kept.restore(state, job.optimizer))
        job.optimizer.release()
        ranks.on_main(lambda: run_folder.leave(job.folder, config, job.model, tokenizer, ending))
        if kept:
            ranks.on_main(kept.clean)
    return RunResult(job.folder, state.step, state.loss, state.heldout_loss, ending.reason, ending.signal,
                     kept.exported(state) if kept else state.measured)


def require_work_for_all(inputs: Inputs, ranks: World) -> None:
    if inputs.plan.packs_per_step % ranks.size:
        pack = inputs.plan.batch.tokens_per_pack
        raise UserError(f"batch.tokens_per_step: expected a multiple of {ranks.size * pack}, one pack of {pack} tokens for each of the "
                        f"{ranks.size} ranks, got {inputs.plan.batch.tokens_per_step}")


def choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected a CUDA GPU, found none; use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def build(config: Config, inputs: Inputs, device: torch.device, ranks: World,
          items: Sequence[ItemFile] = ()) -> tuple[Job, checkpoint.State]:
    """Model, adapter, patches, optimiser and run folder; from the newest checkpoint where the run goes on from one."""
    model, _ = load_model(config, device)
    torch.manual_seed(config.seed)
    if config.adapter != "full":
        model = lora.add_adapter(model, config.lora)
    patched = patch(model, config.model.patch)
    quantization.refuse_misread(lora.stock_layers(model, config.model.patch))
    patched.backends |= quantization.describe(model)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    fingerprint, roles = inputs.samples.fingerprint, [part.role for part in inputs.mixture.parts]
    watched = monitor.prepare(config, items, model, inputs.template, ranks)
    samples, told = token_weighting.reweighted(inputs.samples, config, model, roles, device, ranks)
    inputs, held, multiples = replace(inputs, samples=samples), kl.prepare(config.retention, model, roles), multiples_for(model)
    optimizer = FlatAdamW(model.parameters(), config.optim)
    ranks.broadcast([group.master.data for group in optimizer.groups])
    optimizer.publish()
    optimizer.hold(config.retention.l2)
    output, size = Path(config.output), model_size(model)
    heldout = inputs.heldout[0].fingerprint if inputs.heldout else None
    identity = checkpoint.identity(config, ranks.size, samples=fingerprint, heldout_samples=heldout,
                                   base_weights=weights_fingerprint(config.model), quantizer=quantization.version(config),
                                   items=monitor.fingerprint(items))
    if config.retention.stores_base:  # while the model is still the base, which a checkpoint would end
        held = cached_base.store(held, samples, inputs.plan, output, identity, device, ranks)
    if config.compile:
        compile_layers(model)
    state = start(output, config, identity, optimizer)
    if len(set(ranks.gather(state.step))) > 1:  # all ranks see it, so all stop
        raise UserError(f"resume: ranks found different checkpoints in {output}; expected one folder that all of them see")
    facts = account(inputs, config) | {
        "model": {"path": config.model.path or config.model.config, "family": patched.family, "parameters": size.parameters,
                  "trainable": size.trainable}, "backends": patched.backends}
    ranks.on_main(lambda: run_folder.open_run(output, config, facts))
    log = None
    if ranks.is_main:
        greet(config, facts, inputs, device, patched, multiples)
        for line in [*([told] if told else []), *(watched.describe() if watched else [])]:
            print(line, flush=True)
        if state.step:
            print(f"resuming from step {state.step}")
        log = Log(output, config, inputs.plan.total, state.step)
    return Job(config, output, model, size, optimizer, inputs.samples, inputs.plan, inputs.heldout, device, ranks, log,
               held, watched, multiples), state


def start(output: Path, config: Config, identity: dict, optimizer: FlatAdamW) -> checkpoint.State:
    """A fresh state, or that of the newest checkpoint."""
    last = checkpoint.newest(output / "checkpoints")
    if config.resume == "never" or last is None:
        return checkpoint.State(identity)
    return checkpoint.load(last, identity, optimizer)


def greet(config: Config, facts: dict, inputs: Inputs, device: torch.device, patched: PatchReport, multiples: Multiples) -> None:
    """Say, once, what runs where."""
    dtype, model = compute_dtype(config.precision, device), facts["model"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {name}; compute {dtype_name(dtype)}, fp32 masters; peak {peak_flops(device, dtype)[1]}")
    if config.precision == "auto" and device.type == "cpu" and fast_bf16():
        print("this CPU has bf16 products: with --precision bf16 a step takes about half the time")
    print(patched)
    print(f"parameters: {model['parameters']:,}, trained {model['trainable']:,} ({config.adapter})")
    for share in facts["sources"]:
        print(f"{share['role']} {share['name']}: {share['samples']:,} samples, {share['share_rows']:.1%} of rows, "
              f"{share['share_tokens']:.1%} of tokens; dropped {share['dropped']}, truncated {share['truncated']}, split {share['split']}")
    for line in kl.describe(config.retention, config.adapter, model["parameters"] * dtype.itemsize):
        print(line)
    if inputs.heldout:
        print(heldout_line(inputs))
    print(f"plan: {inputs.plan.total} steps of {inputs.plan.packs_per_step} packs of {config.batch.tokens_per_pack} tokens"
          + (f", filled up to multiples of {multiples.tokens}" if multiples != UNFILLED else ""), flush=True)


def compile_layers(model: torch.nn.Module) -> None:
    """Compile each decoder layer by itself: they are alike, so one graph serves all."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)


if __name__ == "__main__":
    sys.exit(main())
