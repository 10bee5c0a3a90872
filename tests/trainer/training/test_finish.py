"""Nothing that was trained is lost at the end of a run, whatever fails there."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from tests.helpers import tiny
from tests.helpers.runs import arguments, records, weights
from trainer.cli import parse
from trainer.config import Config, Model
from trainer.data.prepare import prepare_data
from trainer.errors import UserError
from trainer.evaluation import config as evaluation
from trainer.evaluation.models import find_models
from trainer.files import atomic_folder
from trainer.interpolate import Interpolate, interpolate
from trainer.model.export import merge_and_save
from trainer.model.loading import load_model
from trainer.model.locate import load_tokenizer
from trainer.run import train
from trainer.runtime import checkpoint
from trainer.training import export_trial, loop, run_folder

SHORT = ("--max_steps", "2", "--lora.rank", "2")


def run(*args):
    return train(parse(Config, arguments(*args), "trainer.run"))


def refused(*args) -> str:
    with pytest.raises(UserError) as raised:
        run(*args)
    assert "\n" not in str(raised.value).strip()
    return str(raised.value)


def fails(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def signals(number: int):
    def send(*args, **kwargs):
        os.kill(os.getpid(), number)

    return send


@pytest.fixture(scope="module")
def whole(model_folder, chats, tmp_path_factory):
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    run(model_folder, chats, folder, *SHORT)
    return folder


def goes_on(model_folder, chats, folder: Path, whole: Path, monkeypatch) -> None:
    """Resume a run whose export failed, which must train nothing and export what an undisturbed run does."""
    ended = records(folder, "end")
    monkeypatch.setattr(loop, "train_step", fails(AssertionError("a step was trained again")))
    result = run(model_folder, chats, folder, *SHORT, "--resume", "auto")
    assert result.status == 0 and result.reason == "max_steps" and records(folder, "end") == ended
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in weights(whole).items())
    assert not (folder / "checkpoints").exists()


@pytest.mark.slow
def test_a_whole_export_leaves_no_checkpoint(whole):
    assert (whole / "adapter").is_dir() and not (whole / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("error", [
    ValueError("GenerationConfig is invalid"), OSError(28, "No space left on device")], ids=lambda error: type(error).__name__)
def test_an_error_while_exporting_leaves_what_was_trained(model_folder, chats, tmp_path, monkeypatch, whole, error):
    def writes(*args):
        with atomic_folder(tmp_path / "run" / "adapter"):
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "save_adapter", writes)
        message = refused(model_folder, chats, tmp_path / "run", *SHORT)
    kept = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert f"what was trained is in {kept}" in message and "--resume auto goes straight to the export" in message
    goes_on(model_folder, chats, tmp_path / "run", whole, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_exporting_leaves_what_was_trained(model_folder, chats, tmp_path, monkeypatch, capsys, whole, number):
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "save_adapter", signals(number))
        result = run(model_folder, chats, tmp_path / "run", *SHORT)
    assert result.status == 128 + number
    said = capsys.readouterr().err
    assert f"stopped by signal {number} before the export was whole; what was trained is in " in said and "--resume auto" in said
    goes_on(model_folder, chats, tmp_path / "run", whole, monkeypatch)


@pytest.mark.slow
def test_a_signal_in_the_last_step_stops_before_the_export(model_folder, chats, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patched:
        patched.setattr(loop, "log_end", signals(signal.SIGTERM))
        assert run(model_folder, chats, tmp_path / "run", *SHORT).status == 143
    assert not (tmp_path / "run" / "adapter").exists()
    goes_on(model_folder, chats, tmp_path / "run", whole, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_checkpoint_before_the_export_holds_the_weights_alone(model_folder, chats, tmp_path, monkeypatch, method):
    options = (*SHORT, "--method", method, "--precision", "bf16")
    with monkeypatch.context() as patched:
        for name in ("save_adapter", "merge_and_save"):
            patched.setattr(run_folder, name, fails(ValueError("no")))
        refused(model_folder, chats, tmp_path / "run", *options)
    size = (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.safetensors").stat().st_size
    run(model_folder, chats, tmp_path / "run", *options, "--resume", "auto")
    file = tmp_path / "run" / ("adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors")
    assert size == pytest.approx(file.stat().st_size, rel=0.1)
    run(model_folder, chats, tmp_path / "other", *options)
    assert (tmp_path / "other" / file.relative_to(tmp_path / "run")).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_checkpoints_that_were_asked_for_stay(model_folder, chats, tmp_path):
    run(model_folder, chats, tmp_path / "run", "--max_steps", "3", "--checkpoint.every", "1")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002", "step-00000003"]
    run(model_folder, chats, tmp_path / "other", "--max_steps", "3", "--checkpoint.every", "2")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "other" / "checkpoints")] == ["step-00000002"]


@pytest.mark.slow
def test_without_space_for_the_checkpoint_the_export_is_tried(model_folder, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "save_file", fails(OSError(28, "No space left on device")))
    assert run(model_folder, chats, tmp_path / "run", *SHORT).status == 0
    assert "the disk is full" in capsys.readouterr().err and weights(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("method, fault", [("full", "evaluate"), ("lora", "evaluate"), ("lora", "train_step")])
def test_an_error_in_training_leaves_the_last_whole_step(model_folder, chats, tmp_path, monkeypatch, capsys, method, fault):
    """An evaluation after the last step, or a step in the middle, that fails as the libraries or the device do."""
    options = ("--max_steps", "4", "--data.eval_fraction", "0.1", "--method", method)
    run(model_folder, chats, tmp_path / "whole", *options)
    original = getattr(loop, fault)

    def breaks(run, state_or_work, *args):
        if state_or_work.step == (4 if fault == "evaluate" else 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(run, state_or_work, *args)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(loop, fault, breaks)
        run(model_folder, chats, tmp_path / "run", *options)
    step = 4 if fault == "evaluate" else 2
    assert f"step {step} is saved in {tmp_path}/run/checkpoints/step-0000000{step}" in capsys.readouterr().err
    run(model_folder, chats, tmp_path / "run", *options, "--resume", "auto")
    name = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_weights_that_are_no_good_are_not_saved_as_a_checkpoint(model_folder, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.training.validation.eval_loss", lambda *args: (float("nan"), 1))
    assert "expected a finite eval loss" in refused(model_folder, chats, tmp_path / "run", *SHORT, "--data.eval_fraction", "0.1")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------- found before the first step


@pytest.fixture
def sampling_base(model_folder, tmp_path):
    """A base whose settings of generation transformers would not save."""
    folder = shutil.copytree(model_folder, tmp_path / "base")
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9}')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--method", "full"), ("--export.format", "merged")])
def test_settings_of_generation_are_copied_as_they_stand(sampling_base, chats, tmp_path, options):
    run(sampling_base, chats, tmp_path / "run", *SHORT, *options)
    assert (tmp_path / "run" / "model" / "generation_config.json").read_bytes() == (sampling_base / "generation_config.json").read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.slow
def test_settings_of_generation_in_an_old_config_are_written(model_folder, chats, tmp_path):
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "generation_config.json").unlink()
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"temperature": 0.6}))
    run(base, chats, tmp_path / "run", *SHORT, "--method", "full")
    assert json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.slow
@pytest.mark.parametrize("dry", [True, False])
def test_what_the_export_could_not_do_is_refused_before_training(model_folder, chats, tmp_path, monkeypatch, dry):
    options = ("--dry_run",) if dry else ()
    monkeypatch.setattr(loop, "train_step", fails(AssertionError("a step was trained")))
    not_utf8 = tmp_path / os.fsdecode(b"run-\xff")
    assert "output: expected one line of printable text in UTF-8" in refused(model_folder, chats, not_utf8, *options)
    with monkeypatch.context() as patched:
        patched.setattr(export_trial.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        assert "GB of space for the export" in refused(model_folder, chats, tmp_path / "a", *options)
    with monkeypatch.context() as patched:
        patched.setattr("trainer.model.export.save_generation_config", fails(ValueError("GenerationConfig\nis invalid")))
        message = refused(model_folder, chats, tmp_path / "b", *options, "--export.format", "both")
        assert message.startswith("export: the settings or tokenizer of ") and "ValueError: GenerationConfig is invalid" in message
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the chat template

MINE = ("{% for m in messages %}<|im_start|>[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>[assistant] {% endif %}")


@pytest.mark.slow
@pytest.mark.parametrize("base_has_one", [True, False])
def test_exports_render_a_chat_token_for_token_as_it_was_trained(model_folder, chats, tmp_path, base_has_one):
    base = shutil.copytree(model_folder, tmp_path / "base")
    if not base_has_one:
        (base / "chat_template.jinja").unlink()
    (tmp_path / "mine.jinja").write_text(MINE)
    options = arguments(base, chats, tmp_path / "run", *SHORT, "--data.chat_template", str(tmp_path / "mine.jinja"),
                        "--export.format", "both")
    config = parse(Config, options, "trainer.run")
    train(config)
    interpolate(Interpolate(str(tmp_path / "half"), Model(path=str(base)), adapter=str(tmp_path / "run" / "adapter")))
    interpolate(Interpolate(str(tmp_path / "middle"), Model(path=str(base)), tuned=str(tmp_path / "run" / "model")))
    samples = prepare_data(config, AutoTokenizer.from_pretrained(base)).samples
    chat = json.loads(chats.read_text().splitlines()[0])["messages"]
    for folder in ("run/adapter", "run/model", "half", "middle"):
        reloaded = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert reloaded.apply_chat_template(chat)["input_ids"] == samples[0][0].tolist(), folder
    evaluated = find_models(evaluation.Config(adapter=str(tmp_path / "run" / "adapter"))).model
    assert load_tokenizer(evaluated).chat_template == MINE


def test_a_processors_template_does_not_win_over_the_one_trained_with(model_folder, tmp_path):
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "processor_config.json").write_text('{"processor_class": "X", "chat_template": "another"}')
    model, tokenizer = load_model(Config(model=Model(path=str(base)), precision="fp32"), "cpu")
    merge_and_save(model, tokenizer, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "processor_config.json").read_text()) == {"processor_class": "X"}
    (base / "processor_config.json").write_text("{")
    with pytest.raises(UserError, match="model.path: cannot read .*processor_config.json"):
        merge_and_save(model, tokenizer, tmp_path / "another")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_names_that_transformers_would_not_find_are_refused_before_training(model_folder, chats, tmp_path, monkeypatch, method):
    original = revert_weight_conversion

    def misnamed(model, state):
        return {name.replace("q_proj", "query"): tensor for name, tensor in original(model, state).items()}

    monkeypatch.setattr("trainer.model.export.revert_weight_conversion", misnamed)
    message = refused(model_folder, chats, tmp_path / "run", "--dry_run", "--export.format", "merged", "--method", method)
    assert "export: transformers would not find 2 weights" in message


@pytest.mark.slow
def test_a_quantised_gpt2_is_merged_in_its_own_layout(chats, tmp_path, capsys):
    """Its dense layers hold their weights transposed, and bitsandbytes holds them as linear layers.

    They are as wide as two blocks: with AVX-512, bitsandbytes misreads rows that do not end with a block.
    """
    tiny.save_model(tmp_path / "base", "gpt2", n_embd=128, n_inner=256)
    run(tmp_path / "base", chats, tmp_path / "run", *SHORT, "--method", "qlora", "--export.format", "both", "--export.check", "true")
    assert capsys.readouterr().out.count("checked: ") == 2
