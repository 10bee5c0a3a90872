"""Check, open and fill the run folder."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer import cli
from trainer.config import Config
from trainer.errors import UserError
from trainer.files import sole_owner
from trainer.model.export import merge_and_save, save_adapter
from trainer.model.forward import unwrap_peft
from trainer.model.serving import how_to_serve, vllm_line
from trainer.report import answers
from trainer.report.model_card import Export, write_card
from trainer.report.run_page import write_report
from trainer.report.run_records import read_run
from trainer.runtime import checkpoint
from trainer.runtime.distributed import Distributed
from trainer.versions import versions


@contextlib.contextmanager
def owned(config: Config, dist: Distributed, command: str = "trainer.run") -> Iterator[None]:
    """Keep the output folder for this run; all of its ranks end if another command has it.

    `command` is the one that runs. Raises UserError for a folder that is in use, or holds another run. A dry run needs no folder of its
    own.
    """
    output = Path(config.output)
    with contextlib.ExitStack() as stack:
        if not config.dry_run:
            dist.on_main(lambda: stack.enter_context(sole_owner(output, command)))
        dist.on_main(lambda: refuse_used(output, config.resume))
        yield


def refuse_used(output: Path, resume: str) -> None:
    """Raise UserError if the folder holds the outputs of a finished run, or checkpoints without `resume`."""
    last = checkpoint.newest(output / "checkpoints")
    if last and resume == "never":
        raise UserError(f"output: {output} holds checkpoints of an earlier run, the newest {last.name}; add --resume auto to continue "
                        "it, or choose another --output")
    outputs = [name for name in ("adapter", "model") if (output / name).exists()]
    if outputs and not last:
        raise UserError(f"output: {output} holds the {outputs[0]} of a finished run; choose another --output, or remove it")


def open_run(output: Path, config: Config, summary: dict, fresh: bool) -> None:
    """Make the folder, and write config.yaml (with versions and the command) and data.json (`summary`).

    A fresh run removes the answers of an earlier one. Raises UserError if the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        cli.save_yaml(config, output / "config.yaml", versions=versions("torch", "transformers", "peft", "datasets", "tokenizers"),
                      command=shlex.join(sys.orig_argv))
        (output / "data.json").write_text(json.dumps(summary))
        if fresh:
            (output / answers.FILE_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot write the run folder {output}: {error.strerror}; choose another --output") from None


def export(output: Path, config: Config, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """Write the adapter, the model or both, print how to serve them, and return their folders."""
    folders = []
    if exports_adapter(config):
        save_adapter(model, output / "adapter", tokenizer)
        folders.append(output / "adapter")
    if exports_model(config):
        merge_and_save(model, tokenizer, output / "model")
        folders.append(output / "model")
        if config.method == "qlora":
            print("model: the adapter is merged into the dequantised 4-bit weights that it was trained on")
    base, run = None if config.model.path is None else unwrap_peft(model).name_or_path, read_run(output)
    for folder in folders:
        write_card(Export(folder, base, config), run)
        lines = how_to_serve(model) if folder.name == "adapter" else []
        print("\n".join(lines or [vllm_line(folder, config.data.chat_template is not None)]))
    return folders


def exports_adapter(config: Config) -> bool:
    return config.method != "full" and config.export.format in ("adapter", "both")


def exports_model(config: Config) -> bool:
    return config.method == "full" or config.export.format in ("merged", "both")


def report(output: Path) -> None:
    """Write the report, and print where it is."""
    write_report(output)
    print(f"report: {output / 'report.html'}")
