"""End a run: secure what was trained in a checkpoint, export and check it, and remove the checkpoint.

Nothing that fails in between loses weights: an error, a full disk, SIGTERM or Ctrl-C leaves the checkpoint, and the same command with
`--resume auto` goes straight to the export. The checkpoint holds the trained weights without the optimizer's moments, so it is as large as
the adapter, or as the model of a full fine-tuning.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from trainer.errors import UserError
from trainer.model.llama_cpp import write_gguf
from trainer.model.sharding import gather
from trainer.retention import base_losses, cached_base
from trainer.runtime import checkpoint
from trainer.runtime.interrupts import Interrupts, Stopped
from trainer.runtime.result import Ending
from trainer.training import run_folder, show_answers
from trainer.training.export_check import check_exports
from trainer.training.publish import base_folder, push
from trainer.training.training_run import TrainingRun

GO_ON = "the same command with --resume auto goes straight to the export"


def finish(run: TrainingRun, state: checkpoint.State, ending: Ending, tokenizer: PreTrainedTokenizerBase,
           interrupts: Interrupts) -> Ending:
    """Export the adapter or model, and write the report.

    Where there is a floor, the best measured weights are exported. A run that was stopped by a signal leaves its checkpoint and the
    report. Returns how the run ended, which a signal during the export changes. Raises UserError, which names the checkpoint, if the
    export fails.
    """
    stopped: list[int] = []
    if run.dist.sharded and not ending.signal:
        sharded_secured = secure(run, state)
        run = gathered(run)

    def on_main() -> None:
        if ending.signal:
            print(f"stopped by signal {ending.signal}; continue with the same command and --resume auto", file=sys.stderr)
        else:
            secured = sharded_secured if run.dist.sharded else secure(run, state)
            try:
                with interrupts.stopping():
                    export(run, state, tokenizer, secured)
            except Stopped as signal:
                stopped.append(signal.number)
                where = f"what was trained is in {secured}, and {GO_ON}" if secured else "what was trained is lost"
                print(f"stopped by signal {signal.number} before the export was whole; {where}", file=sys.stderr)
        run_folder.report(run.folder)
        if run.config.export.push_to_hub and not ending.signal and not stopped:
            publish(run)

    run.dist.on_main(on_main)
    number = max(run.dist.gather(max(stopped, default=0)))
    return Ending("signal", number) if number else ending


def publish(run: TrainingRun) -> None:
    """Upload the adapter, or the model where there is none, to the hub.

    Raises UserError, which has the command that uploads it again.
    """
    name, public = run.config.export.push_to_hub, run.config.export.public
    folder = run.folder / ("adapter" if run_folder.exports_adapter(run.config) else "model")
    try:
        print(f"published: {push('export.push_to_hub', folder, name, public)}")
    except UserError as error:
        again = shlex.join(["python", "-m", "trainer.publish", str(folder), "--name", name, *(["--public"] if public else [])])
        raise UserError(f"{error}; the export is whole, and this uploads it again: {again}") from None
    if base := base_folder(folder):
        print(f"WARNING: adapter_config.json names {base} as the base, which others do not have", file=sys.stderr)


def gathered(run: TrainingRun) -> TrainingRun:
    """Return a run whose model, on the host of rank 0, has all weights of the sharded one.

    No step may follow.
    """
    run.optimizer.release()
    gather(run.model, run.whole, run.dist)
    return replace(run, model=run.whole, device=torch.device("cpu"))


def secure(run: TrainingRun, state: checkpoint.State) -> Path | None:
    """Return the checkpoint of the last step, written now unless there is one.

    All ranks that have a part of the weights write it. Without space for it the export is tried all the same; returns None then, and says
    so.
    """
    folder, keep = run.folder / "checkpoints", run.config.checkpoint.keep
    path = checkpoint.place(folder, state.step)
    try:
        if run.dist.sharded:
            return path if run.dist.gather(path.exists())[0] else checkpoint.save_sharded(folder, state, run.optimizer, keep, run.dist)
        return path if path.exists() else checkpoint.save(folder, state, run.optimizer, keep)
    except UserError as error:
        if run.dist.is_main:
            print(f"WARNING: {error}; exporting without it", file=sys.stderr)
        return None


def export(run: TrainingRun, state: checkpoint.State, tokenizer: PreTrainedTokenizerBase, secured: Path | None) -> None:
    """Write what the run exports, and remove what only an unfinished run needs.

    Raises UserError, which names the checkpoint `secured`.
    """
    try:
        if run.monitor:
            run.monitor.restore(state, run.optimizer)
        run.optimizer.release()
        folders = run_folder.export(run.folder, run.config, run.model, tokenizer)
        show_answers.show(run.showing, run.monitor, run.folder, run.log, state.step)
        if run.config.export.check:
            check_exports(run, folders)
        if run.config.export.gguf != "none":
            print(f"gguf: {write_gguf(run.folder / 'model', run.folder / 'gguf', run.config.export, run.folder.absolute().name)}")
    except Exception as error:  # whatever it is, the user has to learn that nothing is lost
        cause = str(error) if isinstance(error, UserError) else f"export: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        where = f"what was trained is in {secured}: mend this, and {GO_ON}" if secured else "no checkpoint could be written either"
        raise UserError(f"{cause}; {where}") from error
    checkpoint.remove_ended(run.folder / "checkpoints")
    cached_base.remove_cache(run.folder)
    base_losses.remove_base_losses(run.folder)
    if run.monitor:
        run.monitor.clean()
