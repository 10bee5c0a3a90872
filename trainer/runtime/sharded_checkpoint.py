"""Write and read the state of sharded ranks with torch.distributed.checkpoint.

Any number of ranks, or one process, can read it. In such a checkpoint the folder `state/` takes the place of `state.safetensors`: a file of
each rank's parts, and `.metadata`, where each part of a tensor is found by name. A tensor that is loaded into may be divided in another
way, or whole.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed
from torch import Tensor
from torch.distributed import checkpoint as dcp

from trainer.checksums import verify_checksum, write_checksum
from trainer.errors import UserError, one_line
from trainer.files import atomic_folder
from trainer.runtime.distributed import Distributed

FOLDER = "state"


def is_sharded(path: Path) -> bool:
    """Return whether sharded ranks wrote this checkpoint."""
    return (path / FOLDER).is_dir()


def write(final: Path, tensors: dict[str, Tensor], state_json: str, dist: Distributed, refusal: Callable[[Exception], str]) -> None:
    """Write a checkpoint from all ranks, each its parts of `tensors`; rank 0 publishes it.

    Raises UserError on every rank, with the message that `refusal` makes of an error, if one of them cannot write.
    """
    with contextlib.ExitStack() as stack:
        found: list[Path] = []
        dist.on_main(lambda: found.append(stack.enter_context(atomic_folder(final, refusal))))
        tmp = dist.gather(found[0] if found else None)[0]
        error = None
        try:
            with _quiet():
                dcp.save(tensors, checkpoint_id=tmp / FOLDER)
        except (OSError, dcp.CheckpointException) as raised:  # of this rank, or of any
            error = refusal(next((e for e in getattr(raised, "failures", {}).values() if isinstance(e, OSError)), raised))
        if error := next(filter(None, dist.gather(error)), None):
            raise UserError(error)

        def publish() -> None:
            (tmp / "state.json").write_text(state_json)
            for file in _files(tmp):
                write_checksum(file)
            stack.close()

        dist.on_main(publish)


def read(path: Path, into: dict[str, Tensor]) -> None:
    """Load the tensors `into`, each whole or this rank's part of it, of undamaged files.

    Raises ValueError for damaged files, or another layout.
    """
    for file in _files(path)[1:]:
        verify_checksum(file)
    try:
        with _quiet():
            dcp.load(into, checkpoint_id=path / FOLDER, no_dist=not torch.distributed.is_initialized())
    except (dcp.CheckpointException, RuntimeError, KeyError) as error:
        failures = getattr(error, "failures", {})
        raise ValueError(one_line(str(next(iter(failures.values()), error)))) from None


def _files(path: Path) -> list[Path]:
    """Return the files of a checkpoint that have checksums, `state.json` first."""
    return [path / "state.json", *sorted(file for file in (path / FOLDER).iterdir() if file.suffix != ".xxh3")]


@contextlib.contextmanager
def _quiet():
    """Silence torch's warnings on a checkpoint that one process reads."""
    with warnings.catch_warnings(action="ignore"):
        yield
