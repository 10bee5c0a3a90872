"""Configurations of other trainers: what each option becomes, what is named, and files that trainer.run takes."""

import json
import sys

import pytest
import yaml

from tests.helpers.runs import write_chats
from trainer import convert
from trainer.cli import parse
from trainer.config import Config
from trainer.config_rules import validate
from trainer.conversion import axolotl, llama_factory, shared_options, trl
from trainer.conversion.rules import silent
from trainer.errors import UserError
from trainer.run import train

AXOLOTL = {
    "base_model": "org/model", "load_in_8bit": False, "load_in_4bit": True, "adapter": "qlora", "lora_r": 32, "lora_alpha": 16,
    "lora_dropout": 0.05, "lora_target_linear": True, "sequence_len": 4096, "sample_packing": True, "micro_batch_size": 2,
    "gradient_accumulation_steps": 4, "num_epochs": 3, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine", "learning_rate": 0.0002,
    "datasets": [{"path": "org/chats", "type": "chat_template", "field_messages": "turns", "split": "train_sft",
                  "message_property_mappings": {"role": "role", "content": "text"}},
                 {"path": "json", "data_files": "rows.jsonl", "ds_type": "json", "type": "alpaca"},
                 {"path": "org/texts", "type": "completion", "field": "body"}],
    "val_set_size": 0.05, "output_dir": "out", "gradient_checkpointing": True, "wandb_project": None, "warmup_steps": 10, "bf16": "auto",
    "flash_attention": True, "early_stopping_patience": 3, "special_tokens": {"pad_token": "<pad>"}, "weight_decay": 0.0,
    "saves_per_epoch": 1, "a_new_option": 7}
TRL = {
    "model_name_or_path": "org/model", "dataset_name": "org/rows", "dataset_config": "small", "dataset_text_field": "body",
    "eval_strategy": "steps", "eval_steps": 50, "learning_rate": 1e-4, "lr_scheduler_type": "linear", "use_peft": True, "lora_r": 8,
    "lora_target_modules": ["q_proj", "v_proj"], "max_length": 2048, "packing": True, "per_device_train_batch_size": 4, "max_steps": -1,
    "report_to": ["wandb", "mlflow", "comet"], "use_liger_kernel": True, "bf16": True, "save_total_limit": 1}
LLAMA_FACTORY = {
    "model_name_or_path": "org/model", "stage": "sft", "do_train": True, "finetuning_type": "lora", "quantization_bit": 4,
    "lora_target": "q_proj,v_proj", "dataset": "mine,talks", "dataset_dir": "sets", "template": "llama3", "cutoff_len": 1024,
    "max_samples": 100, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine", "val_size": 0.1, "plot_loss": True, "overwrite_cache": True, "warmup_ratio": 0.1}
INFO = {"mine": {"file_name": "mine.json", "columns": {"prompt": "ask", "query": "context", "response": "answer"}},
        "talks": {"hf_hub_url": "org/talks", "formatting": "sharegpt", "columns": {"messages": "turns"},
                  "tags": {"role_tag": "role", "content_tag": "content"}}}


def accepted(converted, tmp_path) -> Config:
    """Return the configuration that trainer.run makes of what was converted."""
    path = tmp_path / "ours.yaml"
    path.write_text(convert.as_yaml(converted, "theirs.yaml", str(path)))
    config = parse(Config, ["--config", str(path)], "trainer.run")
    validate(config)
    return config


def noted(converted) -> set[str]:
    return {line.partition(":")[0] for line in converted.notes}


def test_axolotl(tmp_path):
    converted = convert.convert(AXOLOTL, "auto", tmp_path)
    config = accepted(converted, tmp_path)
    assert (config.method, config.model.path) == ("qlora", "org/model")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (32, 16, 0.05)
    assert (config.batch.tokens_per_pack, config.batch.tokens_per_step, config.data.max_length) == (8192, 32768, 4096)
    assert (config.optim.name, config.optim.lr, config.optim.warmup_steps, config.optim.min_lr_ratio) == ("adamw_8bit", 2e-4, 10, 0)
    assert (config.data.eval_fraction, config.data.on_overlong, config.activation_checkpointing) == (0.05, "drop", "full")
    chats, rows, texts = config.data.train
    assert (chats.path, chats.split, chats.columns) == ("org/chats", "train_sft", {"messages": "turns"})
    assert (rows.path, rows.format) == ("rows.jsonl", "alpaca") and (texts.format, texts.columns) == ("text", {"text": "body"})
    assert noted(converted) == {"flash_attention", "special_tokens", "saves_per_epoch", "a_new_option", "early_stopping_patience"}


def test_axolotl_without_an_adapter_trains_all_weights(tmp_path):
    theirs = {key: value for key, value in AXOLOTL.items() if not key.startswith(("lora", "load", "adapter"))} | {"optimizer": "lion"}
    converted = convert.convert(theirs | {"sample_packing": False}, "axolotl", tmp_path)
    assert accepted(converted, tmp_path).method == "full" and {"optimizer", "sample_packing"} <= noted(converted)
    assert any(line.startswith("batch of 8 samples: a step has 32,768 tokens") for line in converted.notes)


def test_trl(tmp_path):
    converted = convert.convert(TRL, "auto", tmp_path)
    config = accepted(converted, tmp_path)
    assert (config.method, config.lora.rank, config.lora.target_modules) == ("lora", 8, ["q_proj", "v_proj"])
    train_source, = config.data.train
    assert (train_source.path, train_source.subset, train_source.columns) == ("org/rows", "small", {"text": "body"})
    assert config.data.eval[0].split == "test" and config.eval.every == 50 and config.optim.lr_scheduler == "linear"
    assert (config.batch.tokens_per_pack, config.max_steps, config.logging.wandb_project) == (8192, None, "steadfast")
    assert noted(converted) == {"report_to", "use_liger_kernel"}


def test_the_alignment_handbooks_mixture(tmp_path):
    converted = convert.convert({"model_name_or_path": "org/model", "dataset_mixture": {"datasets": [
        {"id": "org/a", "config": "SFT", "split": "x", "weight": 0.5},
        {"id": "org/b", "config": "default", "split": "train", "weight": 1.0}], "test_split_size": 1000},
        "chat_template": "{% for m in messages %}{{ m }}{% endfor %}"}, "trl", tmp_path)
    first, second = accepted(converted, tmp_path).data.train
    assert (first.path, first.subset, first.split, first.weight, second) == ("org/a", "SFT", "x", 0.5, "org/b")
    assert {"dataset_mixture", "chat_template"} <= noted(converted) and any(line.startswith("TRL's default") for line in converted.notes)


def test_llama_factory(tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(INFO))
    converted = convert.convert(LLAMA_FACTORY, "auto", tmp_path)
    config = accepted(converted, tmp_path)
    assert (config.method, config.lora.rank, config.lora.alpha, config.lora.target_modules) == ("qlora", 8, 16, ["q_proj", "v_proj"])
    mine, talks = config.data.train
    assert mine.path == str(tmp_path / "sets" / "mine.json") and mine.max_records == 100
    assert mine.columns == {"instruction": "ask", "input": "context", "output": "answer"}
    assert (talks.path, talks.columns) == ("org/talks", {"messages": "turns"}) and config.activation_checkpointing == "full"
    assert noted(converted) == {"template", "batch of 8 samples"}


def test_llama_factory_without_its_list_of_data_sets(tmp_path):
    converted = convert.convert(LLAMA_FACTORY, "auto", tmp_path)
    assert converted.values["data.train"] == ["mine", "talks"] and "dataset" in noted(converted)
    with pytest.raises(UserError, match="stage: expected sft or pt, got dpo"):
        convert.convert(LLAMA_FACTORY | {"stage": "dpo"}, "auto", tmp_path)


def test_starts_rates_noise_and_restarts_of_the_field(tmp_path):
    knobs = {"optimizer": "muon", "lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3},
             "neftune_noise_alpha": 5, "adapter": None}
    config = accepted(convert.convert(AXOLOTL | knobs, "axolotl", tmp_path), tmp_path)
    assert (config.optim.name, config.optim.num_cycles, config.optim.neftune_noise_alpha) == ("muon", 3, 5.0)
    for theirs, ours in (("pissa_niter_16", "pissa_niter_4"), ("olora", "olora"), (True, "default"), ("corda", "default")):
        adapter = {"peft_init_lora_weights": theirs, "loraplus_lr_ratio": 16, "adapter": "lora", "load_in_4bit": False}
        converted = convert.convert(AXOLOTL | adapter, "axolotl", tmp_path)
        config = accepted(converted, tmp_path)
        assert (config.lora.init, config.optim.loraplus_lr_ratio) == (ours, 16.0)
        assert ("peft_init_lora_weights" in noted(converted)) == (theirs == "corda")
    theirs = LLAMA_FACTORY | {"quantization_bit": None, "pissa_init": True, "loraplus_lr_ratio": 8}
    config = accepted(convert.convert(theirs, "auto", tmp_path), tmp_path)
    assert (config.lora.init, config.optim.loraplus_lr_ratio, config.retention.kl_weight) == ("pissa_niter_4", 8.0, 0)
    config = accepted(convert.convert(LLAMA_FACTORY | {"use_asft_loss": True, "asft_alpha": 0.05}, "auto", tmp_path), tmp_path)
    assert (config.retention.token_weighting, config.retention.kl_weight, config.retention.kl_sources) == ("dft", 0.05, "domain")


@pytest.mark.parametrize("theirs", [{"a": 1}, {"datasets": []}])
def test_a_file_of_nobody_is_refused(theirs, tmp_path):
    with pytest.raises(UserError, match="input: expected options of Axolotl"):
        convert.convert(theirs, "auto", tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "1: 2", ""])
def test_what_is_no_mapping_is_one_line(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="input: expected "):
        convert.read(str(tmp_path / "x.yaml"))


def test_every_rule_makes_an_option_that_exists_or_a_note(tmp_path):
    """Whatever the type of a value, nothing raises but a UserError."""
    for name, module in (("axolotl", axolotl), ("trl", trl), ("llama_factory", llama_factory)):
        for key, rule in {**shared_options.HUGGING_FACE, **module.TABLE}.items():
            for value in (1, 2.5, True, "text", ["a"], {"a": 1}):
                try:
                    converted = convert.convert({key: value}, name, tmp_path)
                except UserError:
                    continue
                converted.nested()
                assert rule is silent or converted.values or converted.notes


@pytest.mark.slow
@pytest.mark.parametrize("name, theirs", [("axolotl", AXOLOTL | {"adapter": "lora", "load_in_4bit": False}), ("trl", TRL)])
def test_a_converted_file_is_one_that_a_run_takes(name, theirs, tmp_path, model_folder, monkeypatch, capsys):
    rows = write_chats(tmp_path / "rows.jsonl")
    data = {"datasets": [{"path": str(rows), "type": "chat_template"}]} if name == "axolotl" else {
        "dataset_name": str(rows), "dataset_config": None, "dataset_text_field": None, "eval_strategy": "no"}
    theirs = {**theirs, **data, "base_model" if name == "axolotl" else "model_name_or_path": str(model_folder)}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    ours = tmp_path / "ours.yaml"
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "theirs.yaml"), "--output", str(ours)])
    assert convert.main() == 0 and "not converted: " in capsys.readouterr().err
    config = parse(Config, ["--config", str(ours), "--dry_run", "--device", "cpu", "--output", str(tmp_path / "out")], "trainer.run")
    assert train(config) is None and "dry run" in capsys.readouterr().out.lower()
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "theirs.yaml"), "--output", str(ours)])
    assert convert.main() == 1 and "ours.yaml exists" in capsys.readouterr().err
