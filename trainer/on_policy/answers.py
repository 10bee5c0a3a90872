"""Keep the answers that the model gave to prompts, in a file and as samples to train on.

A file has a line for each. It is written whole or not at all, with its checksum, before the first step that reads it. So a round that was
interrupted trains on the answers that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.checksums import verify_checksum, write_checksum
from trainer.data.samples import Samples
from trainer.errors import UserError
from trainer.files import atomic_file


class Answered(NamedTuple):
    """A prompt and the answer to it, in token ids; an answer that was not cut off ends with its stop."""

    prompt: list[int]
    answer: list[int]


def write(path: Path, answered: Sequence[Answered], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write answers, with their texts for people. Raises UserError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as tmp, tmp.open("w", encoding="utf-8") as file:
            for one in answered:
                texts = {f"{name}_text": tokenizer.decode(ids) for name, ids in one._asdict().items()}
                file.write(json.dumps(one._asdict() | texts, ensure_ascii=False) + "\n")
            file.flush()
        write_checksum(path)
    except OSError as error:
        raise UserError(f"output: cannot write {path}: {error.strerror}; free space, or choose another output") from None


def read(path: Path) -> list[Answered] | None:
    """Return the answers of a file, None where there is none that is whole."""
    try:
        verify_checksum(path)
        with path.open(encoding="utf-8") as file:
            return [Answered(row["prompt"], row["answer"]) for row in map(json.loads, file)]
    except (OSError, ValueError):
        return None


def as_samples(name: str, answered: Sequence[Answered]) -> Samples:
    """Return answers as samples of one source, in which the tokens of the answers are supervised.

    They are those that were drawn, which those of the answer's text need not be.
    """
    ids = [np.array([*prompt, *answer], dtype=np.int32) for prompt, answer in answered]
    supervised = [np.arange(len(own)) >= len(one.prompt) for own, one in zip(ids, answered)]
    return Samples.of_tokens(name, ids, supervised)
