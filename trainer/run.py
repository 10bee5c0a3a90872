"""Fine-tune a language model on chats: `python -m trainer.run`.

Prepares the data, builds, trains, saves and reports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from trainer import cli
from trainer.config import Config
from trainer.config_rules import profiled_steps, validate
from trainer.data.chat_template import read_template
from trainer.data.prepare import prepare_data
from trainer.evaluation.items import ItemFile
from trainer.metrics.profiler import check_steps_within
from trainer.model import quantization
from trainer.model.locate import load_tokenizer
from trainer.progress import announce
from trainer.retention import monitor, replay_search
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import Distributed, local_rank, process_group
from trainer.runtime.interrupts import Interrupts
from trainer.runtime.result import RunResult
from trainer.training import run_folder
from trainer.training.build import build, require_packs_for_all_ranks
from trainer.training.dry_run import print_dry_run
from trainer.training.finish import finish
from trainer.training.loop import fit

USAGE = """\
usage: python -m trainer.run --model.path MODEL --data.train FILE [--section.option value ...]
       python -m trainer.run --config run.yaml [--section.option value ...]

Fine-tunes a language model on chats, and writes an adapter that PEFT loads, or a whole model.

Examples:
  python -m trainer.run --model.path Qwen/Qwen3-0.6B --data.train chats.jsonl --output runs/first
  python -m trainer.run --model.path Qwen/Qwen3-0.6B --data.train chats.jsonl --replay.data general.jsonl --replay.ratio 0.5
  python -m trainer.run --config trainer/recipes/lora.yaml      (trainer/recipes has ten)

Show samples, masks, packing and memory; train nothing:   add --dry-run
Train on a 4-bit base, or train all weights:              add --method qlora, or --method full
Resume after an interruption:                             add --resume auto
Keep 95% of the general accuracy, with little replay:     see trainer/recipes/keep95.yaml
Find what a step's time goes to:                          add --logging.profile_steps 20-25
Train on several GPUs:                                    torchrun --nproc-per-node 4 -m trainer.run ...

--help lists every option; --print-config prints them as YAML with their values."""


def main() -> int:
    def run(config: Config) -> int:
        result = train(config)
        return result.status if result else 0

    return cli.main(run, Config, "trainer.run", USAGE)


def train(config: Config) -> RunResult | None:
    """Do the whole run, with the search for a replay ratio if it has one; return None after a dry run.

    Raises UserError for anything that the user can mend.
    """
    validate(config)
    quantization.require_bitsandbytes(config)
    device, items = choose_device(config.device, local_rank()), monitor.read(config)
    with process_group(device, config.fsdp.enabled) as dist, run_folder.owned(config, dist):
        if config.replay_search.enabled and not config.dry_run:
            chosen = replay_search.choose(config, lambda probe: run_one(probe, items, device, dist, save_outputs=False), dist)
            if isinstance(chosen, RunResult):
                if dist.is_main:
                    print(f"stopped by signal {chosen.signal} in a probe run; continue with the same command and --resume auto",
                          file=sys.stderr)
                return chosen
            config = chosen
        return run_one(config, items, device, dist)


def run_one(config: Config, items: Sequence[ItemFile], device: torch.device, dist: Distributed,
            save_outputs: bool = True) -> RunResult | None:
    """Prepare the data, build, train and save; a probe run saves no outputs. Returns None after a dry run."""
    tokenizer = load_tokenizer(config.model)
    tokenizer.chat_template = read_template(config.data.chat_template) or tokenizer.chat_template  # exports carry it
    if dist.size > 1:
        dist.on_main(lambda: prepare_data(config, tokenizer))  # the other ranks then find its caches
    data = prepare_data(config, tokenizer)
    require_packs_for_all_ranks(data.plan, dist)
    check_steps_within(profiled_steps(config.logging.profile_steps), data.plan.total)
    if config.dry_run:
        dist.on_main(lambda: print_dry_run(config, data, device, tokenizer))
        return None
    with announce(f"model: loading and building {config.model.path}"):
        run, state = build(config, data, device, dist, items, tokenizer)
    with Interrupts() as interrupts:
        ending = fit(run, state, interrupts)
        if save_outputs:
            ending = finish(run, state, ending, tokenizer, interrupts)
    measured = run.monitor.exported(state) if run.monitor and not ending.signal else state.last_measurement
    return RunResult(run.folder, state.step, state.loss, state.eval_loss, ending.reason, ending.signal, measured)


if __name__ == "__main__":
    sys.exit(main())
