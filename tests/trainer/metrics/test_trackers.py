"""Trackers: what each package is called with, and a package that is not installed. Stand-ins take the packages' places."""

import sys
from types import SimpleNamespace

import pytest

from trainer.config import Config, Logging
from trainer.errors import UserError
from trainer.metrics.log import Log

ROWS = [{"prompt": "a", "tuned": "b"}]
STEP = {"kind": "eval", "step": 3, "loss": 0.5, "tokens": 7}


class Calls:
    """A package that notes every call of its functions."""

    def __init__(self):
        self.made: list[tuple] = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.made.append((name, *args, *([kwargs] if kwargs else [])))
            return SimpleNamespace(log=self.log) if name == "init" else (name, kwargs or args)
        return call


def calls_of(monkeypatch, folder, package, **options) -> list[tuple]:
    calls = Calls()
    monkeypatch.setitem(sys.modules, package, calls)
    log = Log(folder, Config(logging=Logging(tensorboard=False, **options)), 1, 0, lambda: None)
    log.write(STEP)
    log.write_texts("answers", ROWS, 3)
    return calls.made


def test_weights_and_biases(monkeypatch, tmp_path):
    made = calls_of(monkeypatch, tmp_path, "wandb", wandb_project="p")
    assert made[0][:1] == ("init",) and made[0][1]["project"] == "p" and made[0][1]["config"]["method"] == "lora"
    assert made[1] == ("log", {"eval/loss": 0.5, "eval/tokens": 7}, {"step": 3})
    assert made[2:] == [("Table", {"columns": ["prompt", "tuned"], "data": [["a", "b"]]}),
                        ("log", {"answers": ("Table", {"columns": ["prompt", "tuned"], "data": [["a", "b"]]})}, {"step": 3})]


def test_trackio(monkeypatch, tmp_path):
    made = calls_of(monkeypatch, tmp_path, "trackio", trackio_project="p")
    assert made[0][1]["project"] == "p" and made[0][1]["name"] == tmp_path.name and made[0][1]["config"]["method"] == "lora"
    assert made[1] == ("log", {"eval/loss": 0.5, "eval/tokens": 7}, {"step": 3})
    assert made[2][1]["dataframe"].to_dict("records") == ROWS and made[3][0] == "log"


def test_mlflow(monkeypatch, tmp_path):
    made = calls_of(monkeypatch, tmp_path, "mlflow", mlflow_experiment="e")
    assert made[:2] == [("set_experiment", "e"), ("start_run", {"run_name": tmp_path.name})]
    assert made[2][1]["lora.rank"] == "16" and max(map(len, made[2][1].values())) <= 500
    assert made[3:] == [("log_metrics", {"eval/loss": 0.5, "eval/tokens": 7}, {"step": 3}),
                        ("log_table", {"prompt": ["a"], "tuned": ["b"]}, "answers.json")]


@pytest.mark.parametrize("option, package", [("wandb_project", "wandb"), ("trackio_project", "trackio"), ("mlflow_experiment", "mlflow")])
def test_a_package_that_is_not_installed_is_one_line(monkeypatch, tmp_path, option, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^logging.{option}: needs the package {package}, which is not installed; pip install {package}$"):
        Log(tmp_path, Config(logging=Logging(tensorboard=False, **{option: "p"})), 1, 0, lambda: None)
