"""Prompts that people wrote, from the folder of real data beside the checkout; tests that need it skip where it is absent."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "shared" / "data"
COLUMNS = {"gsm8k_train": "question", "gsm8k_test": "question", "self_instruct_seed_tasks": "instruction",
           "self_instruct_user_oriented": "instruction"}


def path(name: str) -> Path:
    file = FOLDER / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"REAL DATA MISSING: {file} is not there")
    return file


def prompts(*names: str) -> list[str]:
    return [json.loads(line)[COLUMNS[name]] for name in names for line in path(name).open(encoding="utf-8")]
