"""What users get wrong: each mistake is one line that says what was expected, what was found, where, and what to do."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers import tiny
from tests.helpers.adapters import save_random_adapter
from trainer import cli
from trainer.cli import parse
from trainer.config import Config, Data, Lora, Model, Source
from trainer.config_rules import validate
from trainer.data.chat_template import ChatTemplate
from trainer.data.prepare import prepare_data
from trainer.data.sources import load_sources
from trainer.errors import UserError
from trainer.model.loading import load_model
from trainer.model.locate import load_tokenizer
from trainer.model.lora import add_adapter
from trainer.optim.adamw import FlatAdamW
from trainer.runtime import checkpoint

CHAT = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "It is 7."}]


def refused(call, *args) -> str:
    """The message of the UserError that `call` raises, as it is printed: on one line."""
    with pytest.raises(UserError) as raised:
        call(*args)
    return " ".join(str(raised.value).split())


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("name, contents, expected", [
    ("deep.jsonl", "[" * 100_000, "deep.jsonl, line 1: expected one JSON object, found JSON that cannot be read: maximum recursion depth"),
    ("deep.json", "[" * 100_000, "deep.json, line 1: expected one JSON object, found JSON that cannot be read: maximum recursion depth"),
    ("digits.jsonl", '{"text": "x"}\n{"text": ' + "9" * 5000 + "}", "digits.jsonl, line 2: .* Exceeds the limit .* digits"),
    ("twice.csv", "prompt,completion,prompt\na,b,c\n",
     "twice.csv, line 1: expected columns of different names, found 'prompt' more than once; rename one"),
    ("half.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "cut: \\ud83d"}',
     r"half.jsonl, line 2: expected Unicode text, found '\\ud83d', half of a surrogate pair; complete or remove the record"),
    ("extra.jsonl", json.dumps({"messages": [CHAT[0] | {"name": "\ud800"}, CHAT[1]]}), "extra.jsonl, line 1: expected Unicode text"),
])
def test_a_file_that_cannot_be_read_names_the_line(tmp_path, name, contents, expected):
    (tmp_path / name).write_text(contents)
    assert re.search(expected, refused(load_sources, str(tmp_path / name), "domain", str(tmp_path / "cache")))


def test_whole_surrogate_pairs_are_characters(tmp_path):
    (tmp_path / "emoji.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    (_, records), = load_sources(str(tmp_path / "emoji.jsonl"), "domain", str(tmp_path / "cache"))
    assert records["text"][0] == "\U0001f600"


# ---------------------------------------------------------------- chat templates


@pytest.mark.parametrize("template, expected", [
    ("\n{% for m in messages %}{{ m.content }", "chat template of T, line 2: expected Jinja, found an error: unexpected '}'; correct it"),
    ("{{ messages | sorted }}", "chat template of T, line 1: expected Jinja, found an error: No filter named 'sorted'"),
    ("{{ messages[0].a.b }}", r"chat template of T refuses turn 1 \(user\): .*attribute 'a'; correct the chat, or set data.chat_template"),
])
def test_a_template_that_is_wrong_says_where(tokenizer, template, expected):
    assert re.match(expected, refused(ChatTemplate(tokenizer, template, "T").encode_chats, [CHAT]))


@pytest.mark.parametrize("contents, expected", [
    (b"", "data.chat_template: expected a Jinja template, found nothing in .*; remove the option to use the tokenizer's own"),
    (b"\xff\xfe", "data.chat_template: expected a text file in UTF-8, cannot read .*invalid start byte"),
    (b"{% if %}", "line 1: chat template of .*t.jinja, line 1: expected Jinja, found an error"),
])
def test_a_template_file_that_cannot_serve(tokenizer, tmp_path, contents, expected):
    (tmp_path / "t.jinja").write_bytes(contents)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}))
    data = Data(train=str(tmp_path / "chats.jsonl"), chat_template=str(tmp_path / "t.jinja"), cache_dir=str(tmp_path / "cache"))
    assert re.search(expected, refused(prepare_data, Config(data=data), tokenizer))


def test_a_cache_that_is_no_folder(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    config = Config(data=Data(train="x.jsonl", cache_dir=str(tmp_path / "file")))
    assert refused(prepare_data, config, tokenizer).startswith(f"data.cache_dir: cannot make the folder {tmp_path / 'file'}: File exists")


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("text, expected", [
    ("epochs: 1\noptim:\n  lr: 1\nepochs: 2", "run.yaml, line 4: epochs was given before, on line 1; keep one of them"),
    ("optim:\n  lr: 1\n  lr: 2", "run.yaml, line 3: lr was given before, on line 2"),
    ("data:\n  train:\n  - path: a\n    path: b", "run.yaml, line 4: path was given before, on line 3"),
    ("- a", "expected keys and values in .*run.yaml, found a list; --print_config"),
    ("a", "expected keys and values in .*run.yaml, found a lone value"),
    ("", "expected keys and values in .*run.yaml, found nothing"),
    ("a: [1\nb: }", "run.yaml, line 2: expected YAML: expected ',' or ']', but got ':'"),
    ("optim: null", "optim: expected a section of options, such as optim.lr, got None"),
    ("optim: 3", "optim: expected a section of options, such as optim.lr, got 3"),
    ("data:\n  train:\n  - weight: 1", "data.train: expected path in every source of the list, found one without"),
    ("data:\n  train:\n  - path: a\n    format: x", "data.train: format of a source: expected one of 'auto', 'chat', .* got x$"),
])
def test_a_configuration_file_that_is_wrong_says_where(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    assert re.search(expected, refused(parse, Config, ["--config", str(tmp_path / "run.yaml")], "run"))


def test_a_configuration_file_that_is_no_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"output: caf\xe9")
    assert "expected UTF-8 text" in refused(parse, Config, [f"--config={tmp_path / 'run.yaml'}"], "run")
    assert "cannot read" in refused(parse, Config, ["--config", str(tmp_path)], "run")


def test_the_configuration_that_a_run_leaves_can_be_given_back(tmp_path):
    config = parse(Config, ["--optim.lr", "0.5", "--data.train", "a.jsonl"], "run")
    cli.save_yaml(config, tmp_path / "config.yaml", versions={"torch": "2"}, command="python -m trainer.run")
    assert parse(Config, ["--config", str(tmp_path / "config.yaml")], "run") == config


@pytest.mark.parametrize("given, expected", [
    (["--max_steps", "2.5"], "max_steps: expected int or null, got 2.5"),
    (["--replay.ratio", "nan"], "replay.ratio: expected float or null, got nan"),
    (["--optim", "null"], "optim: expected its options one by one, as in --optim.lr"),
    (["--device", "tpu"], "device: expected one of 'auto', 'cuda', 'cpu', got tpu"),
])
def test_a_value_of_the_wrong_type(given, expected):
    assert refused(parse, Config, given, "run").startswith(expected)


@pytest.mark.parametrize("option, value", [
    ("optim.beta1", "1"), ("optim.beta2", "-0.1"), ("optim.eps", "0"), ("optim.weight_decay", "-1"), ("optim.min_lr_ratio", "5"),
    ("optim.max_grad_norm", "-1"), ("seed", str(2**64)), ("data.num_proc", "-1"), ("checkpoint.every", "-1"), ("eval.every", "-1"),
    ("eval.patience", "-1"), ("epochs", "1e9"), ("output", ""),
])
def test_a_number_that_no_run_can_use_names_the_option(option, value):
    arguments = ["--model.path", "m", "--data.train", "f", f"--{option}", value]
    message = refused(lambda: validate(parse(Config, arguments, "run")))
    assert option in message.partition(": expected")[0]


@pytest.mark.parametrize("source, expected", [
    (Source("f", max_records=0), "data.train: max_records of f: expected 1 or more"),
    (Source("f", max_records=-3), "data.train: max_records of f: expected 1 or more"),
    (Source("f", weight=1e12), "data.train: weight of f: expected above 0, at most"),
    (Source("f", weight=float("nan")), "data.train: weight of f"),
])
def test_a_source_that_no_run_can_use(source, expected):
    assert expected in refused(validate, Config(model=Model(path="m"), data=Data(train=[source])))


# ---------------------------------------------------------------- models and adapters


@pytest.fixture
def model_copy(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def edit(folder, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


@pytest.mark.parametrize("changes, expected", [
    ({"intermediate_size": 32}, r"6 weights in .* do not fit its config.json: expected \(64, 32\) for model.layers.0.mlp.down_proj.weight, "
                                r"found \(64, 112\)"),
    ({"hidden_size": "big"}, "cannot load .*hidden_size"),
    ({"model_type": "zork"}, "cannot load .*zork"),
    ({"num_hidden_layers": 2**31}, "expected at most 10,000 layers in the config of .*, got num_hidden_layers 2147483648"),
    ({"model_type": "vit"}, "cannot load .*AutoModelForCausalLM.$"),
])
def test_a_model_that_its_config_does_not_describe_is_one_line_and_nothing_else(model_copy, changes, expected, capfd):
    edit(model_copy, **changes)
    assert re.search(expected, refused(load_model, Config(model=Model(path=str(model_copy))), "cpu"))
    assert "[transformers]" not in capfd.readouterr().err


def test_a_config_that_is_no_object(model_copy):
    (model_copy / "config.json").write_text("[]")
    assert "cannot load" in refused(load_model, Config(model=Model(path=str(model_copy))), "cpu")


def test_settings_of_a_tokenizer_are_no_tokenizer(model_copy):
    (model_copy / "tokenizer.json").unlink()
    assert "no tokenizer in" in refused(load_tokenizer, Model(path=str(model_copy)))


def test_a_tokenizer_whose_longest_text_is_no_number(model_copy):
    settings = model_copy / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": "long"}))
    assert "expected a number as model_max_length in the tokenizer_config.json" in refused(load_tokenizer, Model(path=str(model_copy)))


def test_an_adapter_of_a_kind_that_nobody_knows(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ZORK"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "does not fit this model: 'ZORK'" in refused(add_adapter, tiny.model("llama"), Lora(path=str(tmp_path)))


@pytest.mark.parametrize("changes", [{"target_modules": [1.5]}, {"alpha_pattern": []}, {"target_modules": [None]}, {"rank_pattern": ["q"]}])
def test_an_adapter_whose_settings_have_other_types(model_copy, tmp_path, changes):
    adapter = save_random_adapter(model_copy, tmp_path / "adapter", rank=2, spread=0.1)
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changes))
    assert "adapter_config.json has values of types that PEFT does not expect" in refused(
        add_adapter, tiny.model("llama"), Lora(path=str(adapter)))


# ---------------------------------------------------------------- disks and signals


def test_a_disk_that_fills_up_under_safetensors_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """The writer of safetensors has its own exception for the system's errors."""
    model = tiny.model("llama")
    optimizer = FlatAdamW(model.parameters(), Config().optim)
    for gradient in optimizer.gradients:
        gradient.normal_()
    optimizer.step(1e-3)
    kept = checkpoint.save(tmp_path, checkpoint.State(step=1, best_eval_loss=None, evals_since_best=0, identity={}), optimizer, keep=2)
    before = (kept / "state.safetensors").read_bytes()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    state = checkpoint.State(step=2, best_eval_loss=None, evals_since_best=0, identity={})
    message = refused(checkpoint.save, tmp_path, state, optimizer, 2)
    assert "the disk is full" in message and f"the last checkpoint, {kept}, is whole" in message
    assert [path.name for path in tmp_path.iterdir()] == [kept.name] and (kept / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize("file, harm", [
    ("state.safetensors", lambda b: b[: len(b) // 2]), ("state.json", lambda b: b[:9]), ("state.json", lambda b: b'{"was": 1}'),
])
def test_a_damaged_checkpoint_is_named(tmp_path, file, harm):
    optimizer = FlatAdamW(tiny.model("llama").parameters(), Config().optim)
    optimizer.step(1e-3)
    saved = checkpoint.save(tmp_path, checkpoint.State(step=1, best_eval_loss=None, evals_since_best=0, identity={}), optimizer, keep=2)
    (saved / file).write_bytes(harm((saved / file).read_bytes()))
    message = refused(checkpoint.load, saved, {}, optimizer)
    assert message.startswith(f"resume: cannot read the checkpoint {saved}: ")
    assert message.endswith("there is none before it: remove it to start again")


@pytest.mark.parametrize("error, status, expected", [
    (OSError(errno.ENOSPC, "No space left on device"), 1, "prog: error: output: No space left on device; free space"),
    (OSError(errno.EROFS, "Read-only file system", "runs/a"), 1, "prog: error: runs/a: Read-only file system; free space"),
    (KeyboardInterrupt(), 128 + signal.SIGINT, "prog: error: interrupted"),
])
def test_what_the_machine_refuses_is_one_line_too(error, status, expected, monkeypatch, capsys):
    def run(config):
        raise error

    monkeypatch.setattr("sys.argv", ["prog", "--seed", "1"])
    assert cli.main(run, Config, "prog", "usage") == status
    shown = capsys.readouterr().err
    assert shown.startswith(expected) and shown.count("\n") == 1


@pytest.mark.slow
def test_a_full_standard_output_is_one_line_and_a_closed_one_is_none():
    command = [sys.executable, "-m", "trainer.interpolate", "--print_config"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    line = "trainer.interpolate: error: standard output: No space left on device; free space, or choose another folder\n"
    assert (done.returncode, done.stderr) == (1, line)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("error, expected", [
    (FileNotFoundError(errno.ENOENT, "gone", "x"), "prog: error: a fault of Steadfast, not of yours: FileNotFoundError: "),
    (KeyError("\ud83d\nTraceback"), "prog: error: a fault of Steadfast, not of yours: KeyError: "),
    (MemoryError(), "prog: error: out of memory; "),
    (RuntimeError("CUDA out of memory. Tried to take 2 GiB"), "prog: error: out of memory: CUDA out of memory. Tried to take 2 GiB; "),
])
def test_an_error_that_nobody_foresaw_is_one_line_with_a_file_to_send(error, expected, monkeypatch, capsys, tmp_path):
    def run(config):
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["prog", "--seed", "1"])
    assert cli.main(run, Config, "prog", "usage") == 1
    shown = capsys.readouterr().err
    assert shown.startswith(expected) and shown.count("\n") == 1
    if sent := re.search(r"please send (\S+); --traceback prints it", shown):
        kept = (tmp_path / sent[1]).read_text()
        assert kept.startswith("command: prog --seed 1\nversions: python 3.") and "Traceback (most recent call last)" in kept
    assert ("fault" in shown) == bool(sent)
    monkeypatch.setattr("sys.argv", ["prog", "--seed", "1", "--traceback"])
    with pytest.raises(type(error)):
        cli.main(run, Config, "prog", "usage")
