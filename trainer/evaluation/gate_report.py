"""Write the verdict of a gate: gate.json, gate.md for a pull request, and gate.html."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.errors import UserError
from trainer.evaluation import report
from trainer.evaluation.gate_rules import Verdict
from trainer.report import answers, page

TEMPLATE = Path(__file__).with_name("gate.html.jinja")
MEANINGS = {
    "interval": "accuracy not below the base's Wilson interval",
    "McNemar": "not more items forgotten than gained (exact McNemar test, Holm's p)",
    "ended": "answers end themselves no less often than the base's (the same test)",
    "log-prob": "the change of log-prob reaches the margin below 0",
    "gain": "more items gained than forgotten (exact McNemar test), or a log-prob that rose",
}


def passed(found: Sequence[Verdict]) -> bool:
    return all(verdict.passed for verdict in found)


def headline(results: dict, found: Sequence[Verdict]) -> str:
    """Return the verdict in one line."""
    broken = sum(not verdict.passed for verdict in found)
    rules = f"{len(found)} rules kept" if not broken else f"{broken} of {len(found)} rules broken"
    return f"{'FAIL' if broken else 'PASS'}: {results['model']} against {results['base']}, {rules}"


def write(output: Path, results: dict, found: Sequence[Verdict]) -> None:
    """Write the three files. Raises UserError if they cannot be written."""
    record = {"verdict": "PASS" if passed(found) else "FAIL", "model": results["model"], "base": results["base"],
              "confidence": results["confidence"], "rules": [asdict(verdict) for verdict in found]}
    header, *rows = report.filled_columns(results)
    try:
        (output / "gate.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        (output / "gate.md").write_text(markdown(results, found), encoding="utf-8")
        page.write(output / "gate.html", TEMPLATE, report.plots(results), results=results, name=output.resolve().name, verdicts=found,
                   passed=passed(found), headline=headline(results, found), meanings=_meanings(found), rows=rows, header=header,
                   notes=report.caption(results), command=shlex.join(sys.orig_argv),
                   answers=answers.sections(answers.read(output)))
    except OSError as error:
        raise UserError(f"output: cannot write {output}: {error.strerror}; choose another --output") from None


def markdown(results: dict, found: Sequence[Verdict]) -> str:
    """Return the verdict as Markdown: what was broken first, then every rule, then the figures."""
    header, *rows = report.filled_columns(results)
    lines = [f"## {_escape(headline(results, found))}", ""]
    lines += [f"- **{_escape(v.file)}** breaks *{v.rule}*: {_escape(v.found)}" for v in found if not v.passed]
    lines += [""] if not passed(found) else []
    lines += _table(["", "role", "file or task", "rule", "found"],
                    [["pass" if v.passed else "**FAIL**", v.role, v.file, v.rule, v.found] for v in found])
    lines += ["", f"Rules, at {results['confidence']:.0%} confidence: "
              + "; ".join(f"*{rule}*: {meaning}" for rule, meaning in _meanings(found).items()) + "."]
    lines += ["", "<details><summary>Figures</summary>", "", *_table(header, rows), "", *(f"{note}  " for note in report.caption(results)),
              "", "</details>", ""]
    return "\n".join(lines)


def _meanings(found: Sequence[Verdict]) -> dict[str, str]:
    rules = {verdict.rule for verdict in found}
    return {rule: meaning for rule, meaning in MEANINGS.items() if rule in rules}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(_escape(cell) for cell in cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def text(results: dict, found: Sequence[Verdict]) -> str:
    """Return the verdict for a terminal: each rule on a line, the headline last."""
    widths = [max(len(getattr(verdict, name)) for verdict in found) for name in ("role", "file", "rule")]
    lines = [f"{'pass' if v.passed else 'FAIL'}  {v.role:{widths[0]}}  {v.file:{widths[1]}}  {v.rule:{widths[2]}}  {v.found}"
             for v in found]
    return "\n".join([*lines, headline(results, found)])
