"""Measure a suite, print its table, write its record and picture: `python -m benchmarks.run SUITE`.

Without a suite, it lists them. `python -m benchmarks.run --compare REV` measures this checkout against another commit; the exit status is
1 where something got slower.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not {"gsm8k", "retention", "real"} & set(sys.argv):  # which may load public sets; all else is made here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would print to standard error
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from benchmarks.harness import record, show
from benchmarks.harness.suite import view_of
from benchmarks.suites import SUITES, VIEWS
from trainer.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure Steadfast against its alternatives.")
    suites = parser.add_subparsers(dest="suite", metavar="SUITE")
    for suite in SUITES.values():
        subparser = suites.add_parser(suite.name, help=suite.summary, description=suite.summary)
        subparser.add_argument("--results", type=Path, default=record.RESULTS, help="folder for the record and its picture")
        suite.add_arguments(subparser)
    arguments = parser.parse_args(as_suite(sys.argv[1:] if argv is None else argv))
    if arguments.suite is None:
        print(listing())
        return 0
    suite = SUITES[arguments.suite]
    try:
        measured = suite.run(arguments)
        path = record.write(measured, arguments.results)
    except UserError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    view = view_of(measured, VIEWS)
    print(show.markdown(measured, view))
    print(f"record: {path}\npicture: {show.draw(measured, view, arguments.results / (measured['suite'] + '.png'))}")
    return suite.status(measured)


def listing() -> str:
    """Return a line for each suite."""
    lines = [f"  {suite.name:<10} {suite.summary}" for suite in SUITES.values()]
    return "\n".join(["usage: python -m benchmarks.run SUITE [--help]", "", *lines])


def as_suite(argv: list[str]) -> list[str]:
    """Return the arguments with `--compare REV`, anywhere, as the suite `compare REV`."""
    for i, word in enumerate(argv):
        if word == "--compare" or word.startswith("--compare="):
            rev = argv[i + 1 : i + 2] if word == "--compare" else [word.partition("=")[2]]
            return ["compare", *rev, *argv[:i], *argv[i + (2 if word == "--compare" else 1) :]]
    return argv


if __name__ == "__main__":
    sys.exit(main())
