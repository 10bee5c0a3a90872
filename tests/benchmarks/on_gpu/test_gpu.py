"""`make gpu` without a GPU: its parts, their time, what it writes, and that it starts under a Python that has little."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu
from benchmarks.gpu import ASKED_FOR, CHECKS, ROOT, TOTAL, Check, Processes, finite, main, read_report, run_check, run_tests
from benchmarks.harness import record
from benchmarks.on_gpu import page as gpu_page

# The packages that `make gpu` needs of a GPU machine, which has theirs too and need have no others.
PRESENT = ("torch", "triton", "transformers", "peft", "accelerate", "pytest")
TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="needs a moon")
def test_far(): pass
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--results", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith("make gpu: expected a GPU that torch can use, found none (torch ") and done.stderr.count("\n") == 1


def test_its_parts_leave_time_for_the_last():
    assert sum(part.seconds for part in CHECKS[:-1]) <= TOTAL - 120 and TOTAL < 9 * 60 - 15


def test_make_takes_the_environment_or_python3_and_makes_none(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS")}

    def command(*words):
        command = ["make", "--no-print-directory", "-n", "gpu", *words]  # no word of the make that may run this
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment).stdout.split()

    assert command()[0] == '"python3"' and not (tmp_path / ".venv").exists()
    assert command("PYTHON=/opt/python")[0] == '"/opt/python"'
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert command()[0] == '".venv/bin/python"' and command("PYTHON=/opt/python")[0] == '"/opt/python"'
    assert command("ARGS=--parts tests")[1:] == ["-m", "benchmarks.gpu", "--parts", "tests"]


# ---------------------------------------------------------------- processes


@pytest.mark.slow
def test_a_process_and_its_children_end_when_their_time_is_over(tmp_path):
    code = ("import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
            "print(child.pid, flush=True); time.sleep(60)")
    begun = time.monotonic()
    assert Processes().run(["-c", code], 3, tmp_path / "log") is None
    assert time.monotonic() - begun < 20
    child = int((tmp_path / "log").read_text())
    for _ in range(50):  # whoever adopts it has yet to see it go
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")


def test_statuses_and_output_are_kept_and_nothing_starts_after_the_end(tmp_path):
    processes = Processes()
    assert processes.run(["-c", "print('said'); raise SystemExit(3)"], 60, tmp_path / "log") == 3
    assert (tmp_path / "log").read_text() == "said\n" and not processes.running
    processes.end_all()
    assert processes.run(["-c", "pass"], 60, tmp_path / "other") is None and not (tmp_path / "other").exists()


# ---------------------------------------------------------------- parts


@pytest.mark.slow
def test_test_files_report_counts_failures_and_reasons(tmp_path, monkeypatch):
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_one.py").write_text(TESTS)
    (tmp_path / "tests/kernels/test_two.py").write_text("def test_good(): pass\n")
    (tmp_path / "tests/kernels/test_three.py").write_text("import nothing_of_the_kind\n")
    (tmp_path / "tests/test_other.py").write_text("def test_bad(): assert False\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    found = run_tests(Processes(), 120, tmp_path)
    assert found["outcome"] == "failed: test_one.py, test_three.py" and len(found["files"]) == 3
    one = found["files"]["test_one.py"]
    assert (one["tests"], one["failures"], one["skipped"], one["status"]) == (3, 1, 1, 1)
    assert "one is not two" in one["failed"]["test_bad"] and one["skipped_because"] == {"needs a moon": 1}
    assert found["files"]["test_three.py"]["errors"] == 1
    assert found["files"]["test_two.py"]["status"] == 0


@pytest.mark.slow
def test_test_files_that_do_not_end_are_named(tmp_path, monkeypatch):
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_slow.py").write_text("import time\ndef test_slow(): time.sleep(60)\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert run_tests(Processes(), 3, tmp_path)["outcome"] == "out of time: test_slow.py"


def test_a_part_that_lacks_a_package_or_time_is_skipped_by_name(tmp_path):
    assert run_check(Check("compile", 9, ("nothing_of_the_kind",)), Processes(), 60, tmp_path) == {
        "outcome": "skipped: nothing_of_the_kind not installed"}
    assert run_check(CHECKS[0], Processes(), 5, tmp_path) == {"outcome": "skipped: no time left"}


def test_what_cannot_be_read_is_an_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_kernels", lambda *_: json.loads("{"))
    assert run_check(Check("kernels", 60), Processes(), 60, tmp_path)["outcome"].startswith("failed: JSONDecodeError")
    (tmp_path / "cut.xml").write_text("<testsuites><testsuite")
    with pytest.raises(gpu.ElementTree.ParseError):
        read_report(tmp_path / "cut.xml")


class Scripted(Processes):
    """Runs nothing: writes what a process would have left, and returns its status."""

    def __init__(self, status, left):
        super().__init__()
        self.status, self.left = status, left

    def run(self, words, seconds, log):
        log.write_text("its last words")
        if self.left is not None:
            Path(words[words.index("--out") + 1]).write_text(json.dumps(self.left))
        return self.status


@pytest.mark.parametrize(("status", "left", "outcome"), [
    (0, {"passed": True}, "passed"), (1, {"passed": False}, "failed: see the record"),
    (1, {"passed": False, "error": "failed: RuntimeError: no"}, "failed: failed: RuntimeError: no"), (None, None, "out of time"),
    (-11, None, "failed: see the record"), (-11, {"passed": True}, "failed: see the record")])
def test_outcomes_of_a_check(status, left, outcome, tmp_path):
    found = gpu.run_whole_step("compile", Scripted(status, left), 60, tmp_path)
    assert found["outcome"] == outcome and ("output" in found) == (outcome != "passed" and "error" not in found)
    assert found.get("output", "its last words") == "its last words"


def timed(**changes):
    return {"summary": [{"operation": "GLU", "model": "m", "contender": "Steadfast", "outcome": "timed"} | changes]}


@pytest.mark.parametrize(("status", "left", "outcome"), [
    (0, timed(), "passed"), (None, timed(), "out of time"), (None, None, "out of time"), (1, None, "failed"), (1, timed(), "failed: "),
    (0, timed(outcome="disagrees"), "failed: GLU, m: Steadfast disagrees"), (0, timed(contender="Liger", outcome="failed: x"), "passed")])
def test_outcomes_of_the_timings(status, left, outcome, tmp_path):
    found = gpu.run_kernels(Scripted(status, left), 60, tmp_path)
    assert found["outcome"] == outcome and found.get("record") == left


def test_figures_without_a_form_in_json_become_words():
    assert finite({"a": [1.0, float("nan"), {"b": float("-inf")}], "c": "x", "d": None}) == {"a": [1.0, "nan", {"b": "-inf"}], "c": "x",
                                                                                             "d": None}


# ---------------------------------------------------------------- the whole


def test_one_json_with_every_part_whatever_happens(tmp_path, monkeypatch, capsys):
    outcomes = iter([{"outcome": "passed", "loss": float("nan")}, {"outcome": "skipped: peft not installed"}, {"outcome": "out of time"}])
    seen = []

    def scripted(part, processes, seconds, folder):
        seen.append((part.name, seconds))
        if part.name == "throughput":
            raise KeyboardInterrupt
        return next(outcomes)

    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "run_check", scripted)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        main(["--results", str(tmp_path), "--total", "100"])
    path, = tmp_path.glob("*.json")
    parts = json.loads(path.read_text())["parts"]
    assert {name: part["outcome"] for name, part in parts.items()} == {
        "tests": "passed", "compile": "skipped: peft not installed", "capture": "out of time", "throughput": "interrupted",
        "kernels": "not begun"}
    assert [name for name, _ in seen] == ["tests", "compile", "capture", "throughput"]
    assert 99 < seen[0][1] <= 100 and seen[2][1] == 40
    said, page = capsys.readouterr().out, path.with_suffix(".html")
    assert f"record: {path}" in said and f"page: {page}" in said and "interrupted" in page.read_text()


@pytest.mark.parametrize(("outcome", "status"), [("passed", 0), ("skipped: x", 0), ("failed: x", 1), ("out of time", 1)])
def test_the_status_says_whether_all_is_well(outcome, status, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "run_check", lambda *_: {"outcome": outcome})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert main(["--results", str(tmp_path), "--parts", "tests", "kernels"]) == status
    made = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert made["parts"].keys() == {"tests", "kernels"} and made["suite"] == "gpu"
    assert made.keys() >= record.make("x", {}, {}, [], {}).keys()


# ---------------------------------------------------------------- a plain Python


def with_theirs(names: Iterable[str], found: set[str]) -> set[str]:
    """Add these distributions to `found`, and what they require."""
    for name in set(map(canonicalize_name, names)) - found:
        found.add(name)
        wanted = map(Requirement, metadata.requires(name) or [])
        with_theirs([r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})], found)
    return found


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory):
    """Runs this Python with PRESENT and what those require."""
    folder, site = tmp_path_factory.mktemp("plain"), Path(sysconfig.get_paths()["purelib"])
    present = with_theirs(PRESENT, set())
    entries = {file.parts[0] for own in metadata.distributions(path=[str(site)]) if canonicalize_name(own.name) in present
               for file in own.files or ()} - {"..", "__pycache__"}
    for entry in entries:
        (folder / entry).symlink_to(site / entry)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))} | {"PYTHONPATH": f"{folder}:{ROOT}"}

    def run(*words):
        return subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True, env=environment)

    assert run("-c", "import hypothesis").returncode == 1
    return run


STEP = """
import torch
import benchmarks.gpu, benchmarks.on_gpu.whole_step_sizes, benchmarks.speed.kernels
from benchmarks.on_gpu import whole_step
from benchmarks.harness.model_shapes import ModelShape
shape = ModelShape("tiny", 64, 112, 4, 2, 16, 257, 1)
from trainer.model.patch import patch
print(whole_step.throughput(torch.device("cpu"), torch.float32, shape, mean=20, rounds=2)["passed"])
"""


@pytest.mark.slow
def test_what_make_gpu_runs_starts_and_times_a_whole_step_under_a_plain_python(plain_python):
    done = plain_python("-c", STEP)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.slow
def test_without_matplotlib_there_is_a_record_and_a_line_about_the_page(plain_python, tmp_path):
    code = ("from benchmarks import gpu; from benchmarks.harness import record; from pathlib import Path; import sys; "
            "gpu.write(record.make('gpu', {}, {}, [], {}) | {'parts': {}}, Path(sys.argv[1]))")
    done = plain_python("-c", code, str(tmp_path))
    path, = tmp_path.iterdir()
    assert done.returncode == 0 and path.suffix == ".json"
    assert done.stderr == f"page: none (No module named 'matplotlib'); from the record: python -m benchmarks.on_gpu.page {path.name}\n"


@pytest.mark.slow
def test_kernels_tests_start_under_a_plain_python(plain_python):
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))]
    ran = plain_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "test_glu and (mistakes or gradcheck)")
    assert ran.returncode == 0 and "3 passed" in ran.stdout, ran.stdout + ran.stderr


def test_every_check_of_the_whole_step_is_a_part():
    pytest.importorskip("peft")
    from benchmarks.on_gpu import whole_step, whole_step_sizes

    assert {part.name for part in CHECKS + ASKED_FOR} == {"tests", "kernels", *whole_step.CHECKS, *whole_step_sizes.CHECKS}
    assert set(gpu.BY_CASES) == whole_step_sizes.CHECKS.keys()


def test_short_runs_of_one_commit_add_up(tmp_path, monkeypatch):
    state, outcomes = {"commit": "a" * 40, "dirty": False}, iter(["passed", "failed: x", "passed", "passed", "passed"])
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "run_check", lambda *_: {"outcome": next(outcomes)})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    real, clock = record.make, iter(range(10))
    monkeypatch.setattr(record, "make", lambda *given: real(*given) | state | {"time": f"2026-01-01T00:00:0{next(clock)}+00:00"})

    def parts(*names):
        main(["--results", str(tmp_path), "--parts", *names])
        made = record.newest(tmp_path)["gpu"]
        return {name: (part["outcome"], part.get("measured", made["time"])[17:19]) for name, part in made["parts"].items()}

    assert parts("tests", "kernels") == {"tests": ("passed", "00"), "kernels": ("failed: x", "00")}
    assert parts("kernels") == {"tests": ("passed", "00"), "kernels": ("passed", "01")}
    state["dirty"] = True
    assert parts("compile") == {"compile": ("passed", "02")}
    state.update(commit="b" * 40, dirty=False)
    assert parts("capture") == {"capture": ("passed", "03")}


@pytest.fixture
def clean_checkout(monkeypatch):
    """Of one commit, without a change; each record is a second later than the one before."""
    real, clock = record.make, iter(range(10))
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(record, "make", lambda *given: real(*given) | {
        "commit": "a" * 40, "dirty": False, "time": f"2026-01-01T00:00:0{next(clock)}+00:00"})


def case(name):
    return {"case": name, "contender": "Steadfast", "outcome": "timed"}


def test_sizes_go_on_where_an_earlier_run_was_ended(tmp_path, monkeypatch, clean_checkout):
    """The second run is given what the first one left; the third, after all cases are done, begins anew."""
    found_before = []

    def scripted(part, processes, seconds, folder):
        left = folder / "sizes.json"
        rows = json.loads(left.read_text())["rows"] if left.exists() else []
        found_before.append([row["case"] for row in rows])
        rows.append(case("ab"[len(rows)]))
        return {"outcome": "passed", "rows": rows, "not_reached": ["b"] if len(rows) == 1 else []}

    monkeypatch.setattr(gpu, "run_check", scripted)
    for _ in range(3):
        assert main(["--results", str(tmp_path), "--parts", "sizes"]) == 0
    assert found_before == [[], ["a"], []]


def test_a_case_by_case_part_that_is_interrupted_or_cannot_begin_keeps_its_cases(tmp_path, monkeypatch, clean_checkout):
    def interrupted(part, processes, seconds, folder):
        (folder / "sizes.json").write_text(json.dumps({"rows": [case("a")], "not_reached": ["b"]}))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--results", str(tmp_path), "--parts", "sizes"])
    found = record.newest(tmp_path)["gpu"]["parts"]["sizes"]
    assert found["outcome"] == "interrupted" and found["rows"] == [case("a")]
    monkeypatch.setattr(gpu, "run_check", lambda *_: {"outcome": "skipped: no time left"})
    main(["--results", str(tmp_path), "--parts", "sizes"])
    found = record.newest(tmp_path)["gpu"]["parts"]["sizes"]
    assert found["outcome"] == "skipped: no time left" and found["rows"] == [case("a")] and found["not_reached"] == ["b"]


def test_a_part_by_cases_that_is_ended_keeps_what_it_measured(tmp_path):
    left = {"rows": [case("a")], "not_reached": ["b"], "passed": True}
    found = gpu.run_whole_step("sizes", Scripted(None, left), 60, tmp_path)
    assert found["outcome"] == "out of time" and found["rows"] == left["rows"]


def test_a_page_that_cannot_be_made_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_page, "write", lambda *_: 1 / 0)
    path = gpu.write(record.make("gpu", {}, {}, [], {}) | {"parts": {}}, tmp_path)
    assert path.exists() and capsys.readouterr().err.startswith("page: none (division by zero); ")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["trainer.run", "synth.run"])
def test_a_command_that_lacks_packages_names_them_and_how_to_get_them(plain_python, command):
    done = plain_python("-m", command, "--help")
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("steadfast: error: expected the packages datasets, pyarrow, jsonargparse, matplotlib, tensorboard, "
                                  "xxhash, found none of them in this Python; get them with: ")
    assert done.stderr.endswith("-m pip install 'datasets>=5.0,<6' 'pyarrow>=21.0' 'jsonargparse>=4.40' 'matplotlib>=3.10' "
                                "'tensorboard>=2.20' 'xxhash>=3.5'\n")
