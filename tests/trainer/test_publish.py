"""Exports on a hub: what is uploaded and how, its card, and that a refusal loses nothing."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from peft import AutoPeftModelForCausalLM

from tests.helpers.runs import arguments
from tests.helpers.scripted_hub import ScriptedHub
from trainer import publish
from trainer.cli import parse
from trainer.config import Config, Data
from trainer.config_rules import validate
from trainer.errors import UserError
from trainer.report.model_card import Export, write_card
from trainer.report.run_records import Run
from trainer.run import train

SHORT = ("--max_steps", "2", "--export.push_to_hub", "me/sums-lora")


@pytest.fixture
def hub(monkeypatch):
    with ScriptedHub(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def licensed(model_folder, tmp_path_factory):
    """A model with a card of its own."""
    folder = tmp_path_factory.mktemp("base") / "tiny-model"
    folder.mkdir()
    for file in Path(model_folder).iterdir():
        (folder / file.name).symlink_to(file)
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja"):
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: LICENSE\n---\n# A model\n")
    return folder


def run(*args):
    return train(parse(Config, arguments(*args), "trainer.run"))


@pytest.mark.slow
def test_a_run_uploads_its_adapter_with_a_card_into_a_private_repository(hub, licensed, chats, tmp_path, capsys):
    run(licensed, chats, tmp_path / "run", *SHORT, "--data.eval_fraction", "0.1")
    out, err = capsys.readouterr()
    folder = tmp_path / "run" / "adapter"
    assert hub.repos == {"me/sums-lora": True} and f"published: {hub.url}/me/sums-lora" in out
    assert {path for _, path in hub.files} == {path.name for path in folder.iterdir()}
    assert all(content == (folder / path).read_bytes() for (_, path), content in hub.files.items())
    card = hub.files["me/sums-lora", "README.md"].decode()
    for words in ("# sums-lora", "A LoRA adapter of rank 4, fine-tuned from `tiny-model`, a local model, on sums",
                  "was not measured", "licence of its base: tiny-licence",
                  "| sums | domain | 108 | 100.0% |", "Loss on held-out text: ", "rank 4, alpha 32; 2 steps of at most 512 tokens",
                  'AutoPeftModelForCausalLM.from_pretrained("me/sums-lora"', "--max-lora-rank 8", "ADAPTER ."):
        assert words in card
    assert str(tmp_path) not in card and str(licensed.parent) not in card and "names" in err and str(licensed) in err
    assert metadata_load(folder / "README.md") == {
        "library_name": "peft", "license": "other", "license_name": "tiny-licence", "license_link": "LICENSE",
        "pipeline_tag": "text-generation", "tags": ["lora", "sft"]}
    AutoPeftModelForCausalLM.from_pretrained(folder)
    assert f"serve: vllm serve {licensed} --enable-lora --lora-modules tuned={folder} --max-lora-rank 8" in out


@pytest.mark.slow
def test_a_refused_upload_is_one_line_with_the_command_that_goes_on(hub, model_folder, chats, tmp_path, monkeypatch, capsys):
    hub.refuses["/commit/"] = (403, "You have no storage left")
    with pytest.raises(UserError) as raised:
        run(model_folder, chats, tmp_path / "run", *SHORT, "--export.public", "true")
    message = str(raised.value)
    assert message.startswith("export.push_to_hub: cannot upload") and "no storage left" in message and "\n" not in message
    command = message.partition("again: ")[2].split()
    assert command[:3] == ["python", "-m", "trainer.publish"] and (tmp_path / "run" / "adapter" / "README.md").exists()
    hub.refuses.clear()
    monkeypatch.setattr(sys, "argv", ["trainer.publish", *command[3:]])
    assert publish.main() == 0 and ("me/sums-lora", "adapter_model.safetensors") in hub.files and hub.repos == {"me/sums-lora": False}


@pytest.mark.parametrize("refused, words", [({"/whoami": (401, "Invalid username")}, "cannot log in"), (None, "found no token")])
def test_who_is_not_logged_in_learns_it_before_training(hub, model_folder, chats, tmp_path, monkeypatch, refused, words):
    if refused:
        hub.refuses.update(refused)
    else:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(UserError, match=f"export.push_to_hub: .*{words}"):
        run(model_folder, chats, tmp_path / "run", *SHORT)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("options, named", [
    (["--export.push_to_hub", "no name"], "export.push_to_hub"), (["--export.public"], "export.public"), (["--export.gguf", "bf16"],
    "export.gguf"), (["--export.llama_cpp", "x"], "export.llama_cpp")])
def test_options_that_do_not_compose(model_folder, chats, tmp_path, options, named):
    with pytest.raises(UserError, match=f"^{named}: expected"):
        validate(parse(Config, arguments(model_folder, chats, tmp_path, *options), "trainer.run"))


def test_what_is_no_export_or_has_a_link_out_of_it_is_not_uploaded(hub, tmp_path):
    (tmp_path / "secret").write_text("private")
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(UserError, match="^folder: expected"):
        publish.run(publish.Publish(str(folder), "me/x"))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link out of its folder"):
        publish.run(publish.Publish(str(folder), "me/x"))
    assert hub.files == {}


def test_a_card_has_what_was_learnt_and_kept_and_a_base_of_the_hubs_cache_by_its_name(tmp_path):
    base = tmp_path / "hub" / "models--org--some-model" / "snapshots" / "0123"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 16, "rank_pattern": {"down_proj": 40}}')
    measured = {"kind": "forgetting", "step": 9, "general": 0.9, "general_base": 0.95, "general_interval": [0.85, 0.93], "general_lost": 7,
                "general_gained": 2, "domain": 0.8, "domain_base": 0.1, "domain_interval": [0.7, 0.88], "domain_lost": 0,
                "domain_gained": 70}
    run = Run("x", forgetting=[measured], end={"steps": 9, "seconds": 75.0}, data={"sources": [
        {"name": "a|b", "role": "replay", "samples": 10, "share_tokens": 0.25}]})
    export = Export(tmp_path / "adapter", str(base), Config(data=Data(train="d")))
    write_card(export, run)
    card = (tmp_path / "adapter" / "README.md").read_text()
    for words in ("fine-tuned from [org/some-model](https://huggingface.co/org/some-model)", "rank 40", "base_model: org/some-model",
                  "license: apache-2.0", "language: en", "What was learnt: 80.0% of the domain items are right (95% interval 70.0% to "
                  "88.0%), 10.0% before. 0 were forgotten, 70 gained.", "What was kept: 90.0% of the general items",
                  "| a\\|b | replay | 10 | 25.0% |",
                  "Replay is general data", "9 steps", "1 min 15 s", "vllm serve org/some-model --enable-lora", "--max-lora-rank 64"):
        assert words in card, words
    assert str(tmp_path) not in card
