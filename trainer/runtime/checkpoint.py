"""Checkpoints that are whole or absent, and that a run goes on from bit for bit.

A checkpoint is a folder `checkpoints/step-00000120`: `state.safetensors` (masters and optimiser moments) and
`state.json` (the step, and fingerprints of the configuration and data it belongs to). It is written aside, synced to disk and renamed, so
a kill, a crash or a full disk at any moment leaves the earlier ones as they were. The place in the data and the random states are
not in it: both are functions of the step (`plan.py`, `loop.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.config import Config
from trainer.errors import UserError
from trainer.files import atomic_folder
from trainer.optim.adamw import FlatAdamW

# Options that may differ when a run goes on: where things go, never what is computed.
FREE_TO_CHANGE = {"output", "resume", "logging", "checkpoint", "export", "dry_run", "data.num_proc", "data.cache_dir"}


@dataclass
class State:
    identity: dict  # what the run computes: configuration, data, base model
    step: int = 0  # optimiser steps done
    loss: float | None = None  # mean training loss of the last log interval
    heldout_loss: float | None = None  # of the last evaluation
    best: float | None = None  # the lowest of them
    stale: int = 0  # evaluations since it was reached
    measured: dict | None = None  # the last measurement of general and domain items (trainer/retention/monitor.py)
    kept: dict | None = None  # that of the state whose weights are kept
    missed: int = 0  # measurements in a row, in the second half, that missed the floor and came no nearer to it


def identity(config: Config, world_size: int, **fingerprints: str | None) -> dict:
    """What must be equal for a run to go on from a checkpoint: options, ranks, and the fingerprints of what they point to."""
    options = dataclasses.asdict(config)
    for name in FREE_TO_CHANGE:
        *section, last = name.split(".")
        (options[section[0]] if section else options).pop(last)
    return {**options, **fingerprints, "ranks": world_size}


def save(folder: Path, state: State, optimizer: FlatAdamW, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. Raises UserError where the disk refuses it."""
    final = folder / f"step-{state.step:08d}"
    with atomic_folder(final, lambda error: _refusal(error, final, newest(folder))) as tmp:
        save_file({k: v.contiguous() for k, v in optimizer.state().items()}, tmp / "state.safetensors")
        (tmp / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(path: Path, expected: dict, optimizer: FlatAdamW) -> State:
    """Put the run back where it was at this checkpoint. Raises UserError if it is damaged, or belongs to another configuration or data."""
    try:
        state = State(**json.loads((path / "state.json").read_text()))
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:  # damaged after it was written, or of another version
        raise UserError(f"resume: cannot read the checkpoint {path}: {error}; remove it to go on from the one before") from None
    changed = differences(state.identity, json.loads(json.dumps(expected)))
    if changed:
        raise UserError(f"resume: {path} was made with another configuration: {'; '.join(changed)}; "
                        "restore these options, or start anew with another output folder")
    optimizer.load_state(tensors)
    return state


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> Path | None:
    found = checkpoints(folder)
    return found[-1] if found else None


def kept_steps(folder: Path) -> set[int]:
    """The steps whose kept weights checkpoints refer to."""
    found = set()
    for path in checkpoints(folder):
        with contextlib.suppress(OSError, ValueError):  # one that was damaged is of no use with its kept state either
            kept = json.loads((path / "state.json").read_text()).get("kept")
            found |= {kept["step"]} if kept else set()
    return found


def remove_all_but(folder: Path, steps: set[int]) -> None:
    """Remove the folders step-* of all other steps, and `folder` itself once it is empty."""
    for path in folder.glob("step-*"):
        if int(path.name.removeprefix("step-")) not in steps:
            shutil.rmtree(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    """`optim.lr was 0.001, is 0.002` for each option that is not equal."""
    found = []
    for key in {**saved, **now}:
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old}, is {new}")
    return found


def _refusal(error: Exception, wanted: Path, last: Path | None) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error)
    cause = "the disk is full" if full else str(error)
    kept = f"the last checkpoint, {last}, is whole" if last else "there is no earlier checkpoint"
    return f"checkpoint: cannot write {wanted}: {cause}; {kept}; free space or choose another output, then resume with --resume auto"
