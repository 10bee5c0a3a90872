"""Convert a configuration of Axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.conversion import shared_options
from trainer.conversion.rules import Converted, Rule, Table, apply, choice, is_set, note, option
from trainer.conversion.shared_options import ATTENTION, DEVICES, KERNELS, PACKS

METHODS = {"lora": "lora", "qlora": "qlora"}
FORMATS = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt", "chat_template": None}  # None: inferred from the columns


def datasets(key: str, value: Any, converted: Converted) -> None:
    """Set the sources of `data.train`, or of `data.eval` for `test_datasets`."""
    sources = [source for entry in value if (source := _source(key, entry, converted))]
    converted.values["data.eval" if key == "test_datasets" else "data.train"] = shared_options.one_source(sources)


def _source(key: str, entry: Mapping[str, Any], converted: Converted) -> dict[str, Any] | None:
    if not isinstance(entry, Mapping) or not entry.get("path"):
        converted.note(key, entry, "expected a mapping with a path")
        return None
    files, kind = entry.get("data_files"), str(entry.get("type") or "chat_template").partition(":")[0].partition(".")[0]
    path = files if isinstance(files, str) else files[0] if files and len(files) == 1 else entry["path"]
    source: dict[str, Any] = {"path": path}
    if files and path == entry["path"]:
        converted.note(f"{key}: data_files", files, "name each file as a source of its own")
    if kind not in FORMATS:
        converted.note(f"{key}: type", entry["type"], "not here; rows must be chats, Alpaca's, prompts with completions, or texts")
    elif FORMATS[kind]:
        source["format"] = FORMATS[kind]
    if entry.get("split", "train") != "train":
        source["split"] = entry["split"]
    if entry.get("name"):
        source["subset"] = entry["name"]
    if columns := _columns(kind, entry):
        source["columns"] = columns
    if is_set(entry.get("roles_to_train")) and entry["roles_to_train"] not in (["assistant"], ["gpt"], ["assistant", "gpt"]):
        converted.note(f"{key}: roles_to_train", entry["roles_to_train"], "the assistant's turns are trained on; data.train_on has others")
    known = {"path", "data_files", "type", "split", "name", "field_messages", "message_property_mappings", "message_field_role",
             "message_field_content", "field", "roles_to_train", "ds_type", "conversation", "field_instruction", "field_output",
             "field_input", "field_system", "train_on_eos", "roles", "chat_template", "train_on_eot",
             "field_thinking", "template_thinking_key"}
    for name in entry.keys() - known:
        if is_set(entry[name]):
            converted.note(f"{key}: {name}", entry[name], "no counterpart that is known; left out")
    return source


def _columns(kind: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """Return which column is which of ours; roles and texts inside messages are found by themselves."""
    if kind == "completion":
        return {"text": entry["field"]} if entry.get("field", "text") != "text" else {}
    messages = entry.get("field_messages")
    if not messages or messages == "messages":
        return {}
    properties = entry.get("message_property_mappings") or {}
    role = properties.get("role") or entry.get("message_field_role")
    if role == "from" or messages == "conversations" and role is None:
        return {} if messages == "conversations" else {"conversations": messages}
    return {"messages": messages}


def method(key: str, value: Any, converted: Converted) -> None:
    if value in METHODS:
        converted.values["method"] = METHODS[value]
    else:
        converted.note(key, value, "methods are lora, qlora and full")


def four_bits(key: str, value: Any, converted: Converted) -> None:
    if converted.values.get("method") == "lora":
        converted.values["method"] = "qlora"


def loftq(key: str, value: Any, converted: Converted) -> None:
    if "loftq_config" in value and converted.values.get("method") == "qlora":
        converted.values["lora.init"] = "loftq"
    else:
        converted.note(key, value, "LoftQ goes with load_in_4bit here: lora.init loftq with method qlora")


def per_epoch(name: str) -> Rule:
    return note(shared_options.BY_STEPS.format(name))


def new_tokens(key: str, value: Any, converted: Converted) -> None:
    converted.values["model.new_tokens"] = [*value]


TABLE: Table = {
    "base_model": option("model.path", str), "adapter": method, "load_in_4bit": four_bits,
    "load_in_8bit": note("no 8-bit base here; the base is dense, or in 4 bits with method qlora"),
    "lora_r": option("lora.rank", int), "lora_alpha": option("lora.alpha", float), "lora_dropout": option("lora.dropout", float),
    "lora_target_linear": option("lora.target_modules", lambda value: "all-linear"), "lora_target_modules": shared_options.targets,
    "lora_modules_to_save": option("lora.modules_to_save", shared_options.list_of), "lora_model_dir": option("lora.path", str),
    "peft_use_dora": option("lora.dora", bool), "peft_use_rslora": option("lora.rslora", bool),
    "peft_init_lora_weights": shared_options.adapter_start, "loraplus_lr_ratio": option("optim.loraplus_lr_ratio", float),
    "datasets": datasets, "test_datasets": datasets, "val_set_size": shared_options.validation_share,
    "train_on_inputs": option("data.train_on", lambda value: "all"), "tokens": new_tokens,
    "chat_template": note("the tokenizer's own template is used; data.chat_template names a Jinja file"),
    "chat_template_jinja": note("write it to a file, and name that in data.chat_template"),
    "special_tokens": note("the tokenizer's own are used"), "eot_tokens": note("read from the chat template"),
    "num_epochs": option("epochs", float), "optimizer": choice("optim.name", shared_options.OPTIMIZERS, "not here; AdamW is used"),
    "lr_scheduler": choice("optim.lr_scheduler", shared_options.SCHEDULES, "not here; the schedule is cosine"),
    "evals_per_epoch": per_epoch("eval.every"), "saves_per_epoch": per_epoch("checkpoint.every"),
    "early_stopping_patience": option("eval.patience", int), "wandb_project": option("logging.wandb_project", str),
    "trust_remote_code": option("model.trust_remote_code", bool), "dataset_processes": option("data.num_proc", int),
    "use_dynamic_finetuning": option("retention.token_weighting", lambda value: "dft"),
    "use_eaft": option("retention.token_weighting", lambda value: "eaft"),
    "excess_length_strategy": choice("data.on_overlong", {"drop": "drop", "truncate": "truncate", "raise": "error"}, "not here"),
    "flash_attention": note(ATTENTION), "sdp_attention": note(ATTENTION), "xformers_attention": note(ATTENTION),
    "flex_attention": note(ATTENTION), "attn_implementation": note(ATTENTION), "eager_attention": note(ATTENTION),
    "flash_attn_cross_entropy": note(KERNELS), "flash_attn_rms_norm": note(KERNELS), "flash_attn_fuse_mlp": note(KERNELS),
    "flash_attn_fuse_qkv": note(KERNELS), "lora_mlp_kernel": note(KERNELS), "lora_qkv_kernel": note(KERNELS),
    "lora_o_kernel": note(KERNELS),
    "plugins": note(KERNELS), "cut_cross_entropy": note(KERNELS), "fsdp_version": note(DEVICES), "tensor_parallel_size": note(DEVICES),
    "context_parallel_size": note(DEVICES), "unfrozen_parameters": note("all weights are trained, or an adapter"),
    "use_kernels": note(KERNELS), "activation_offloading": note("not here; activation_checkpointing saves memory"),
    "tokenizer_use_mistral_common": note("the tokenizer of the model's folder is used"), "peft": loftq,
    "model_quantization_config": note("a checkpoint in NF4 stays as it is, with method qlora; others load as in transformers"),
    "loss_watchdog_threshold": note("a loss that is not finite ends the run; no other limit"),
    "rl": note("preferences and rewards are not trained here; only answers"),
    "group_by_length": note(PACKS),
    **shared_options.without_effect(
        "sample_packing", "eval_sample_packing", "pad_to_sequence_len", "sequence_len", "micro_batch_size", "model_type", "tokenizer_type",
        "is_llama_derived_model", "is_mistral_derived_model", "strict", "dataset_prepared_path", "wandb_entity", "wandb_watch",
        "wandb_name", "wandb_run_id", "wandb_log_model", "local_rank", "debug", "xformers", "eval_table_size", "eval_batch_size",
        "eval_max_new_tokens", "loss_watchdog_patience", "experimental_skip_move_to_device", "model_quantization_config_kwargs",
        "cosine_min_lr_ratio", "lora_fan_in_fan_out", "save_first_step", "bfloat16", "shuffle_merged_datasets", "liger_rope",
        "liger_rms_norm", "liger_glu_activation", "liger_layer_norm", "liger_fused_linear_cross_entropy", "multipack_real_batches",
        "sample_packing_sequence_len_safety_factor", "save_safetensors", "auto_resume_from_checkpoints"),
}


def convert(theirs: Mapping[str, Any]) -> Converted:
    """Convert a configuration of Axolotl."""
    converted = Converted({"method": "full"})
    table = {**shared_options.HUGGING_FACE, **TABLE}
    first = [key for key in ("adapter", "base_model") if key in theirs]  # 4 bits mean something beside an adapter alone
    apply(table, {key: theirs[key] for key in [*first, *(key for key in theirs if key not in first)]}, converted)
    if theirs.get("sample_packing") is False:
        converted.note("sample_packing", False, PACKS)
    if theirs.get("load_in_8bit") is True and converted.values["method"] == "lora":
        converted.notes.append("method: lora trains beside a dense base; choose qlora if it does not fit")
    converted.values.setdefault("data.on_overlong", "drop")  # as Axolotl does
    shared_options.set_batch(converted, shared_options.integer(theirs, "micro_batch_size", 1),
                             shared_options.integer(theirs, "gradient_accumulation_steps", 1),
                             shared_options.integer(theirs, "sequence_len", 2048), theirs.get("sample_packing") is True)
    if "eval.patience" in converted.values and "eval.every" not in converted.values:
        converted.note("early_stopping_patience", converted.values.pop("eval.patience"), "set eval.every beside eval.patience")
    ratio = theirs.get("cosine_min_lr_ratio")
    shared_options.end_of_schedule(theirs, converted, float(ratio) if shared_options.is_number(ratio) else 0.0)
    return converted
