"""Run many small trainings in worker processes of one thread each."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from trainer.errors import UserError, require

# Matrices of these small models gain little from a second thread, and wait for it where cores are shared.
THREADS = 1


def begin() -> None:
    """Make this process a worker of `THREADS` threads."""
    torch.set_num_threads(THREADS)
    disable_progress_bar()


def begin_worker() -> None:
    """Begin, and end when the parent does, however it ends.

    A worker of a killed study would go on for hours.
    """

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    begin()
    threading.Thread(target=end, daemon=True).start()


def pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)


def results_of(begun: float, futures: Sequence[Future], name: Callable[[Any], str]) -> list:
    """Return the results of futures as they complete, and print the name of each.

    The seconds since `begun` are printed too.
    """
    found = []
    for done, future in enumerate(as_completed(futures), start=1):
        found.append(future.result())
        print(f"{time.perf_counter() - begun:6.0f} s  {done} of {len(futures)}  {name(found[-1])}", flush=True)
    return found


@contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Append to a file what is printed inside."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file):
        yield


# ---------------------------------------------------------------- options


def add_arguments(parser: argparse.ArgumentParser, seeds: int) -> None:
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1),
                        help="processes of one thread (default: one for each core, at most 8)")
    parser.add_argument("--keep", type=Path, help="a new or empty folder for all files that are made (default: none is kept)")


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that no run can use."""
    require(arguments.seeds >= 1, "--seeds", "at least 1", arguments.seeds)
    require(arguments.workers >= 1, "--workers", "at least 1", arguments.workers)
    if arguments.keep and arguments.keep.exists() and any(arguments.keep.iterdir()):
        raise UserError(f"--keep: expected a new or empty folder, found {arguments.keep} in use")


@contextmanager
def working_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder of `--keep`, or one that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="steadfast-") as scratch:
        yield (arguments.keep or Path(scratch)).absolute()
