"""Write checkpoints atomically and resume from them bit for bit.

A checkpoint is a folder `checkpoints/step-00000120`: `state.safetensors` (masters and optimizer moments) and `state.json` (a `State`),
each with its checksum, which is verified before anything is read.
Of a run that has ended, and has only to be exported, it holds the trained weights alone, in the precision they are exported in.

Ranks that share the weights write a folder of their parts instead of `state.safetensors` (runtime/sharded_checkpoint.py). Any number of
ranks, sharded or not, can resume from either kind.

It is written to a temporary folder, synced to disk and renamed, so a kill, a crash or a full disk at any moment leaves the earlier
checkpoints as they were. The position in the data and the random states are not in it: both are functions of the step
(data/step_plan.py, training/loop.py).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.checksums import verify_checksum, write_checksum
from trainer.config import Config
from trainer.errors import UserError, one_line
from trainer.files import atomic_folder
from trainer.runtime import sharded_checkpoint
from trainer.runtime.distributed import Distributed

FILES = ("state.safetensors", "state.json")  # of sharded ranks, the last alone

# Options that may differ when a run resumes: they say where results go, never what is computed.
FREE_TO_CHANGE = {"output", "resume", "logging", "checkpoint", "export", "dry_run", "data.num_proc", "data.cache_dir",
                  "eval.show", "fsdp"}


class Optimizer(Protocol):
    """Everything a checkpoint needs of an optimizer: its tensors by name, and their restoration."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, tensors: dict[str, Tensor]) -> None: ...

    def weights(self) -> dict[str, Tensor]: ...

    def load_weights(self, tensors: dict[str, Tensor]) -> None: ...

    def by_name(self, weights_only: bool) -> dict[str, Tensor]: ...

    def publish(self) -> None: ...


class ShardedOptimizer(Protocol):
    """Everything a checkpoint needs of an optimizer whose tensors have parts on all ranks."""

    def by_name(self, weights_only: bool) -> dict[str, Tensor]: ...

    def load_flat(self, file: Path, weights_only: bool) -> None: ...


@dataclass
class State:
    """Progress of a run, beside the optimizer's tensors; saved as `state.json`."""

    identity: dict  # what the run computes: configuration, data, base model
    step: int = 0  # optimizer steps done
    loss: float | None = None  # mean training loss of the last log interval
    eval_loss: float | None = None  # of the last evaluation
    best_eval_loss: float | None = None  # the lowest so far
    evals_since_best: int = 0  # evaluations after that one
    last_measurement: dict | None = None  # of general and domain items (retention/monitor.py)
    kept_measurement: dict | None = None  # of the state whose weights are kept for export
    floor_misses: int = 0  # measurements in a row, in the second half, that missed the floor and came no nearer to it
    ended: str | None = None  # why training ended, of a run that has only to be exported


def identity(config: Config, world_size: int, **fingerprints: str | None) -> dict:
    """Return what must be equal for a run to resume: options, ranks, fingerprints of data and base."""
    options = dataclasses.asdict(config)
    for name in FREE_TO_CHANGE:
        *section, last = name.split(".")
        (options[section[0]] if section else options).pop(last)
    return {**options, **fingerprints, "ranks": world_size}


def save_sharded(folder: Path, state: State, optimizer: ShardedOptimizer, keep: int, dist: Distributed) -> Path:
    """Do on all ranks what `save` does, each writing its part of the tensors."""
    final = place(folder, state.step)
    tensors = optimizer.by_name(weights_only=state.ended is not None)
    sharded_checkpoint.write(final, tensors, json.dumps(dataclasses.asdict(state)), dist,
                             lambda error: _write_error(error, final, newest(folder)))
    dist.on_main(lambda: _remove_old(folder, state, keep))
    return final


def save(folder: Path, state: State, optimizer: Optimizer, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`; that of an ended run is one more.

    Raises UserError if it cannot be written.
    """
    final = place(folder, state.step)
    tensors = optimizer.weights() if state.ended else optimizer.state()
    with atomic_folder(final, lambda error: _write_error(error, final, newest(folder))) as tmp:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp / "state.safetensors")
        (tmp / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
        for name in FILES:
            write_checksum(tmp / name)
    _remove_old(folder, state, keep)
    return final


def _remove_old(folder: Path, state: State, keep: int) -> None:
    for old in [] if state.ended else checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load(path: Path, expected: dict, optimizer: Optimizer | ShardedOptimizer, sharded: bool = False) -> State:
    """Restore the optimizer from a checkpoint, sharded or not, and return the run's state.

    `expected` is the run's identity, of which the number of ranks may be another. Raises UserError if the checkpoint is damaged, or was
    made with another configuration or data.
    """
    try:
        for name in FILES[sharded_checkpoint.is_sharded(path):]:
            verify_checksum(path / name)
        state = _read_state(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unusable(path, error) from None
    expected = json.loads(json.dumps(expected))
    changed = differences({**state.identity, "ranks": None}, {**expected, "ranks": None})
    if changed:
        raise UserError(f"resume: {path} was made with another configuration: {'; '.join(changed)}; "
                        "restore these options, or start a new run in another output folder")
    try:
        _restore(path, state, optimizer, sharded)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unusable(path, error) from None
    return state


def _restore(path: Path, state: State, optimizer: Optimizer | ShardedOptimizer, sharded: bool) -> None:
    """Load the tensors of a checkpoint, as they were written, into an optimizer, as it is."""
    if sharded_checkpoint.is_sharded(path):
        sharded_checkpoint.read(path, optimizer.by_name(weights_only=state.ended is not None))
        optimizer.publish()
    elif sharded:
        optimizer.load_flat(path / "state.safetensors", weights_only=state.ended is not None)
    else:
        (optimizer.load_weights if state.ended else optimizer.load_state)(load_file(path / "state.safetensors"))


def _unusable(path: Path, reason: Exception) -> UserError:
    earlier = [other.name for other in checkpoints(path.parent) if other.name < path.name]
    remedy = f"remove it to resume from {earlier[-1]}" if earlier else "there is none before it: remove it to start again"
    return UserError(f"resume: cannot read the checkpoint {path}: {one_line(str(reason))}; {remedy}")


def _read_state(path: Path) -> State:
    """Read the state of a checkpoint.

    Raises ValueError where it is none, or one of another step, and OSError.
    """
    try:
        state = State(**json.loads((path / "state.json").read_text()))
    except (TypeError, RecursionError) as error:  # of another version, or no state at all
        raise ValueError(f"state.json holds no state of a run ({error})") from None
    mappings = [state.identity, *(found for found in (state.last_measurement, state.kept_measurement) if found is not None)]
    if not all(isinstance(found, dict) for found in mappings):
        raise ValueError("state.json holds no state of a run: expected mappings for its identity and measurements")
    if not isinstance(state.step, int) or path != place(path.parent, state.step):
        raise ValueError(f"state.json is that of step {state.step}")
    return state


def place(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def has_ended(path: Path | None) -> bool:
    """Return whether a checkpoint is that of a run that has only to be exported."""
    return path is not None and (state := _saved_state(path)) is not None and state.ended is not None


def remove_ended(folder: Path) -> None:
    """Remove the checkpoints of ended runs, and `folder` itself if that leaves it empty."""
    remove_all_but(folder, {int(path.name.removeprefix("step-")) for path in checkpoints(folder) if not has_ended(path)})


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> Path | None:
    """Return the last checkpoint, or None if there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def kept_steps(folder: Path) -> set[int]:
    """Return the steps whose kept weights some checkpoint refers to."""
    states = map(_saved_state, checkpoints(folder))
    return {state.kept_measurement["step"] for state in states if state and state.kept_measurement}


def _saved_state(path: Path) -> State | None:
    """Return a checkpoint's state; None of a damaged one, which cannot be resumed from."""
    try:
        verify_checksum(path / "state.json")
        return _read_state(path)
    except (OSError, ValueError):
        return None


def remove_all_but(folder: Path, steps: set[int]) -> None:
    """Remove the step-* folders of all other steps, and `folder` itself if that leaves it empty."""
    for path in folder.glob("step-*"):
        if int(path.name.removeprefix("step-")) not in steps:
            shutil.rmtree(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    """Return a line like `optim.lr was 0.001, is 0.002` for each option that differs."""
    found = []
    for key in {**saved, **now}:
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old}, is {new}")
    return found


def _write_error(error: Exception, checkpoint: Path, last: Path | None) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error)
    cause = "the disk is full" if full else str(error)
    earlier = f"the last checkpoint, {last}, is whole" if last else "there is no earlier checkpoint"
    return f"checkpoint: cannot write {checkpoint}: {cause}; {earlier}; free space or choose another output, then resume with --resume auto"
