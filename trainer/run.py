"""`python -m trainer.run`: fine-tune a language model on chats. Parse, build, loop, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers

from trainer import cli
from trainer.config import Config, profiled_steps, validate
from trainer.data.prepare import prepare_data
from trainer.evaluation.items import ItemFile
from trainer.metrics.profiler import check_steps_within
from trainer.model import quantization
from trainer.model.locate import load_tokenizer
from trainer.retention import auto_replay, monitor
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import Distributed, process_group
from trainer.runtime.result import RunResult
from trainer.training import run_folder
from trainer.training.build import build, require_work_for_all
from trainer.training.dry_run import show
from trainer.training.loop import fit

USAGE = """\
usage: python -m trainer.run --model.path MODEL --data.train FILE [--section.option value ...]
       python -m trainer.run --config run.yaml [--section.option value ...]

Fine-tunes a language model on chats with packed sequences, and leaves an adapter that PEFT loads.

The two commonest commands:
  python -m trainer.run --model.path my-model --data.train chats.jsonl --output runs/first
  python -m trainer.run --model.path my-model --data.train domain.jsonl --replay.data general.jsonl --replay.ratio 0.5

First, see what would be trained on, with masks, lengths and memory:      add --dry_run
Keep what it knows, with as little replay as that takes:                  add --replay.auto --retention.items F --retention.floor 0.95
Hold the base in 4 bits (QLoRA), or train all weights:                    add --method qlora, or --method full
Go on after an interruption:                                              add --resume auto
See where the time of a step goes, and every wait for the GPU:            add --logging.profile 20-25
Several GPUs:                             torchrun --nproc-per-node 4 -m trainer.run ...

--help lists every option; --print_config prints them as YAML with their values."""


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
    quantization.require_bitsandbytes(config)
    device = choose_device(config.device)
    run_folder.refuse_used(Path(config.output), config.resume)
    items = monitor.read(config)
    with process_group(device.type) as dist:
        if config.replay.auto and not config.dry_run:
            try:
                config = auto_replay.choose(config, lambda probe: run_one(probe, items, device, dist, leave=False), dist)
            except auto_replay.Stopped as stopped:
                if dist.is_main:
                    print(f"stopped by signal {stopped.result.signal} in a probe; go on with the same command and --resume auto",
                          file=sys.stderr)
                return stopped.result
        return run_one(config, items, device, dist)


def run_one(config: Config, items: Sequence[ItemFile], device: torch.device, dist: Distributed, leave: bool = True) -> RunResult | None:
    """Train once. A probe does not `leave` what it trained."""
    tokenizer = load_tokenizer(config.model)
    if dist.size > 1:
        dist.on_main(lambda: prepare_data(config, tokenizer))  # the others then find its caches
    inputs = prepare_data(config, tokenizer)
    require_work_for_all(inputs, dist)
    check_steps_within(profiled_steps(config.logging.profile), inputs.plan.total)
    if config.dry_run:
        dist.on_main(lambda: show(config, inputs, device))
        return None
    job, state = build(config, inputs, device, dist, items)
    ending = fit(job, state)
    kept = None if ending.signal else job.watch
    if leave:
        if kept:
            dist.on_main(lambda: kept.restore(state, job.optimizer))
        job.optimizer.release()
        dist.on_main(lambda: run_folder.leave(job.folder, config, job.model, tokenizer, ending))
        if kept:
            dist.on_main(kept.clean)
    return RunResult(job.folder, state.step, state.loss, state.heldout_loss, ending.reason, ending.signal,
                     kept.exported(state) if kept else state.measured)


if __name__ == "__main__":
    sys.exit(main())
