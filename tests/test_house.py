"""Rules of the house that no single module can check: which way imports go, and that the pins are complete."""

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "trainer": {"trainer", "kernels"},
    "synth": {"synth", "trainer", "kernels"},
    "benchmarks": {"benchmarks", "synth", "trainer", "kernels"},
    "tests": {"tests", "benchmarks", "synth", "trainer", "kernels"},
}
FILES = [path for top in MAY_IMPORT for path in sorted((ROOT / top).rglob("*.py"))]


def imported(source: str) -> set[str]:
    """Top-level packages that Python source imports anywhere, functions included; a relative import shows as "."."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and isinstance(node.args[0], ast.Constant):
            found.add(node.args[0].value.partition(".")[0])
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def pins(*names: str) -> dict[str, str]:
    """Distribution -> version, from requirements files; any other form of line fails."""
    found = {}
    for name in names:
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
                assert match, f"{name}: expected name==version without a local part, found {line!r}"
                assert canonicalize_name(match[1]) not in found, f"{name}: {match[1]} is pinned twice"
                found[canonicalize_name(match[1])] = match[2]
    return found


def extras() -> dict[str, list[str]]:
    """The EXTRAS of setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py: expected EXTRAS = {...}, found none")


def test_import_scan_sees_every_form():
    source = "import a.b\ndef f():\n    from c import d\n    importlib.import_module('e.f')\nfrom . import g\n"
    assert imported(source) == {"a", "c", "e", "."}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    top = path.relative_to(ROOT).parts[0]
    wrong = imported(path.read_text()) & (set(MAY_IMPORT) | {"."}) - MAY_IMPORT[top]
    assert not wrong, f"{name_of(path)} may import {sorted(MAY_IMPORT[top])} by their full names, but imports {sorted(wrong)}"


def test_kernels_stand_on_torch_alone():
    """transformers may import `kernels` while it is itself half imported, so nothing above torch is allowed there."""
    third_party = {name for path in FILES if "kernels" in path.relative_to(ROOT).parts[0] for name in imported(path.read_text())}
    assert third_party - set(sys.stdlib_module_names) <= {"kernels", "torch", "triton", "numpy", "flash_attn", "flash_attn_interface"}


def test_every_third_party_import_is_pinned_or_an_extra():
    """What trainer, synth and kernels import is pinned for users; benchmarks and tests may also use the development pins."""
    runtime, synthesis = pins("requirements.txt", "requirements-cpu.txt"), pins("requirements-synth.txt")
    optional = {Requirement(r).name.replace("-", "_") for group, rs in extras().items() if group != "dev" for r in rs}
    optional |= {"flash_attn_interface"}  # the import name of flash-attn 3
    distributions = packages_distributions()
    for path in FILES:
        top = path.relative_to(ROOT).parts[0]
        pinned = runtime if top in ("kernels", "trainer") else runtime | synthesis
        pinned = pinned if top in ("kernels", "trainer", "synth") else pinned | pins("requirements-dev.txt")
        for name in imported(path.read_text()) - set(sys.stdlib_module_names) - set(MAY_IMPORT) - optional:
            owners = {canonicalize_name(d) for d in distributions.get(name, [name])}
            assert owners & set(pinned), f"{name_of(path)} imports {name}, which no requirements file of {top}/ pins"


def test_pins_need_no_resolution():
    """All that a pinned package requires is pinned too, at a version it accepts: so pip can install without resolving."""
    pinned = pins("requirements.txt", "requirements-dev.txt", "requirements-cpu.txt")
    checked = 0
    for name, wanted in pinned.items():
        try:
            if version(name).partition("+")[0] != wanted:
                continue
        except PackageNotFoundError:
            continue
        checked += 1
        for requirement in map(Requirement, requires(name) or []):
            # The CUDA build of torch names the packages of the graphics driver's side, which pip resolves with torch.
            on_this_machine = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if on_this_machine and not (name == "torch" and requirement.name.startswith(("nvidia-", "cuda-", "triton"))):
                dependency = canonicalize_name(requirement.name)
                assert dependency in pinned, f"{name} requires {requirement}, which is not pinned"
                assert requirement.specifier.contains(pinned[dependency], prereleases=True), f"{name} requires {requirement}"
    assert checked > len(pinned) // 2, "most of the pinned packages should be installed here: run `make env`"


def test_synthesis_is_pinned_beside_the_rest_for_a_cpu_and_for_cuda():
    for build in ("cpu", "cuda"):
        assert pins("requirements.txt", "requirements-dev.txt", "requirements-synth.txt", f"requirements-synth-{build}.txt")
    for name, wanted in pins("requirements-synth.txt").items():
        assert version(name) == wanted, "run `make env`"


def test_ranges_of_setup_contain_the_pins():
    pinned = pins("requirements.txt", "requirements-dev.txt", "requirements-cpu.txt")
    tree = ast.parse((ROOT / "setup.py").read_text())
    required = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "REQUIRES")
    for requirement in map(Requirement, required + extras()["dev"]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), f"setup.py: {requirement}"


def test_the_distribution_holds_four_packages_and_their_data(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    folders, suffixes = (ROOT / "trainer", ROOT / "synth", ROOT / "benchmarks/forgetting/miniature"), ("jinja", "safetensors", "yaml")
    data = [path for folder in folders for suffix in suffixes for path in folder.rglob(f"*.{suffix}")]
    expected = {name_of(path) for path in FILES + data if not name_of(path).startswith("tests/")}
    assert expected <= built
    assert {name.partition("/")[0] for name in built} == {"kernels", "trainer", "synth", "benchmarks"}


def test_an_unsupported_python_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        (tmp_path / path.name).write_text(path.read_text())
    done = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr and "Python 3.8.1" in done.stderr
    assert not (tmp_path / ".venv").exists()
