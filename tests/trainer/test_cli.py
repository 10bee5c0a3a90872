"""Configuration from YAML and overrides; every mistake is one line that names the key."""

import functools
import math
import signal
import subprocess
import sys
import typing

import pytest
import yaml

from tests.helpers.processes import complete
from trainer import cli
from trainer.cli import known_keys, parse, save_yaml
from trainer.config import Config, Source
from trainer.config_rules import validate
from trainer.errors import UserError
from trainer.option_values import checked


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


LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(12))


@pytest.mark.parametrize(("text", "expected"), [
    (LAUGHS, "aliases"),
    ("a: &a [*a]\n", "alias of what it stands in"),
    ("[" * 1000, "brackets"),
    ("? [a, b]\n: 1\n", "line 1: expected the name of an option as key"),
    ("optim:\n  warmup_steps: 20:25\n", "line 2: 20:25 would be read as a number in base 60"),
    ("seed: 010\n", "line 1: 010 would be read as a number in base 8"),
    ("data: {train: [{path: x, max_records: 010}]}\n", "base 8"),
    pytest.param(f"data: {{train: [{{path: x, max_records: 1_{'9' * 5000}}}]}}\n", "line 1: expected a number below 2^63", id="digits"),
    pytest.param(f"seed: -0x{'9' * 5000}\n", "line 1: expected a number below 2^63", id="digits in base 16"),
    ("data:\n  train:\n", "data.train: expected"),
    ("data: {train: [null]}\n", "data.train: "),
    ("forgetting: {general: }\n", "forgetting.general: expected"),
    ("lora: {target_modules: }\n", "lora.target_modules: expected"),
    ("seed: 1\noutput:\n", "output: expected"),
    ("model: {path: \"a\\0b\"}\n", "model.path: expected text"),
])
def test_a_hostile_file_is_one_line_at_once(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        configured("--config", str(tmp_path / "run.yaml"))
    assert expected in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e308])
def test_every_number_is_finite(value):
    floats = [key for key, kind in known_keys(Config).items() if kind is float or float in typing.get_args(kind)]
    assert "lora.alpha" in floats and "epochs" in floats
    for option in floats:
        config, (*sections, name) = Config(), option.split(".")
        setattr(functools.reduce(getattr, sections, config), name, value)
        with pytest.raises(UserError, match=f"^{option}: expected"):
            checked(config)


@pytest.mark.parametrize("arguments", [
    ["--lora.alpha", ".inf"],
    ["--data.train", "[{path: x, weight: .inf}]"], ["--replay_search.ratios", "[0.1, .inf]"], ["--data.train", "[{path: x, weight: 010}]"],
    ["--data.train", "[{path: x, max_records: 100000000000000000000}]"], ["--optim.warmup_steps", "20:25"], ["--optim.lr=010"],
    ["--data.train", "~nosuchuser/x"], ["--output", "~nosuchuser/x"], ["--output", "x" * 300], ["--model.path", "x/" * 3000],
    ["--data.train", "[{path: '~nosuchuser/x'}]"], ["--data.train", "[x, '~nosuchuser/x']"],
    ["--model.tokenizer", ""], ["--lora.path", ""], ["--data.train", "\ud83d"], ["--output", "\ud83d"], ["--forgetting.regex", "\ud83d"],
    pytest.param(["--seed", "9" * 5000], id="digits"), pytest.param(["--optim.lr", "9" * 400], id="digits of a float"),
    pytest.param(["--data.train", f"[{{path: x, max_records: {'9' * 5000}}}]"], id="digits in a list"),
])
def test_a_value_that_no_system_takes_is_refused(arguments):
    with pytest.raises(UserError, match=f"^{arguments[0].partition('=')[0][2:]}"):
        configured(*arguments)


def test_the_home_folder_is_written_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = configured("--output=~/x", "--data.chat_template", "~/t.jinja", "--data.cache_dir", "~/c", "--logging.profile_steps", "20:25")
    assert (config.output, config.data.chat_template, config.data.cache_dir) == ("/home/me/x", "/home/me/t.jinja", "/home/me/c")
    assert config.logging.profile_steps == "20:25"  # text stays text


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
    ([*GOOD, "--optim.weight_decay", "1e30"], "optim.weight_decay: expected at most 1 / optim.lr"),
    ([*GOOD, "--batch.tokens_per_pack", "1000000000000000000"], "batch.tokens_per_pack: expected at most"),
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
    status, shown, errors = complete("trainer.run", [])
    assert status == 2 and shown == ""
    assert len(errors.splitlines()) <= 24 and "--model.path" in errors


@pytest.mark.slow
@pytest.mark.parametrize("command", ["trainer.run", "trainer.evaluate", "synth.run"])
def test_ctrl_c_during_the_imports_is_quiet(command):
    started = subprocess.Popen([sys.executable, "-v", "-m", command, "--help"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    shown = []
    for line in started.stderr:  # -v names each module as it is imported
        shown.append(line)
        if line.startswith("import 'trainer'" if "trainer" in command else "import 'synth'"):
            started.send_signal(signal.SIGINT)
            break
    shown += started.stderr.readlines()
    assert started.wait() == -signal.SIGINT and not any("KeyboardInterrupt" in line or "Traceback" in line for line in shown)


@pytest.mark.slow
def test_print_config_is_yaml():
    status, shown, _ = complete("trainer.run", ["--print_config"])
    assert status == 0 and yaml.safe_load(shown)["optim"]["lr"] == 2e-4


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_two():
    assert complete("trainer.run", ["--optim.lrr", "3"]) == (
        2, "", "trainer.run: error: unknown option optim.lrr: did you mean optim.lr?\n")


def test_a_file_of_empty_options_is_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text("seed:\n")
    with pytest.raises(UserError, match="^--config: expected options with values, found none; give values, or remove the options$"):
        parse(Config, ["--config", str(tmp_path / "c.yaml")], "trainer.run")


def test_the_middle_of_a_long_mistake_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer.run", "--dry_run", "a" * 9000])
    assert cli.main(None, Config, "trainer.run", "") == 2
    told = capsys.readouterr().err
    assert told.startswith("trainer.run: error: dry_run: expected bool, got aaa") and " ... aaa" in told and len(told) < 2100
