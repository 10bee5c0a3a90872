"""Run a campaign and print a table of it: `python -m tests.campaign --seed 7 --minutes 5`.

Each kind of attack is a file here, with a function `attack(dice, folder, material)`. A case is made from the seed, its kind and its number
alone, so `--only KIND:NUMBER` with its seed repeats it. The folder keeps the inputs and the output of each fault, and a line for every
case in results.jsonl: later calls add to it, and the table is of all that it holds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

from tests.campaign import KINDS, ROUND
from tests.campaign.material import Material
from tests.campaign.oracle import FAULTS, Outcome, Verdict

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- campaign -->\n)(.*?)(<!-- end of campaign -->)", re.DOTALL)


def attacked(kind: str, seed: int, number: int, folder: Path, material: Material) -> Verdict:
    """Make a case in its folder, run it, and return the verdict.

    The folder of a fault stays, with the verdict in it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    verdict = KINDS[kind](Random(f"{seed} {kind} {number}"), folder, material)
    if verdict.outcome in FAULTS:
        again = f"python -m tests.campaign --seed {seed} --only '{kind}:{number}'"
        (folder / "verdict.txt").write_text(f"{again}\n{verdict.outcome}: {verdict.detail}\n", errors="backslashreplace")
    else:
        shutil.rmtree(folder)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description="Attack the commands with drawn inputs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after these minutes")
    parser.add_argument("--cases", type=int, help="stop after so many cases; default without --minutes: 100")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="of attack; default: all, in a fixed round")
    parser.add_argument("--only", help="KIND:NUMBER, one case")
    parser.add_argument("--folder", type=Path, default=Path("runs/campaign"), help="of results and faults")
    parser.add_argument("--page", type=Path, help="a Markdown page whose block between <!-- campaign --> and its end is made anew")
    given = parser.parse_args()
    kinds = [kind for kind in ROUND if not given.kinds or kind in given.kinds]
    cases = given.cases or (None if given.minutes else 100)
    until = time.monotonic() + 60 * (given.minutes or 10**6)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.environ.pop("OPENAI_API_KEY", None)
    given.folder.mkdir(parents=True, exist_ok=True)
    folder = given.folder.resolve()
    material = Material(folder / f"material-{os.getpid()}")
    material.warm_up()
    done = Counter()
    try:
        while (cases is None or done.total() < cases) and time.monotonic() < until:
            kind = kinds[done.total() % len(kinds)]
            number = done[kind]
            if given.only:
                kind, _, text = given.only.partition(":")
                number, cases = int(text), 1
            done[kind] += 1
            name = f"{kind}-{given.seed}-{number}"
            before = cpu_seconds()
            verdict = attacked(kind, given.seed, number, folder / name, material)
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps({"kind": kind, "seed": given.seed, "number": number, **verdict._asdict(),
                                       "cpu_seconds": round(cpu_seconds() - before, 2)}) + "\n")
            if verdict.outcome in FAULTS or given.only:
                print(f"{name}: {verdict.outcome}: {verdict.detail[:400]!a}", flush=True)
    finally:
        shutil.rmtree(material.folder, ignore_errors=True)
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    shown = table(results)
    print(shown)
    if given.page:
        page = given.page.read_text()
        given.page.write_text(BLOCK.sub(lambda found: found[1] + shown + "\n" + found[3], page))
    return int(any(result["outcome"] in FAULTS for result in results))


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def table(results: list[dict]) -> str:
    """Return a Markdown table of how the cases ended, by kind, with the date and the seeds."""
    by_kind = {kind: Counter(result["outcome"] for result in results if result["kind"] == kind) for kind in KINDS}
    kills = Counter()
    for result in results:
        kills[result["kind"]] += result["kills"]
    rows = [(kind, counts, kills[kind]) for kind, counts in by_kind.items() if counts]
    rows.append(("all", sum(by_kind.values(), Counter()), kills.total()))
    seeds = ", ".join(map(str, sorted({result["seed"] for result in results})))
    lines = [f"{datetime.date.today()}, seeds {seeds}:", "", "| " + " | ".join(["kind", "cases", *Outcome, "kills"]) + " |",
             "| --- |" + " ---: |" * (len(Outcome) + 2)]
    lines += ["| " + " | ".join([kind,
                                 *(f"{number:,}" for number in (counts.total(), *(counts[outcome] for outcome in Outcome), killed))]) + " |"
              for kind, counts, killed in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
