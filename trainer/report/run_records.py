"""Read a run folder: config.yaml, metrics.jsonl, data.json, answers.jsonl, probes of a replay search."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from trainer.errors import UserError
from trainer.metrics.records import read_records
from trainer.report import answers
from trainer.report.answers import Answers

MOST_STEPS = 20_000  # logged steps that a report holds: more than a plot has pixels

MOST_STEPS = 20_000  # logged steps that a report holds: more than a plot has pixels


@dataclass
class Run:
    """Contents of a run folder. Absent files and entries are empty."""

    name: str
    steps: list[dict] = field(default_factory=list)  # by step, one each; of very many lines one in `every`, and the last
    every: int = 1
    evaluations: list[dict] = field(default_factory=list)
    forgetting: list[dict] = field(default_factory=list)  # scores of general and domain items
    end: dict | None = None  # None: the run was killed, or is still running
    unreadable: int = 0  # lines of metrics.jsonl that hold no record, torn by a kill or damaged
    data: dict = field(default_factory=dict)
    replay_search: dict = field(default_factory=dict)  # its probes and choice, if any (trainer/retention/replay_search.py)
    answers: list[Answers] = field(default_factory=list)  # of base and tuned model
    config_text: str = ""
    versions: dict = field(default_factory=dict)
    command: str = ""

    @property
    def sources(self) -> list[dict]:
        return self.data.get("sources", [])

    @property
    def backends(self) -> dict:
        return self.data.get("backends", {})


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if there is none, or one of its files is malformed."""
    if not folder.is_dir():
        raise UserError(f"report: expected a run folder, found none at {folder}")
    config = _read_mapping(folder / "config.yaml", yaml.safe_load, yaml.YAMLError)
    data = _read_mapping(folder / "data.json", json.loads, json.JSONDecodeError)
    for source in data.get("sources", []):
        samples, seen = source.get("samples"), source.get("epoch_samples")
        source["passes"] = seen / samples if samples and seen is not None else None
    run = Run(folder.resolve().name, data=data, answers=answers.read(folder),
              replay_search=_read_mapping(folder / "replay_search.json", json.loads, json.JSONDecodeError))
    run.versions, command = config.pop("versions", None) or {}, config.pop("command", "")
    run.command = command if isinstance(command, str) else " ".join(map(str, command))
    run.config_text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""
    _read_metrics(folder / "metrics.jsonl", run)
    return run


def _read_mapping(path: Path, parse, parse_error: type[Exception]) -> dict:
    if not path.exists():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except parse_error as error:
        raise UserError(f"report: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"report: expected a mapping in {path}, found {type(content).__name__}")
    return content


def _read_metrics(path: Path, run: Run) -> None:
    """Fill in steps, evaluations and end.

    A resumed run logs some steps again, so a line drops earlier lines of its own and later steps. Of more lines than `MOST_STEPS` some are
    left out, so that the memory that a report takes has an end.
    """
    run.every = math.ceil(_count_lines(path) / MOST_STEPS) or 1
    count, passing = 0, False  # of steps; whether the last one stays only until the next
    logged = {"step": run.steps, "eval": run.evaluations, "forgetting": run.forgetting}
    for record in read_records(path):
        if record is None:
            run.unreadable += 1
            continue
        run.end = record if record["kind"] == "end" else None
        if record["kind"] not in logged:
            continue
        for kind, records in logged.items():
            while records and records[-1]["step"] >= record["step"] + (kind != record["kind"]):
                records.pop()
                passing = passing and kind != "step"
        if record["kind"] == "step":
            if passing:
                run.steps.pop()
            passing = count % run.every != 0
            count += 1
        logged[record["kind"]].append(record)


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def column(records: list[dict], key: str) -> np.ndarray:
    """Return one figure of each record as float64, NaN where it is absent."""
    return np.array([math.nan if record.get(key) is None else record[key] for record in records], dtype=float)
