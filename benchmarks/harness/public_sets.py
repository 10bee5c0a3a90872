"""Read public data sets: from a file or folder that `--data` names, else from the Hugging Face hub."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import UserError

GSM8K = "openai/gsm8k"  # its name on the hub
PLACE = "--data"  # says where files are on this machine, which is no part of what is measured


def add_data_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(PLACE, type=Path, help=f"{what} (default: load it from the Hugging Face hub)")


def gsm8k(split: str, data: Path | None) -> list[tuple[str, str]]:
    """Return the questions and answers of GSM8K's split: from JSON lines in `data`, else from the hub.

    Raises UserError for a file that is missing or holds something else, and for a hub that cannot be reached.
    """
    rows = hub_rows(GSM8K, "main", split) if data is None else json_lines(data)
    try:
        return [(row["question"].strip(), row["answer"].strip()) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{PLACE}: expected JSON lines with question and answer in {data or GSM8K}, found otherwise ({error})") from None


def json_lines(path: Path) -> Iterator[dict]:
    """Yield the rows of a JSON-lines file. Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{PLACE}: expected a file of JSON lines, found no file {path}")
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def hub_rows(name: str, config: str | None, split: str) -> list[dict]:
    """Return the rows of a data set on the hub. Raises UserError where it cannot be loaded."""
    from datasets import load_dataset

    try:
        return list(load_dataset(name, config, split=split))
    except Exception as error:  # whatever the hub's client raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{PLACE}: cannot load {name} from the hub ({reason}); give {PLACE} a file on this machine") from None
