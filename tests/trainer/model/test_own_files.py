"""Links in folders of models and adapters: those out of the folder reach no export, those of the hub's cache do."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import hub_cache
from tests.helpers.models import stir
from tests.helpers.wrapped import save_wrapped, tensors_of
from trainer.cli import parse
from trainer.config import Config, Lora, Model
from trainer.errors import UserError
from trainer.interpolate import Interpolate, interpolate
from trainer.model.export import merge_and_save, save_adapter
from trainer.model.loading import load_model
from trainer.model.lora import add_adapter
from trainer.training.export_trial import try_export

SECRET = "a private line"
LINKED = ["README.md", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "notes/more.txt"]


@pytest.fixture
def outside(tmp_path):
    """A private file beside the folders."""
    path = tmp_path / "private.json"
    path.write_text(json.dumps({"secret": SECRET}))
    return path


@pytest.fixture
def adapter(model_folder, tmp_path):
    model = add_adapter(AutoModelForCausalLM.from_pretrained(model_folder), Lora(rank=2))
    stir(model)
    save_adapter(model, tmp_path / "adapter", AutoTokenizer.from_pretrained(model_folder))
    return tmp_path / "adapter"


def link(folder, name, target):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def interpolated(model, folder, output, kind="adapter"):
    interpolate(parse(Interpolate, ["--model.path", str(model), f"--{kind}", str(folder), "--output", str(output)], ""))
    return {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize("whole_folder", [False, True])
def test_links_out_of_an_adapter_are_left_out(model_folder, adapter, outside, tmp_path, capsys, whole_folder):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "tools.jinja").write_text(SECRET)
    for name in LINKED:
        link(adapter, name, outside)
    (adapter / "NOTICE").symlink_to("adapter_config.json")
    if whole_folder:
        shutil.rmtree(adapter / "additional_chat_templates")
        (adapter / "additional_chat_templates").symlink_to(tmp_path / "private")
    files = interpolated(model_folder, adapter, tmp_path / "half")
    assert not any(SECRET.encode() in path.read_bytes() for path in files.values())
    assert files.keys() & set(LINKED) == set() and {"NOTICE", "tokenizer.json", "adapter_config.json"} <= files.keys()
    assert capsys.readouterr().out.count("is a link out of its folder, and is left out") == 4


def test_an_adapter_in_the_hubs_cache_is_copied_whole(model_folder, adapter, tmp_path, monkeypatch):
    snapshot = hub_cache.cached_as(monkeypatch, adapter, tmp_path / "hub")
    files = interpolated(model_folder, snapshot, tmp_path / "half")
    assert files.keys() == {path.name for path in snapshot.iterdir()} and not any(path.is_symlink() for path in files.values())


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja",
                                  "additional_chat_templates/tools.jinja"])
def test_a_model_with_a_link_out_of_its_folder_is_refused_before_it_is_trained(model_folder, outside, tmp_path, name):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    model, tokenizer = load_model(Config(model=Model(path=str(folder)), method="full"), "cpu")
    link(folder, name, outside)
    for option in ("path", "tokenizer"):
        config = Config(model=Model(**{"path": str(model_folder), option: str(folder)}), method="full", output=str(tmp_path / "out"))
        with pytest.raises(UserError, match=f"^model.{option}: .*{name} is a link out of its folder, to .*private.json, which would be"):
            try_export(config, model, tokenizer)
    merge_and_save(model, tokenizer, tmp_path / "merged")
    assert not any(SECRET.encode() in path.read_bytes() for path in (tmp_path / "merged").iterdir())
    with pytest.raises(UserError, match="^tuned: .*is a link out of its folder"):
        interpolated(model_folder, folder, tmp_path / "half", "tuned")


def test_an_adapters_configuration_is_its_own(model_folder, adapter, tmp_path):
    model, tokenizer = load_model(Config(model=Model(path=str(model_folder))), "cpu")
    (adapter / "adapter_config.json").rename(tmp_path / "private.json")
    link(adapter, "adapter_config.json", tmp_path / "private.json")
    config = Config(model=Model(path=str(model_folder)), lora=Lora(path=str(adapter)), output=str(tmp_path / "out"))
    with pytest.raises(UserError, match="^lora.path: .*adapter_config.json is a link out of its folder"):
        try_export(config, model, tokenizer)
    with pytest.raises(UserError, match="^adapter: .*adapter_config.json is a link out of its folder"):
        interpolated(model_folder, adapter, tmp_path / "half")


def test_weights_may_be_links_but_for_what_is_copied_as_it_stands(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    link(folder, "model.safetensors", tmp_path / "weights")
    config = Config(model=Model(path=str(folder)), method="full", output=str(tmp_path / "out"))
    assert "GB are free" in try_export(config, *load_model(config, "cpu"))

    wrapped = tmp_path / "wrapped"
    save_wrapped(wrapped, "gemma3")
    config = Config(model=Model(path=str(wrapped)), method="full", output=str(tmp_path / "out"))
    loaded = load_model(config, "cpu")
    assert "GB are free" in try_export(config, *loaded)
    (wrapped / "model.safetensors").rename(tmp_path / "whole")
    link(wrapped, "model.safetensors", tmp_path / "whole")
    with pytest.raises(UserError, match="^model.path: .*model.safetensors is a link out of its folder"):
        try_export(config, *loaded)


@pytest.mark.slow
def test_a_model_in_the_hubs_cache_is_exported_whole(tmp_path, monkeypatch):
    save_wrapped(tmp_path / "gemma", "gemma3")
    snapshot = hub_cache.cached_as(monkeypatch, tmp_path / "gemma", tmp_path / "hub")
    config = Config(model=Model(path=str(snapshot)), method="full", output=str(tmp_path / "out"))
    model, tokenizer = load_model(config, "cpu")
    assert "GB are free" in try_export(config, model, tokenizer)
    merge_and_save(model, tokenizer, tmp_path / "model")
    assert tensors_of(tmp_path / "model").keys() == tensors_of(tmp_path / "gemma").keys()
