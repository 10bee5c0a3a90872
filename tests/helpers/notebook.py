"""Run the cells of a notebook here, without Jupyter: Python, and `!{sys.executable} -m MODULE ...` lines of our own commands."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

COMMAND = re.compile(r"^(\s*)!\{sys\.executable\} -m (.*)$", re.MULTILINE)


def code_cells(path: Path) -> list[str]:
    """Return the source of each code cell."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run_cells(cells: list[str]) -> tuple[list[tuple[str, int]], str]:
    """Run cells in one namespace; return the commands with their exit statuses, and all that was printed."""
    ended: list[tuple[str, int]] = []
    namespace = {"__name__": "__main__", "_command": lambda line: ended.append((line.split()[0], run_command(line)))}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        for cell in cells:
            exec(compile(COMMAND.sub(r"\1_command(f'''\2''')", cell), "cell", "exec"), namespace)
    return ended, shown.getvalue()


def run_command(line: str) -> int:
    """Run `MODULE ARGUMENTS` as a shell and a new Python would; return its exit status."""
    module, *arguments = shlex.split(line)
    before, imported = sys.argv, sys.modules.pop(module, None)  # it runs as __main__
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
        if imported:
            sys.modules[module] = imported
    return 0
