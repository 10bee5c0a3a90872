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

from trainer.needed_packages import REQUIRES

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "trainer": {"trainer", "kernels"},
    "synth": {"synth", "trainer", "kernels"},
    "benchmarks": {"benchmarks", "synth", "trainer", "kernels"},
    "tests": {"tests", "benchmarks", "synth", "trainer", "kernels"},
}
FILES = [path for top in MAY_IMPORT for path in sorted((ROOT / top).rglob("*.py"))]
# Folders of a package from the ground up: a module imports from its own folder and from those before it. "" is the package's own files that
# are not listed in TOP: the ground floor, on which everything stands.
LAYERS = {
    "trainer": ("", "conversion", "runtime", "data", "model", "optim", "metrics", "report", "evaluation", "retention", "on_policy",
                "training", "recovery"),
    "synth": ("", "engines", "pool", "filters", "judging", "reporting", "stages"),
    "benchmarks": ("", "harness", "families", "forgetting", "speed", "on_gpu"),
}
# Commands, and what they share: above all folders.
TOP = {"trainer": {"run", "evaluate", "gate", "interpolate", "convert", "chat", "publish", "recover"}, "synth": {"run"},
       "benchmarks": {"run", "plot", "gpu", "suites", "summary"}}
# First words of docstrings that begin with something else than a verb.
NO_VERBS = set("the a an what which whether how why one all each every this these that those it its where when who whose of for in on from "
               "with without no not if as to same some any both such there their they at by only after before until here now".split())


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


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    top = path.relative_to(ROOT).parts[0]
    wrong = imported(path.read_text()) & (set(MAY_IMPORT) | {"."}) - MAY_IMPORT[top]
    assert not wrong, f"{name_of(path)} may import {sorted(MAY_IMPORT[top])} by their full names, but imports {sorted(wrong)}"


def layer(module: str) -> int | None:
    """Return the height of a module of ours in its package; None for a module that is not there."""
    package, *rest = module.split(".")
    if rest and rest[0] in TOP[package]:
        return len(LAYERS[package])
    folder = rest[0] if rest and (ROOT / package / rest[0]).is_dir() else ""
    return LAYERS[package].index(folder)


def imported_modules(source: str) -> set[str]:
    """Full names of the modules of ours that Python source imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                is_module = (ROOT / (inside.replace(".", "/") + ".py")).exists() or (ROOT / inside.replace(".", "/")).is_dir()
                found.add(inside if is_module else node.module)
    return {name for name in found if name.partition(".")[0] in MAY_IMPORT}


def dotted(path: Path) -> str:
    return name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports_of_modules() -> dict[str, set[str]]:
    """The modules of ours that each module outside the tests imports."""
    return {dotted(path): imported_modules(path.read_text()) for path in FILES if not name_of(path).startswith("tests/")}


@pytest.mark.slow
def test_folders_import_from_below():
    wrong = []
    for path in FILES:
        module, package = dotted(path), path.relative_to(ROOT).parts[0]
        if package in LAYERS:
            above = {name for name in imported_modules(path.read_text()) if name.startswith(f"{package}.") and layer(name) > layer(module)}
            wrong += [f"{module} is below {name}" for name in sorted(above)]
    assert not wrong, f"the folders from the ground up are {LAYERS}"


@pytest.mark.slow
def test_no_module_imports_itself_in_a_circle():
    """Circles inside a folder, which the order of folders does not see."""
    graph = imports_of_modules()
    done, open_ = set(), []

    def visit(module: str) -> None:
        if module in open_:
            raise AssertionError(" -> ".join([*open_[open_.index(module):], module]))
        if module in graph and module not in done:
            open_.append(module)
            for other in graph[module]:
                visit(other)
            open_.pop()
            done.add(module)

    for module in graph:
        visit(module)


def test_synthesis_does_not_load_the_training_loop():
    graph, loaded, to_load = imports_of_modules(), set(), ["synth.pool.store", "synth.reporting.manifest"]
    while to_load:
        module = to_load.pop()
        to_load += graph.get(module, set()) - loaded
        loaded.add(module)
    assert len(loaded) > 10 and not [module for module in loaded if module.startswith("trainer.training")]


def docstring_mistakes(source: str) -> list[str]:
    """Return what is wrong with the docstrings of Python source, one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            first, *others = text.splitlines()
            place = f"{getattr(node, 'name', 'module')}, line {getattr(node, 'lineno', 1)}"
            if len(first) > 100:
                found.append(f"{place}: expected at most 100 characters in the first line, got {len(first)}")
            if not first.endswith((".", "?", ":")) or (others and others[0]):
                found.append(f"{place}: expected the first line to be a sentence of its own")
            word = re.sub(r"\W", "", first.split()[0]).lower()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and word in NO_VERBS:
                found.append(f"{place}: expected a verb first, got {word!r}")
            if re.search(r"(?:^|[.!?]\s)\s*(What|Which|The same)\b", text):
                found.append(f"{place}: a sentence starts with What, Which or The same")
    return found


@pytest.mark.slow
def test_docstrings_start_with_a_verb_and_its_object():
    packages = [path for path in FILES if not name_of(path).startswith("tests/")]
    assert not [f"{name_of(path)}: {mistake}" for path in packages for mistake in docstring_mistakes(path.read_text())]


def test_docstring_mistakes_are_seen():
    wrong = ['def f():\n    "The sum"', 'def f():\n    "What is read. "', f'"""{"x" * 101}."""', 'class C:\n    """One.\n    Two."""',
             '"""Sum it. Which is good."""', 'def f():\n    "The sum."']
    assert all(docstring_mistakes(source) for source in wrong)
    right = '"""Sum."""\nclass C:\n    """The settings."""\n    def f():\n        """Return the sum.\n\n        All."""'
    assert not docstring_mistakes(right)


@pytest.mark.slow
def test_tests_do_not_import_tests():
    for path in FILES:
        if name_of(path).startswith("tests/"):
            wrong = {name for name in imported_modules(path.read_text()) if name.rpartition(".")[2].startswith("test_")}
            assert not wrong, f"{name_of(path)} imports {sorted(wrong)}: put helpers into tests/helpers, fixtures into conftest.py"


def devices_without_index(source: str) -> list[int]:
    """Lines that make the device "cuda" of no index, which is a thread's own: another rank's GPU in threads of libraries."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "device"
            and len(node.args) == 1 and any(getattr(part, "value", None) == "cuda" for part in ast.walk(node.args[0]))]


def test_every_gpu_has_an_index():
    assert devices_without_index('torch.device("cuda" if on else "cpu")\ntorch.device("cuda", 1)\ntorch.device(kind)') == [1]
    found = {name_of(p): devices_without_index(p.read_text()) for p in FILES if not name_of(p).startswith("tests/")}
    assert not {name: lines for name, lines in found.items() if lines}


def test_kernels_stand_on_torch_alone():
    """transformers may import `kernels` while it is itself half imported, so nothing above torch is allowed there."""
    third_party = {name for path in FILES if "kernels" in path.relative_to(ROOT).parts[0] for name in imported(path.read_text())}
    assert third_party - set(sys.stdlib_module_names) <= {"kernels", "torch", "triton", "numpy", "flash_attn", "flash_attn_interface"}


@pytest.mark.slow
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
    for requirement in map(Requirement, REQUIRES + extras()["dev"]):
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
