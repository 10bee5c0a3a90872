"""Configuration from YAML and overrides; every mistake is one line that names the key."""

import subprocess
import sys

import pytest
import yaml

from tests.helpers.processes import complete
from trainer.cli import known_keys, parse, save_yaml
from trainer.config import Config, Source, validate
from trainer.errors import UserError


def configured(*arguments) -> Config:
    return parse(Config, list(arguments), "trainer.run")


def test_overrides_beat_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  train: [{path: a.jsonl, columns: {prompt: question}}, b.jsonl]\noptim:\n  lr: 0.5\n")
    config = configured("--config", str(file), "--optim.lr", "1e-3", "--dry_run")
    assert config.optim.lr == 1e-3 and config.dry_run
    assert config == configured("--config", str(file), "--optim.lr=1e-3", "--dry-run")
    assert config.data.train == [Source(path="a.jsonl", columns={"prompt": "question"}), "b.jsonl"]


def test_option_names_may_have_dashes():
    config = configured("--max-steps", "3", "--data.max-length=7", "--output", "runs/a-b", "--replay.data", "[a-b]", "--compile")
    assert (config.max_steps, config.data.max_length, config.output, config.compile) == (3, 7, "runs/a-b", True)
    assert config.replay.data == ["a-b"]


def test_saved_configuration_reads_back_equal(tmp_path):
    config = configured("--data.train", '[{"path": "a", "weight": 2}]', "--lora.rank", "4")
    save_yaml(config, tmp_path / "config.yaml")
    assert configured("--config", str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--optim.lrr", "3"], "unknown option optim.lrr: did you mean optim.lr?"),
    (["--lr", "3"], "unknown option lr: did you mean optim.lr?"),
    (["--retention.kl", "3"], "unknown option retention.kl: did you mean one of retention.kl_weight, retention.kl_sources, "),
    (["--optim.lr", "fast"], "optim.lr: expected float, got fast"),
    (["--batch.tokens_per_pack", "1.5"], "batch.tokens_per_pack: expected int, got 1.5"),
    (["--method", "lorax"], "method: expected one of 'lora', 'qlora', 'full', got lorax"),
    (["--config", "absent.yaml"], "--config: cannot read "),
])
def test_a_wrong_option_is_named(arguments, expected):
    with pytest.raises(UserError) as raised:
        configured(*arguments)
    assert str(raised.value).startswith(expected) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "expected"), [
    ("optim:\n  lrr: 1\n", "did you mean optim.lr?"),
    ("optimm:\n  lr: 1\n", "did you mean optim.lr?"),
    ("data:\n  train: [{path: x, colums: {prompt: q}}]\n", "unknown key 'colums'"),
    ("optim: [1\n", "line "),
])
def test_a_wrong_file_is_explained_on_one_line(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        configured("--config", str(tmp_path / "run.yaml"))
    assert expected in str(raised.value)


GOOD = ["--model.path", "m", "--data.train", "t.jsonl"]


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--model.path", "m"], "data.train: expected at least one"),
    (["--data.train", "t"], "model.path, model.config: expected exactly one of them, got neither"),
    ([*GOOD, "--model.config", "c"], "got both"),
    (["--model.config", "c", "--data.train", "t"], "method: expected full beside model.config"),
    ([*GOOD, "--seed", "-1"], "seed: expected 0 <= seed < 2^63, got -1"),
    ([*GOOD, "--data.max_length", "8192"], "batch.tokens_per_pack: expected at least data.max_length = 8192"),
    ([*GOOD, "--batch.tokens_per_step", "5000"], "a multiple of batch.tokens_per_pack = 4096, got 5000"),
    ([*GOOD, "--replay.ratio", "1.0"], "replay.ratio: expected 0 <= ratio < 1, got 1.0"),
    ([*GOOD, "--optim.lr", "0"], "optim.lr: expected above 0, got 0"),
    ([*GOOD, "--optim.warmup_ratio", "1"],
     "optim.warmup_ratio: expected 0 <= ratio < 1; for a number of steps set optim.warmup_steps, got 1.0"),
    ([*GOOD, "--optim.decay_steps", "-1"], "optim.decay_steps: expected 1 or more, or 0 to use optim.decay_ratio, got -1"),
    ([*GOOD, "--eval.patience", "2"], "eval.patience: expected eval.every above 0"),
    (["--model.path", "m", "--data.train", "[{bad"], "data"),
])
def test_a_value_that_no_run_can_use_is_refused(arguments, expected):
    with pytest.raises(UserError, match="expected") as raised:
        validate(configured(*arguments))
    assert expected in str(raised.value)


def test_every_option_has_a_comment():
    import inspect

    from trainer import config

    lines = inspect.getsource(config).split("class Config")[1].splitlines()
    assert "optim.lr" in known_keys(Config) and len(known_keys(Config)) > 60
    assert sum("  # " in line for line in lines) >= 8


@pytest.mark.slow
def test_without_arguments_a_screen_of_usage():
    done = subprocess.run([sys.executable, "-m", "trainer.run"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) <= 24 and "--model.path" in done.stderr


@pytest.mark.slow
def test_print_config_is_yaml():
    status, shown, _ = complete("trainer.run", ["--print_config"])
    assert status == 0 and yaml.safe_load(shown)["optim"]["lr"] == 2e-4


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_two():
    assert complete("trainer.run", ["--optim.lrr", "3"]) == (
        2, "", "trainer.run: error: unknown option optim.lrr: did you mean optim.lr?\n")
