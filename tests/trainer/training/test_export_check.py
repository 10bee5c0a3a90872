"""A run says that it has finished only if stock classes give its log-probs with what it exported."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import mixtures, tiny
from tests.helpers.runs import arguments, records
from trainer.cli import parse
from trainer.config import Config
from trainer.errors import UserError
from trainer.model import export
from trainer.run import train
from trainer.training import export_check, run_folder

SHORT = ("--max_steps", "3", "--export.check", "true")


def run(*args):
    return train(parse(Config, arguments(*args), "trainer.run"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "base"
    mixtures.model("qwen3_moe").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("--export.format", "both"), ("--export.format", "both", "--precision", "bf16", "--data.eval_fraction", "0.1"), ("--method", "full"),
    ("--method", "qlora", "--export.format", "both")], ids=lambda options: " ".join(options))
def test_what_is_right_is_said(chats, tmp_path, capsys, options):
    base = tiny.save_model(tmp_path / "base", "llama", intermediate_size=128)  # whole blocks, which bitsandbytes reads on any CPU
    run(base, chats, tmp_path / "run", *SHORT, *options)
    line = r"checked: \S+/(\w+) gives the trained model's log-probs within (\S+) nats over (\d+) tokens\n"
    found = re.findall(line, capsys.readouterr().out)
    assert [name for name, *_ in found] == (["adapter", "model"] if "--export.format" in options else ["model"])
    limit = 0.05 if "bf16" in options or "qlora" in options else 1e-5
    assert all(float(apart) < limit and int(tokens) > 100 for _, apart, tokens in found)


@pytest.mark.slow
def test_an_adapter_is_not_blamed_for_a_base_that_stock_code_misreads(model_folder, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_check, "misread_width", lambda layers: 112 if [*layers] else None)
    run(model_folder, chats, tmp_path / "run", *SHORT, "--method", "qlora", "--export.format", "both")
    shown = capsys.readouterr().out
    adapter = tmp_path / "run" / "adapter"
    assert f"WARNING: {adapter} is not checked: on this CPU bitsandbytes misreads the base's layers of width 112" in shown
    assert f"checked: {tmp_path / 'run' / 'model'} gives" in shown


def without(part: str, names_of_base):
    """Merge as if the adapters of some weights were not there."""
    def weights(base):
        return {name: layer for name, layer in names_of_base(base).items() if part not in name}
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("part", ["experts", "down_proj", "layers.1.self_attn.v_proj"])
def test_updates_that_the_merging_lost_are_found(mixture, chats, tmp_path, monkeypatch, part):
    monkeypatch.setattr(export, "adapted_weights", without(part, export.adapted_weights))
    with pytest.raises(UserError, match="export: model/ is not what was trained: its log-probs differ by .* what was trained is in"):
        run(mixture, chats, tmp_path / "run", *SHORT, "--export.format", "merged", "--lora.experts", "true")
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"model-differs", "checkpoints"}


@pytest.mark.slow
def test_weights_that_were_written_wrongly_are_found(mixture, chats, tmp_path, monkeypatch):
    """Experts that transformers would draw at random: names that it does not know, in a folder that loads."""
    def ruin(model, tokenizer, folder):
        export.merge_and_save(model, tokenizer, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({name.replace("1.mlp.experts.", "1.mlp.base_layer."): tensor for name, tensor in tensors.items()},
                  folder / "model.safetensors", {"format": "pt"})

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "merge_and_save", ruin)
        with pytest.raises(UserError, match="export: model/ is not what was trained: .*it lacks 12 tensors of the base's files, such as "):
            run(mixture, chats, tmp_path / "run", *SHORT, "--method", "full")
    result = run(mixture, chats, tmp_path / "run", *SHORT, "--method", "full", "--resume", "auto")
    assert result.status == 0 and not (tmp_path / "run" / "checkpoints").exists() and len(records(tmp_path / "run", "end")) == 1


@pytest.mark.slow
def test_an_adapter_that_stock_peft_reads_otherwise_is_found(model_folder, chats, tmp_path, monkeypatch):
    def ruin(model, folder, tokenizer):
        export.save_adapter(model, folder, tokenizer)
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(".layers.1.", ".layers.7."): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    monkeypatch.setattr(run_folder, "save_adapter", ruin)
    with pytest.raises(UserError, match="export: adapter/ is not what was trained: its log-probs differ"):
        run(model_folder, chats, tmp_path / "run", *SHORT)


@pytest.mark.slow
def test_without_memory_the_export_is_left_unchecked_and_that_is_said(model_folder, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_check, "_place", lambda device, needed: None)
    run(model_folder, chats, tmp_path / "run", *SHORT)
    assert "adapter is not checked: loading it takes" in capsys.readouterr().out

    def full(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.undo()
    monkeypatch.setattr(export_check, "load_adapter", full)
    run(model_folder, chats, tmp_path / "other", *SHORT)
    assert "adapter is not checked, as memory ran out" in capsys.readouterr().out
