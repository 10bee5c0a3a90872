"""Add and check the options that several suites share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from trainer.errors import require

TIMING = {"rounds": "rounds of all contenders", "steps": "steps of each contender in a round", "threads": "threads of torch"}
FEWEST = {"rounds": 2, "steps": 1, "threads": 1}


def add_timing_arguments(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add those of --rounds, --steps and --threads that have a default."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{TIMING[name]} (default: %(default)s)")


def check_timing(arguments: argparse.Namespace, **fewest: int) -> None:
    """Raise UserError for fewer rounds, steps or threads than a suite needs; `fewest` overrides them."""
    for name, least in (FEWEST | fewest).items():
        found = getattr(arguments, name, least)
        require(found >= least, f"--{name}", f"at least {least}", found)


def check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for names that an option does not know."""
    unknown = [name for name in names if name not in known]
    require(not unknown, option, f"names of {'; '.join(known)}", "; ".join(unknown))
