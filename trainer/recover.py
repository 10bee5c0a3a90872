"""Bring back what an adapter forgot: `python -m trainer.recover`."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from trainer import cli, config_rules
from trainer.errors import require
from trainer.model import quantization
from trainer.model.locate import load_tokenizer
from trainer.recovery.build import build
from trainer.recovery.config import Recover, as_training, our_names, validate
from trainer.retention import monitor
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import process_group
from trainer.runtime.interrupts import Interrupts
from trainer.runtime.result import RunResult
from trainer.training import run_folder
from trainer.training.finish import finish
from trainer.training.loop import fit

USAGE = """\
usage: python -m trainer.recover --adapter ADAPTER --prompts FILE --domain FILE --general FILE [--section.option value ...]

Takes a LoRA adapter of PEFT that forgot, whoever trained it, and writes one that remembers. In rounds the model answers prompts, and each
token of its answers draws it towards its base, the model without the adapter; chats of the domain train beside them. It stops at the
first round with 97% of the base's accuracy on the general items, and leaves adapter/, metrics.jsonl and report.html.

Examples:
  python -m synth.run --base.path BASE --output runs/synth --stages '[instruct, clean, respond, select]' --select.rule first
  python -m trainer.recover --adapter runs/first/adapter --prompts runs/synth/replay.jsonl --domain chats.jsonl --general suite:mini
  python -m trainer.recover --config recover.yaml --resume auto                         after an interruption

--help lists every option; --print_config prints them as YAML with their values."""


def main() -> int:
    return cli.main(lambda config: recover(config).status, Recover, "trainer.recover", USAGE)


def recover(config: Recover) -> RunResult:
    """Do all rounds, and export the best state. Raises UserError for anything that the user can mend."""
    validate(config)
    with our_names(), ExitStack() as resources:
        options = as_training(config)
        config_rules.validate(options)
        quantization.require_bitsandbytes(options)
        device, items = choose_device(config.device), monitor.read(options)
        dist = resources.enter_context(process_group(device))
        require(dist.size == 1, "trainer.recover", "one process, started without torchrun", dist.size)
        resources.enter_context(run_folder.owned(options, dist, "trainer.recover"))
        tokenizer = load_tokenizer(options.model)
        run, state = build(config, options, items, device, dist, tokenizer, resources)
        with Interrupts() as interrupts:
            ending = fit(run, state, interrupts)
            if state.step or ending.signal:
                ending = finish(run, state, ending, tokenizer, interrupts)
                measured = run.monitor.exported(state) if not ending.signal else state.last_measurement
            else:
                measured = state.last_measurement
                print(f"recovery: the adapter has {measured['general_retained']:.1%} of the base's accuracy, which holds the floor of "
                      f"{config.floor:.1%}: there is nothing to bring back, and nothing is written", flush=True)
        return RunResult(run.folder, state.step, state.loss, None, ending.reason, ending.signal, measured)


if __name__ == "__main__":
    sys.exit(main())
