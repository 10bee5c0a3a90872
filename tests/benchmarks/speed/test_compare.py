"""The gate between two commits: it finds a planted slowdown, lets noise pass, and leaves no trace of the other commit's checkout."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import run
from benchmarks.harness import record, show
from benchmarks.harness.synthetic_models import quiet
from benchmarks.harness.timing import Interval, Measurement
from benchmarks.speed import compare, compare_worker
from benchmarks.speed.chat_task import make_task
from trainer.errors import UserError

# A side whose steps take what its checkout's file says, with noise of 1%, each side's its own, the same whenever this runs.
WORKER = """
import json, random, sys
from pathlib import Path
root, folder, threads = sys.argv[1:]
facts = json.loads((Path(root) / "facts.json").read_text())
noise = random.Random(Path(folder).parent.name)  # the side's number
print("loaded", file=sys.stderr)
if facts.get("broken"):
    sys.exit("ImportError: broken on purpose")
print("{}", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    about = facts["cases"].get(request["case"])
    if about is None:
        answer = {"missing": "KeyError: not yet"}
    elif request["do"] == "make":
        answer = {"tokens": [about.get("tokens", 8)], "results": [about.get("loss", 2.0)]}
    else:
        cpu = request["steps"] * about["seconds"] * noise.uniform(0.99, 1.01)
        answer = {"cpu": cpu, "wall": cpu, "steps": request["steps"], "tokens": 8}
    print(json.dumps(answer), flush=True)
"""


class Repository:
    def __init__(self, folder: Path):
        self.folder = folder
        self.git("init", "-q")

    def git(self, *words: str) -> str:
        done = subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=self.folder, check=True,
                              capture_output=True, text=True)
        return done.stdout.strip()

    def write(self, **facts) -> None:
        (self.folder / "facts.json").write_text(json.dumps(facts))

    def commit(self, **facts) -> str:
        self.write(**facts)
        self.git("add", ".")
        self.git("commit", "-qm", "one")
        return self.git("rev-parse", "HEAD")


def cases(**seconds: float) -> dict:
    return {f"kernels: {name}": {"seconds": value} for name, value in seconds.items()}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "repository").mkdir()
    made = Repository(tmp_path / "repository")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(compare, "ROOT", made.folder)
    monkeypatch.setattr(compare, "WORKER", worker)
    monkeypatch.setattr(compare, "KERNELS", ("a", "b", "c"))
    return made


def gate(tmp_path, *words: str) -> int:
    return run.main(["--compare", *words, "--suite", "kernels", "--results", str(tmp_path / "results")])


def left(tmp_path) -> dict:
    return next(iter(record.newest(tmp_path / "results").values()))


def test_a_planted_slowdown_is_found(repository, tmp_path, capsys):
    """Two lines of three are as they were."""
    old = repository.commit(cases=cases(a=0.010, b=0.010, c=0.010))
    repository.commit(cases=cases(a=0.010, b=0.011, c=0.009))
    assert gate(tmp_path, old) == 1
    outcomes = {row["line"]: row["outcome"] for row in left(tmp_path)["summary"]}
    assert outcomes == {"kernels: a": "no change beyond noise", "kernels: b": "slower", "kernels: c": "faster"}
    ratio = left(tmp_path)["summary"][1]["ratio"]["other"]
    assert ratio["value"] == pytest.approx(1 / 1.1, rel=0.01) and ratio["low"] < ratio["value"] < ratio["high"] < 1
    told = capsys.readouterr().out
    assert f"speed, × {old[:8]}" in told and "| slower |" in told and "started 2 times" in told
    assert (tmp_path / "results" / "compare-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert len(repository.git("worktree", "list").splitlines()) == 1
    sides = {name.rpartition(": ")[2] for name in left(tmp_path)["raw"]}
    assert sides == {"this", "this (A/A)", "other", "other (A/A)"} and all(len(line) == 12 for line in left(tmp_path)["raw"].values())


def test_the_same_commit_has_not_changed(repository, tmp_path):
    commit = repository.commit(cases=cases(a=0.01, b=0.02, c=0.03))
    assert gate(tmp_path, "HEAD", "--rounds", "8") == 0
    made = left(tmp_path)
    assert (made["commit"], made["dirty"], made["conditions"]["other"]) == (commit, False, commit)
    assert all(row["outcome"] == "no change beyond noise" for row in made["summary"])


def test_changes_that_are_not_committed_are_measured_and_told(repository, tmp_path, capsys):
    old = repository.commit(cases=cases(a=0.01, b=0.02, c=0.03))
    repository.write(cases=cases(a=0.02, b=0.02, c=0.03))
    assert gate(tmp_path, f"{old[:10]}") == 1
    assert left(tmp_path)["dirty"] is True and f"{old[:8]} with changes" in capsys.readouterr().out


def test_what_only_one_side_has_is_left_out_with_the_reason(repository, tmp_path, capsys):
    there = cases(a=0.01, b=0.01)
    there["kernels: b"]["tokens"] = 9
    old = repository.commit(cases=there)
    repository.commit(cases=cases(a=0.01, b=0.01, c=0.01))
    assert gate(tmp_path, old) == 0
    assert [row["line"] for row in left(tmp_path)["summary"]] == ["kernels: a"]
    told = capsys.readouterr().out
    assert "Not measured: kernels: b (not the same work" in told and "kernels: c (other: KeyError: not yet)" in told


def test_results_that_differ_are_told(repository, tmp_path, capsys):
    there = cases(a=0.01, b=0.01, c=0.01)
    there["kernels: a"]["loss"] = 2.5
    old = repository.commit(cases=there)
    repository.commit(cases=cases(a=0.01, b=0.01, c=0.01))
    assert gate(tmp_path, old) == 0
    assert left(tmp_path)["agreement"] == {"kernels: a": 0.2, "kernels: b": 0.0, "kernels: c": 0.0}
    assert "| 2e-01 |" in capsys.readouterr().out


@pytest.mark.parametrize("words, complaint", [
    (["nosuch"], "expected a commit of this repository (a hash, branch or tag), got nosuch"),
    (["HEAD", "--rounds", "2"], "--rounds: expected at least 6, got 2"),
    (["HEAD", "--threads", "0"], "--threads: expected at least 1, got 0")])
def test_mistakes_are_one_line(repository, tmp_path, capsys, words, complaint):
    repository.commit(cases=cases(a=0.01))
    assert gate(tmp_path, *words) == 2
    told = capsys.readouterr().err
    assert complaint in told and len(told.splitlines()) == 1


def test_a_side_that_does_not_start_is_one_line(repository, tmp_path, capsys):
    old = repository.commit(cases=cases(a=0.01), broken=True)
    repository.commit(cases=cases(a=0.01))
    assert gate(tmp_path, old) == 2
    told = capsys.readouterr().err
    assert told == "benchmarks.run: --compare: the process of other ended early: ImportError: broken on purpose\n"
    assert len(repository.git("worktree", "list").splitlines()) == 1


def test_nothing_in_common_is_one_line(repository, tmp_path, capsys):
    old = repository.commit(cases={})
    repository.commit(cases=cases(a=0.01))
    assert gate(tmp_path, old) == 2
    assert "no case runs on both sides" in capsys.readouterr().err


def test_outside_a_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert gate(tmp_path, "HEAD") == 2
    assert "benchmarks.run: --compare: git rev-parse" in capsys.readouterr().err


def test_compare_is_a_suite():
    for words in (["--compare", "v1", "--rounds", "9"], ["--compare=v1", "--rounds", "9"], ["--rounds", "9", "--compare", "v1"]):
        assert run.as_suite(words) == ["compare", "v1", "--rounds", "9"]
    assert run.as_suite(["training"]) == ["training"] and run.as_suite(["--compare"]) == ["compare"]


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize("ratio, outcome", [
    ((0.90, 0.88, 0.92), "slower"), ((1.10, 1.08, 1.12), "faster"), ((0.90, 0.85, 1.01), "no change beyond noise"),
    ((0.97, 0.96, 0.98), "no change beyond noise"), ((1.03, 1.02, 1.04), "no change beyond noise")])
def test_a_change_is_beyond_both_the_interval_and_the_noise(ratio, outcome):
    quiet, noisy = Interval(1.0, 0.99, 1.01), Interval(0.99, 0.96, 1.0)
    assert compare.verdict(Interval(*ratio), [quiet, noisy]) == compare.verdict(Interval(*ratio), [noisy, quiet]) == outcome


@pytest.mark.slow
def test_false_alarms_are_rare_and_changes_of_a_tenth_are_found():
    """Sides of 12 rounds with noise of 3% between samples and 1% between processes."""
    rng, alarms, found = np.random.default_rng(0), 0, 0
    for _ in range(60):
        def side(speed):
            here = speed * rng.normal(1, 0.01)
            return [Measurement(cpu=1 / (here * rng.normal(1, 0.03)), wall=1.0, steps=1, tokens=1, supervised=0, padding=0, flops=0.0)
                    for _ in range(12)]

        for speed in (1.0, 0.9):
            samples = {"this": side(speed), "this (A/A)": side(speed), "other": side(1.0), "other (A/A)": side(1.0)}
            outcome = compare.row("case", samples, 0.0)["outcome"]
            alarms += speed == 1.0 and outcome != "no change beyond noise"
            found += speed == 0.9 and outcome == "slower"
    assert alarms <= 2 and found >= 54


def test_apart():
    assert compare.apart([1.0, 2.0], [1.0, 2.5]) == pytest.approx(0.2)
    assert compare.apart([1.0], [1.0, 2.0]) == compare.apart([float("nan")], [1.0]) == 1.0
    assert compare.apart([], []) == 0.0


# ---------------------------------------------------------------- a real side


@pytest.mark.slow
def test_every_kernel_case_runs_here_and_repeats(monkeypatch, tmp_path):
    monkeypatch.setattr(compare_worker, "TOKENS", 16)
    monkeypatch.setattr(compare_worker, "SHAPE", ("tiny", 64, 128, 4, 2, 16, 257, 2))
    one, two = compare_worker.Worker(tmp_path), compare_worker.Worker(tmp_path)
    for operation in compare.KERNELS:
        made, again = (worker.make(f"kernels: {operation}") for worker in (one, two))
        assert made == again and made["tokens"] == [16, 16] and np.isfinite(made["results"]).all() and any(made["results"])
        took = one.run(f"kernels: {operation}", 3)
        assert took["steps"] == 3 and took["tokens"] == 48 and took["wall"] > 0
    assert one.make("kernels: nothing")["missing"] == "KeyError: 'nothing'"


@pytest.mark.slow
def test_the_training_cases_run_in_a_process_of_their_own(tmp_path):
    quiet()
    (tmp_path / "setting").mkdir()
    make_task(tmp_path / "setting", count=40)
    roots = dict.fromkeys(("this", "other"), Path(compare.ROOT))
    with compare.started(roots, tmp_path / "setting", threads=1) as sides:
        present, left_out, differences = compare.prepared(sides, ["training: fp32", "kernels: nothing"])
        assert present == ["training: fp32"] and list(left_out) == ["kernels: nothing"] and differences == {"training: fp32": 0.0}
        took = sides["this"].ask(do="run", case="training: fp32", steps=1)
        assert took["tokens"] > 500 and took["cpu"] > 0
        processes = [side.process for side in sides.values()]
    assert all(process.poll() is not None for process in processes)


@pytest.mark.slow
def test_a_worker_refuses_the_code_of_another_checkout(tmp_path):
    done = subprocess.run([sys.executable, "-P", str(compare.WORKER), str(tmp_path), str(tmp_path), "1"], input="", text=True,
                          capture_output=True, env={"PYTHONPATH": str(compare.ROOT)})
    assert done.returncode == 1 and f"ImportError: expected the code of {tmp_path}" in done.stderr


def test_the_table_of_a_record(repository, tmp_path):
    old = repository.commit(cases=cases(a=0.01))
    assert gate(tmp_path, old) == 0
    table = show.markdown(left(tmp_path), compare.SUITE.views["compare"]).splitlines()
    assert table[0].startswith("| case | ") and "A/A" in table[0]
    assert re.match(r"\| kernels: a \| (10|9\.9\d|10\.1) \| [\d.]+ \| (1\.00|0\.99|1\.01) \(", table[2])


def test_arguments_of_the_suite():
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    assert vars(parser.parse_args(["v1"])) == {"rev": "v1", "cases": "all", "rounds": 12, "threads": 1}


def test_unknown_rev_names_git_s_reason(repository):
    repository.commit(cases={})
    with pytest.raises(UserError, match="got v9"):
        compare.commit_of("v9")
