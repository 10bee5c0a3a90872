"""Records: complete, whole or absent, and honest about the code they were made with."""

import json
import subprocess

import pytest

from benchmarks.harness import record
from trainer.errors import UserError


def made(suite="training-cpu", time="2026-11-21T10:00:00+00:00", commit="0123456789abcdef"):
    kept = record.make(suite, {"chats": 5}, {"a / b": 1e-6}, [{"line": "x"}], {"x": [{"cpu": 1.0}]})
    return kept | {"time": time, "commit": commit}


def test_says_everything_about_the_run():
    kept = made()
    assert {"suite", "time", "commit", "dirty", "command", "device", "cpu", "threads", "versions", "conditions", "summary"} <= set(kept)
    assert kept["threads"] == 1 and kept["versions"]["torch"].startswith("2.") and kept["raw"] == {"x": [{"cpu": 1.0}]}
    assert kept["command"].startswith("python -m benchmarks.run")


def test_write_and_newest(tmp_path):
    old, new, other = made(), made(time="2026-11-22T09:00:00+00:00"), made(suite="kernels")
    for kept in (new, old, other):
        path = record.write(kept, tmp_path / "results")
        assert json.loads(path.read_text()) == kept
    assert path.name == "kernels-20261121T100000-01234567.json"
    assert record.newest(tmp_path / "results") == {"training-cpu": new, "kernels": other}


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path):
    for broken in (made() | {"summary": float("nan")}, made() | {"summary": object()}):
        with pytest.raises((ValueError, TypeError)):
            record.write(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="results: cannot write"):
        record.write(made(), tmp_path / "file" / "results")


def test_commit_and_dirty_flag(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    clean = record.code(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    assert record.code(tmp_path) == clean  # results are no code
    (tmp_path / "code.py").write_text("2")
    assert record.code(tmp_path) == clean | {"dirty": True}


def test_outside_a_repository(tmp_path):
    assert record.code(tmp_path) == {"commit": None, "dirty": None}


def test_the_command_leaves_out_places_on_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run", "training", "--results", "/tmp/a b", "--rounds", "3", "--keep=here", "--data", "x y.jsonl"])
    assert record.command() == "python -m benchmarks.run training --rounds 3"
    kept = made() | {"command": "python -m benchmarks.run gsm8k --data '../a b' --max_steps 3", "dirty": False}
    assert record.origin(kept).startswith("`python -m benchmarks.run gsm8k --max_steps 3`, 2026-11-21, commit ")
