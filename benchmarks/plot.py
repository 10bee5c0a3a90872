"""Renew the READMEs' tables and the pictures from the newest records.

`python -m benchmarks.plot`: a table goes between two markers, `<!-- benchmark: SUITE -->` (predictions of all models: `SUITE in full`) and
`<!-- end of benchmark -->`; the README's own sections go between `<!-- headline -->`, `<!-- summary -->` and their ends. With `--check`
nothing is written: the exit status is 1 where a page and the newest records disagree.
"""

from __future__ import annotations

import argparse
import re
import sys

from benchmarks import summary
from benchmarks.harness import show
from benchmarks.harness.record import RESULTS, newest
from benchmarks.harness.suite import view_of
from benchmarks.speed import kernel_predictions
from benchmarks.suites import VIEWS
from trainer.errors import UserError

ROOT = RESULTS.parents[1]
PAGES = tuple(ROOT / folder / "README.md" for folder in ("", "kernels", "synth", "trainer", "benchmarks"))
BLOCK = re.compile(r"(<!-- benchmark: ([\w-]+)( in full)? -->\n)(.*?)(<!-- end of benchmark -->)", re.DOTALL)
SECTION = re.compile(r"(<!-- (headline|summary) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


def renew(text: str, records: dict[str, dict]) -> str:
    """Return a page's text with the table of every marked suite made anew.

    Raises UserError for a suite without a record.
    """
    def block(found: re.Match) -> str:
        if found[2] not in records:
            raise UserError(f"README.md: expected a record of suite {found[2]} in benchmarks/results, found none; run its benchmark first")
        record = records[found[2]]
        view = kernel_predictions.FULL_VIEW if found[3] else view_of(record, VIEWS)
        return found[1] + show.markdown(record, view) + found[5]

    text = BLOCK.sub(block, text)
    return SECTION.sub(lambda found: found[1] + summary.SECTIONS[found[2]](records) + found[4], text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="README tables and pictures from the newest records.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a README differs from the records")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the pictures; the READMEs show PNG (default)")
    arguments = parser.parse_args(argv)
    try:
        records = newest()
        texts = {page: page.read_text() for page in PAGES}
        renewed = {page: renew(text, records) for page, text in texts.items()}
    except (UserError, FileNotFoundError) as error:
        print(f"benchmarks.plot: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        for page in PAGES:
            if renewed[page] != texts[page]:
                print(f"benchmarks.plot: {page} differs from the newest records; run python -m benchmarks.plot", file=sys.stderr)
        return int(renewed != texts)
    for page, text in renewed.items():
        page.write_text(text)
    for suite, record in records.items():
        print(show.draw(record, view_of(record, VIEWS), RESULTS / f"{suite}.{arguments.format}"))
    if "miniature-cpu" in records:
        print(show.draw(records["miniature-cpu"], summary.VIEW, RESULTS / f"{summary.PICTURE}.{arguments.format}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
