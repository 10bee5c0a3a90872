"""Convert a configuration of LLaMA-Factory.

Its data sets are looked up in dataset_info.json where that is at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.conversion import shared_options
from trainer.conversion.rules import Converted, Table, apply, note, option
from trainer.conversion.shared_options import ATTENTION, KERNELS, PACKS
from trainer.errors import UserError

INFO = "dataset_info.json"
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "tools": "tools"}  # theirs to Alpaca's
NO_OPTIMIZER = "not here; AdamW is used"
NO_SUCH = "not here; methods are lora, qlora and full"


def method(key: str, value: Any, converted: Converted) -> None:
    if value in ("lora", "full"):
        converted.values["method"] = "qlora" if converted.values["method"] == "qlora" and value == "lora" else value
    else:
        converted.note(key, value, NO_SUCH)


def bits(key: str, value: Any, converted: Converted) -> None:
    if value == 4:
        converted.values["method"] = "qlora"
    else:
        converted.note(key, value, "a base is dense, or in 4 bits with method qlora")


def pissa(key: str, value: Any, converted: Converted) -> None:
    converted.values["lora.init"] = "pissa_niter_4"  # their default has 16 iterations


def stage(key: str, value: Any, converted: Converted) -> None:
    if value == "pt":
        converted.notes.append("stage: pt: rows must be texts (a column text), which are trained on whole")
    elif value != "sft":
        raise UserError(f"stage: expected sft or pt, got {value}; preferences and rewards are not trained here")


TABLE: Table = {
    "stage": stage, "model_name_or_path": option("model.path", str), "adapter_name_or_path": option("lora.path", str),
    "trust_remote_code": option("model.trust_remote_code", bool), "quantization_bit": bits, "finetuning_type": method,
    "lora_rank": option("lora.rank", int), "lora_alpha": option("lora.alpha", float), "lora_dropout": option("lora.dropout", float),
    "lora_target": shared_options.targets, "additional_target": option("lora.modules_to_save", shared_options.list_of),
    "use_dora": option("lora.dora", bool), "use_rslora": option("lora.rslora", bool),
    "loraplus_lr_ratio": option("optim.loraplus_lr_ratio", float), "pissa_init": pissa,
    "template": note("the tokenizer's own template is used; data.chat_template names a Jinja file"),
    "enable_thinking": option("data.template_kwargs", lambda value: {"enable_thinking": bool(value)}),
    "train_on_prompt": option("data.train_on", lambda value: "all"), "mask_history": option("data.train_on", lambda value: "last"),
    "val_size": shared_options.validation_share, "mix_strategy": note("sets are concatenated; give each a weight"),
    "preprocessing_num_workers": option("data.num_proc", int),
    "use_dft_loss": option("retention.token_weighting", lambda value: "dft"),
    "use_asft_loss": lambda key, value, converted: converted.set(retention__token_weighting="dft", retention__kl_sources="domain"),
    "asft_alpha": option("retention.kl_weight", float),
    "use_eaft_loss": option("retention.token_weighting", lambda value: "eaft"),
    "flash_attn": note(ATTENTION), "use_unsloth": note(KERNELS), "enable_liger_kernel": note(KERNELS), "use_v1_kernels": note(KERNELS),
    "use_kt": note(KERNELS), "neat_packing": note(PACKS), "new_special_tokens": option("model.new_tokens", shared_options.list_of),
    **dict.fromkeys(("use_galore", "use_badam", "use_apollo", "use_adam_mini"), note(NO_OPTIMIZER)),
    "use_muon": option("optim.name", lambda value: "muon"),
    "add_tokens": option("model.new_tokens", shared_options.list_of), "streaming": note("data are read once into memory-mapped files"),
    **shared_options.without_effect(
        "dataset", "dataset_dir", "eval_dataset", "cutoff_len", "max_samples", "overwrite_cache", "packing", "plot_loss",
        "disable_gradient_checkpointing", "quantization_method", "double_quantization", "ray_run_name", "resize_vocab",
        "cache_dir", "tokenized_path", "pissa_iter", "pissa_convert"),
}


def convert(theirs: Mapping[str, Any], folder: Path) -> Converted:
    """Convert a configuration of LLaMA-Factory that lies in `folder`.

    Raises UserError for a stage that trains no answers.
    """
    converted = Converted({"method": "full"})
    apply({**shared_options.HUGGING_FACE, **TABLE}, theirs, converted)
    for key, name in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if theirs.get(key):
            converted.values[name] = sources(key, theirs, folder, converted)
    if converted.values["method"] != "full":
        converted.values.setdefault("lora.rank", 8)  # LLaMA-Factory's own defaults
        converted.values.setdefault("lora.alpha", 2.0 * converted.values["lora.rank"])
    if theirs.get("disable_gradient_checkpointing") is not True:
        converted.values["activation_checkpointing"] = "full"
    if theirs.get("use_asft_loss") is True:
        converted.values.setdefault("retention.kl_weight", 0.1)  # their default
    else:
        converted.values.pop("retention.kl_weight", None)
    converted.values.setdefault("data.on_overlong", "truncate")  # as LLaMA-Factory does
    shared_options.set_batch(converted, shared_options.integer(theirs, "per_device_train_batch_size", 1),
                             shared_options.integer(theirs, "gradient_accumulation_steps", 1),
                             shared_options.integer(theirs, "cutoff_len", 2048),
                             theirs.get("packing") is True or theirs.get("neat_packing") is True)
    shared_options.end_of_schedule(theirs, converted)
    return converted


def sources(key: str, theirs: Mapping[str, Any], folder: Path, converted: Converted) -> str | list:
    """Return the sources of a list of data sets."""
    info = read_info(theirs, folder)
    found = []
    for name in shared_options.list_of(theirs[key]):
        if name not in info:
            converted.note(key, name, f"no entry in a {INFO} beside the file or in dataset_dir; name a file or a hub data set instead")
            found.append({"path": name})
            continue
        found.append(source_of(info[name], info["folder"]) | ({"max_records": theirs["max_samples"]} if theirs.get("max_samples") else {}))
    return shared_options.one_source(found)


def read_info(theirs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return dataset_info.json with its folder under the key `folder`; empty where there is none."""
    named = theirs.get("dataset_dir") or "data"
    for place in (folder / named, Path(named), folder):
        if (place / INFO).is_file():
            try:
                found = json.loads((place / INFO).read_text(encoding="utf-8"))
                return {**found, "folder": place}
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"dataset_dir: expected a JSON object in {place / INFO}, found otherwise ({error})") from None
    return {}


def source_of(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the source of an entry of dataset_info.json."""
    path = str(folder / entry["file_name"]) if entry.get("file_name") else entry.get("hf_hub_url") or entry.get("script_url") or ""
    source: dict[str, Any] = {"path": path}
    columns = entry.get("columns") or {}
    if entry.get("formatting") == "sharegpt":
        tags, messages = entry.get("tags") or {}, columns.get("messages", "conversations")
        ours = "messages" if tags.get("role_tag") == "role" else "conversations"
        if messages != ours:
            source["columns"] = {ours: messages}
    elif mapped := {COLUMNS[name]: column for name, column in columns.items() if COLUMNS.get(name, column) != column}:
        source["columns"] = mapped
    if entry.get("subset"):
        source["subset"] = entry["subset"]
    if entry.get("split", "train") != "train":
        source["split"] = entry["split"]
    if entry.get("num_samples"):
        source["max_records"] = entry["num_samples"]
    return source
