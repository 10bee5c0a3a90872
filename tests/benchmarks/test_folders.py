"""Folders of benchmarks/ import one way: harness < families < forgetting < speed < on_gpu < the commands."""

import ast
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(benchmarks.__file__).parent
ORDER = ("harness", "families", "forgetting", "speed", "on_gpu", "commands")
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def folder_of(module: str) -> str:
    """Return the folder of a module of benchmarks, by its dotted name without the package."""
    first, dot, _ = module.partition(".")
    return first if dot and first in ORDER or first in ORDER else "commands"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    own = path.parts[0] if len(path.parts) > 1 else "commands"
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
            names = [f"{node.module}.{alias.name}".removeprefix("benchmarks.") for alias in node.names]
            for name in names:
                assert ORDER.index(folder_of(name)) <= ORDER.index(own), f"{path} imports {name}"
