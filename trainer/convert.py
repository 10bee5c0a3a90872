"""Convert another trainer's configuration into one of ours: `python -m trainer.convert their.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer import cli
from trainer.conversion import axolotl, llama_factory, trl
from trainer.conversion.rules import Converted
from trainer.errors import UserError, printable
from trainer.files import atomic_file

USAGE = """\
usage: python -m trainer.convert THEIRS.yaml [--output OURS.yaml] [--trainer axolotl | trl | llama_factory]

Converts a configuration of Axolotl, TRL (SFT; also the alignment handbook's) or LLaMA-Factory into one for trainer.run. Options without a
counterpart are named, one a line, in the file's first comment lines and on standard error.

  python -m trainer.convert qlora.yml --output qlora.yaml && python -m trainer.run --config qlora.yaml --dry-run"""


@dataclass
class Convert:
    """Convert another trainer's configuration into one of ours."""

    input: str = ""  # their YAML file
    output: str | None = None  # the YAML file that is written; default: standard output
    trainer: Literal["auto", "axolotl", "trl", "llama_factory"] = "auto"  # whose file it is; auto: told by its options


def main() -> int:
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--input")
    return cli.main(run, Convert, "trainer.convert", USAGE)


def run(config: Convert) -> None:
    """Write our configuration.

    Raises UserError for a file that is none of theirs, and for an output that is there already.
    """
    theirs = read(config.input)
    converted = convert(theirs, config.trainer, Path(config.input).parent)
    text = as_yaml(converted, Path(config.input).name, config.output)
    if config.output is None:
        print(text, end="")
    else:
        path = Path(config.output)
        if path.exists():
            raise UserError(f"output: {path} exists; name another file, or remove it")
        with atomic_file(path) as tmp:
            tmp.write_text(text, encoding="utf-8")
    for line in converted.notes:
        print(f"not converted: {printable(line)}", file=sys.stderr)


def read(name: str) -> dict[str, Any]:
    """Return a YAML file's options. Raises UserError where there are none."""
    path = Path(name).expanduser()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"input: expected a YAML file, found otherwise at {path} ({reason})") from None
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise UserError(f"input: expected options and their values in {path}, found otherwise")
    return dict(found)


def convert(theirs: Mapping[str, Any], trainer: str, folder: Path) -> Converted:
    """Convert the options of a trainer, whose file lies in `folder`.

    Raises UserError if it cannot be told whose they are.
    """
    trainer = told_by_options(theirs) if trainer == "auto" else trainer
    if trainer == "axolotl":
        return axolotl.convert(theirs)
    return llama_factory.convert(theirs, folder) if trainer == "llama_factory" else trl.convert(theirs)


def told_by_options(theirs: Mapping[str, Any]) -> str:
    """Return whose options these are."""
    if "base_model" in theirs:
        return "axolotl"
    if {"finetuning_type", "stage", "cutoff_len"} & theirs.keys():
        return "llama_factory"
    if "model_name_or_path" in theirs:
        return "trl"
    raise UserError("input: expected options of Axolotl (base_model), TRL or LLaMA-Factory (model_name_or_path), found neither; name it by "
                    "--trainer")


def as_yaml(converted: Converted, name: str, output: str | None) -> str:
    """Return our file: the command that runs it, what was not converted, the options."""
    lines = [f"# python -m trainer.run --config {output or 'FILE'}", f"# Converted from {name} by trainer.convert."]
    if converted.notes:
        lines += ["#", "# Not converted:", *(f"# - {printable(line)}" for line in converted.notes)]
    options = yaml.safe_dump(converted.nested(), sort_keys=False, width=120, allow_unicode=True)
    return "\n".join(lines) + "\n\n" + options


if __name__ == "__main__":
    sys.exit(main())
