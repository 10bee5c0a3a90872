"""Convert a configuration of TRL's SFT, also in the form of the alignment handbook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.conversion import shared_options
from trainer.conversion.rules import Converted, Table, apply, note, option
from trainer.conversion.shared_options import ATTENTION, PACKS


def adapter(key: str, value: Any, converted: Converted) -> None:
    if converted.values["method"] == "full":
        converted.values["method"] = "lora"


def four_bits(key: str, value: Any, converted: Converted) -> None:
    converted.values["method"] = "qlora"


def template(key: str, value: Any, converted: Converted) -> None:
    if "{" in str(value):
        converted.note(key, str(value)[:40] + "...", "write it to a file, and name that in data.chat_template")
    else:
        converted.values["data.chat_template"] = str(value)


def loss(key: str, value: Any, converted: Converted) -> None:
    if value == "dft":
        converted.values["retention.token_weighting"] = "dft"
    elif value != "nll":
        converted.note(key, value, "not here; the loss is cross entropy")


def on_assistant(key: str, value: Any, converted: Converted) -> None:
    converted.values["data.train_on"] = "assistant"


def mixture(key: str, value: Any, converted: Converted) -> None:
    """Set the sources of the alignment handbook's mixture; its weights are shares of each set, as ours."""
    entries = value.get("datasets", []) if isinstance(value, Mapping) else []
    sources = []
    for entry in entries:
        source = {"path": entry.get("id") or entry.get("path"), "subset": entry.get("config") or entry.get("name"),
                  "split": entry.get("split"), "weight": entry.get("weight")}
        defaults = {"subset": "default", "split": "train", "weight": 1.0}
        sources.append({name: each for name, each in source.items() if each is not None and defaults.get(name) != each})
    converted.values["data.train"] = shared_options.one_source(sources)
    if isinstance(value, Mapping) and "test_split_size" in value:
        shared_options.validation_share(f"{key}: test_split_size", value["test_split_size"], converted)


TABLE: Table = {
    "model_name_or_path": option("model.path", str), "trust_remote_code": option("model.trust_remote_code", bool),
    "use_peft": adapter, "load_in_4bit": four_bits, "load_in_8bit": note("no 8-bit base here; load_in_4bit is method qlora"),
    "lora_r": option("lora.rank", int), "lora_alpha": option("lora.alpha", float), "lora_dropout": option("lora.dropout", float),
    "lora_target_modules": shared_options.targets, "lora_modules_to_save": option("lora.modules_to_save", shared_options.list_of),
    "use_dora": option("lora.dora", bool), "use_rslora": option("lora.rslora", bool),
    "chat_template": template, "chat_template_path": template, "loss_type": loss, "assistant_only_loss": on_assistant,
    "dataset_mixture": mixture, "dataset_num_proc": option("data.num_proc", int), "eos_token": note("read from the chat template"),
    "pad_token": note("nothing is padded here"), "attn_implementation": note(ATTENTION), "packing_strategy": note(PACKS),
    "padding_free": note(PACKS), "model_revision": note("the hub's main revision is used; download another one, and name its folder"),
    "activation_offloading": note("not here; activation_checkpointing saves memory"),
    **shared_options.without_effect(
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_text_field", "max_length", "max_seq_length",
        "packing", "eval_packing", "torch_dtype", "dtype", "lora_task_type", "bnb_4bit_quant_type", "use_bnb_nested_quant",
        "dataset_kwargs", "completion_only_loss", "dataset_streaming", "shuffle_dataset"),
}


def convert(theirs: Mapping[str, Any]) -> Converted:
    """Convert a configuration of TRL."""
    converted = Converted({"method": "full"})
    apply({**shared_options.HUGGING_FACE, **TABLE}, theirs, converted)
    if theirs.get("dataset_name"):
        source = {"path": theirs["dataset_name"], "subset": theirs.get("dataset_config"), "split": theirs.get("dataset_train_split"),
                  "columns": {"text": field} if (field := theirs.get("dataset_text_field")) and field != "text" else None}
        source = {name: value for name, value in source.items() if value and (name, value) != ("split", "train")}
        converted.values["data.train"] = shared_options.one_source([source])
        evaluated = theirs.get("eval_strategy", theirs.get("evaluation_strategy"))
        if evaluated not in (None, "no", False) and (split := theirs.get("dataset_test_split", "test")):
            converted.values["data.eval"] = [source | {"split": split}]
    if theirs.get("dataset_streaming"):
        converted.note("dataset_streaming", True, "data are read once into memory-mapped files")
    if not any(theirs.get(key) for key in ("assistant_only_loss", "completion_only_loss", "dataset_text_field")):
        converted.notes.append("TRL's default is a loss on all tokens of a chat, ours on the assistant's; data.train_on all keeps TRL's")
    converted.values.setdefault("data.on_overlong", "truncate")  # as TRL does
    length = shared_options.integer(theirs, "max_length", shared_options.integer(theirs, "max_seq_length", 1024))
    shared_options.set_batch(converted, shared_options.integer(theirs, "per_device_train_batch_size", 8),
                             shared_options.integer(theirs, "gradient_accumulation_steps", 1), length, theirs.get("packing") is True)
    shared_options.end_of_schedule(theirs, converted)
    return converted
