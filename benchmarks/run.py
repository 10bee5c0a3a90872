"""`python -m benchmarks.run SUITE`: measure, print the table, and leave the record and its picture in benchmarks/results.

`python -m benchmarks.run --compare REV` measures this checkout against another commit; the exit status is 1 where something got slower.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything measured is made here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler speaks of itself on standard error
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from benchmarks import plot
from benchmarks.forgetting import floor, real_text
from benchmarks.forgetting.miniature import demo, study
from benchmarks.harness import record
from benchmarks.speed import compare, gsm8k, kernels, options, scaling, synthesis, training
from trainer.errors import UserError

SUITES = {"training": training, "gsm8k": gsm8k, "demo": demo, "miniature": study, "kernels": kernels, "synthesis": synthesis,
          "scaling": scaling, "options": options, "floor": floor, "retention": real_text,
          "compare": compare}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure Steadfast against its alternatives.")
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)
    for name, suite in SUITES.items():
        subparser = suites.add_parser(name, help=suite.__doc__.splitlines()[0], description=suite.__doc__.splitlines()[0])
        subparser.add_argument("--results", type=Path, default=record.RESULTS, help="folder for the record and its picture")
        suite.add_arguments(subparser)
    arguments = parser.parse_args(spelled_out(sys.argv[1:] if argv is None else argv))
    try:
        measured = SUITES[arguments.suite].run(arguments)
        path = record.write(measured, arguments.results)
    except UserError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    print(getattr(SUITES[arguments.suite], "report", plot.markdown)(measured))
    print(f"record: {path}\npicture: {plot.draw(measured, arguments.results / (measured['suite'] + '.png'))}")
    return getattr(SUITES[arguments.suite], "status", lambda record: 0)(measured)


def spelled_out(argv: list[str]) -> list[str]:
    """`--compare REV` anywhere means the suite `compare REV`."""
    for i, word in enumerate(argv):
        if word == "--compare" or word.startswith("--compare="):
            rev = argv[i + 1 : i + 2] if word == "--compare" else [word.partition("=")[2]]
            return ["compare", *rev, *argv[:i], *argv[i + (2 if word == "--compare" else 1) :]]
    return argv


if __name__ == "__main__":
    sys.exit(main())
