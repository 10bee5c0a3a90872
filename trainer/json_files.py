"""Read JSON files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.errors import UserError, one_line


def read_object(option: str, file: Path) -> dict:
    """Return the object that a JSON file holds. Raises UserError that names the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{option}: cannot read {file}: {one_line(str(error))}; save the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{option}: expected an object in {file}, found {type(content).__name__}; save the model again")
    return content
