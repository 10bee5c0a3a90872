"""Convert options that several trainers share: batch sizes, optimizers, schedules, names of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.conversion.rules import Converted, Rule, choice, is_set, note, option, silent

OPTIMIZERS = {name: "adamw" for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused", "adamw_torch_8bit")} \
    | {name: "adamw_8bit" for name in ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")} \
    | {name: "adamw" for name in ("paged_adamw_32bit", "paged_adamw")} | {"muon": "muon"}
SCHEDULES = {"cosine": "cosine", "cosine_with_restarts": "cosine_with_restarts", "cosine_with_min_lr": "cosine", "linear": "linear",
             "constant": "constant", "constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
PACKS = "samples are always packed here, and never see each other"
ATTENTION = "attention is chosen by the installed packages, and printed"
KERNELS = "fused kernels are used wherever the model's family has them"
DEVICES = "for several GPUs start with torchrun --nproc_per_node; fsdp.enabled shards weights"
HUB = "add --export.push_to_hub NAME to the command, once you are logged in"
BY_STEPS = "set it in steps: {}"


def list_of(value: Any) -> list[str]:
    """Return the entries of a list, or of a text with commas."""
    if isinstance(value, (list, tuple)):
        return [*map(str, value)]
    return [part.strip() for part in str(value).split(",") if part.strip()]


def targets(key: str, value: Any, converted: Converted) -> None:
    """Set the layers that an adapter is put on."""
    names = list_of(value)
    converted.values["lora.target_modules"] = "all-linear" if names in (["all"], ["all-linear"]) else names


def without_effect(*keys: str) -> dict[str, Rule]:
    """Return rules for options that have no meaning here and change no result, or that are read elsewhere."""
    return dict.fromkeys(keys, silent)


def validation_share(key: str, value: Any, converted: Converted) -> None:
    """Set the share of the rows that is held out; a number of rows has no counterpart."""
    if is_number(value) and 0 < value < 1:
        converted.values["data.eval_fraction"] = float(value)
    elif value != 0:
        converted.note(key, value, "set data.eval_fraction, a share, or data.eval, a file")


def save_strategy(key: str, value: Any, converted: Converted) -> None:
    if value == "epoch":
        converted.note(key, value, BY_STEPS.format("checkpoint.every"))


def eval_strategy(key: str, value: Any, converted: Converted) -> None:
    if value == "epoch":
        converted.note(key, value, BY_STEPS.format("eval.every"))


def whole_steps(name: str) -> Rule:
    """Return the rule of an interval: in steps; a share of the run has no counterpart."""
    def rule(key: str, value: Any, converted: Converted) -> None:
        if isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and value >= 1:
            converted.values[name] = int(value)
        else:
            converted.note(key, value, BY_STEPS.format(name))
    return rule


def warmup_steps(key: str, value: Any, converted: Converted) -> None:
    """Set the warm-up; transformers 5 takes a share of the steps here too."""
    if isinstance(value, float) and value < 1:
        converted.values["optim.warmup_ratio"] = value
    else:
        converted.values["optim.warmup_steps"] = int(value)


def report_to(key: str, value: Any, converted: Converted) -> None:
    names = list_of(value)
    if "wandb" in names:
        converted.values.setdefault("logging.wandb_project", "steadfast")
    for name, ours in (("trackio", "logging.trackio_project"), ("mlflow", "logging.mlflow_experiment")):
        if name in names:
            converted.values[ours] = "steadfast"
    if others := [name for name in names if name not in ("wandb", "tensorboard", "trackio", "mlflow", "all", "none")]:
        converted.note(key, others, "logs go to TensorBoard, Weights & Biases, trackio and MLflow")


def adapter_start(key: str, value: Any, converted: Converted) -> None:
    """Set how an adapter starts, in PEFT's names."""
    names = {True: None, "gaussian": "gaussian", "eva": "eva", "olora": "olora", "pissa": "pissa", "loftq": "loftq"}
    name = "pissa_niter_4" if str(value).startswith("pissa_niter_") else names.get(value, "")
    if name:
        converted.values["lora.init"] = name
    elif name == "":
        converted.note(key, value, "not here; A starts at random and B at 0")


def bf16(key: str, value: Any, converted: Converted) -> None:
    converted.values["precision"] = "auto" if value == "auto" else "bf16"


def checkpointing(key: str, value: Any, converted: Converted) -> None:
    converted.values["activation_checkpointing"] = "full"


HUGGING_FACE: dict[str, Rule] = {  # transformers' TrainingArguments
    "output_dir": option("output", str), "num_train_epochs": option("epochs", float),
    "max_steps": lambda key, value, converted: converted.set(max_steps=int(value)) if int(value) > 0 else None,
    "learning_rate": option("optim.lr", float), "weight_decay": option("optim.weight_decay", float),
    "adam_beta1": option("optim.beta1", float), "adam_beta2": option("optim.beta2", float), "adam_epsilon": option("optim.eps", float),
    "max_grad_norm": option("optim.max_grad_norm", float),
    "warmup_ratio": option("optim.warmup_ratio", float), "warmup_steps": warmup_steps,
    "optim": choice("optim.name", OPTIMIZERS, "not here; AdamW is used"),
    "lr_scheduler_type": choice("optim.lr_scheduler", SCHEDULES, "not here; the schedule is cosine"),
    "seed": option("seed", int), "data_seed": note("seed draws the order of the data too"),
    "bf16": bf16, "fp16": note("not here; computation is in bf16 on a GPU that has it, else in fp32"),
    "gradient_checkpointing": checkpointing, "torch_compile": lambda key, value, converted: converted.set(compile=True),
    "logging_steps": whole_steps("logging.every"), "save_steps": whole_steps("checkpoint.every"),
    "save_total_limit": option("checkpoint.keep", int), "eval_steps": whole_steps("eval.every"),
    "save_strategy": save_strategy, "eval_strategy": eval_strategy, "evaluation_strategy": eval_strategy, "report_to": report_to,
    "neftune_noise_alpha": option("optim.neftune_noise_alpha", float), "use_liger_kernel": note(KERNELS),
    "push_to_hub": note(HUB), "hub_model_id": note(HUB), "deepspeed": note(DEVICES), "fsdp": note(DEVICES), "fsdp_config": note(DEVICES),
    "resume_from_checkpoint": note("add --resume auto to the command"), "group_by_length": note(PACKS),
    "label_smoothing_factor": note("not here"),
    **without_effect(
        "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "gradient_checkpointing_kwargs",
        "do_train", "do_eval", "overwrite_output_dir", "ddp_timeout", "log_level", "logging_strategy", "logging_first_step", "hub_strategy",
        "dataloader_num_workers", "remove_unused_columns", "lr_scheduler_kwargs", "tf32", "run_name", "average_tokens_across_devices",
        "save_only_model", "save_safetensors", "ddp_find_unused_parameters", "dataloader_pin_memory", "include_num_input_tokens_seen",
        "eval_on_start", "load_best_model_at_end", "metric_for_best_model"),
}


def set_batch(converted: Converted, samples: int, accumulated: int, length: int, packed: bool) -> None:
    """Set the batch in tokens: a pack for what a device held at once, a step for what it accumulated."""
    converted.values |= {"data.max_length": length, "batch.tokens_per_pack": samples * length,
                         "batch.tokens_per_step": samples * length * accumulated}
    if not packed:
        converted.notes.append(f"batch of {samples * accumulated} samples: a step has {samples * length * accumulated:,} tokens here, as "
                               "many as that many of the longest samples; lower batch.tokens_per_step if yours are shorter")


def end_of_schedule(theirs: Mapping[str, Any], converted: Converted, ratio: float = 0.0) -> None:
    """Set the end of a cosine or linear schedule, which is 0 elsewhere and a tenth of the peak here."""
    kwargs = theirs.get("lr_scheduler_kwargs") or {}
    if converted.values.get("optim.lr_scheduler") == "cosine_with_restarts" and isinstance(kwargs, Mapping):
        converted.values["optim.num_cycles"] = integer(kwargs, "num_cycles", 1)
    if converted.values.get("optim.lr_scheduler", "cosine") in ("cosine", "linear", "cosine_with_restarts"):
        converted.values["optim.min_lr_ratio"] = float(kwargs.get("min_lr_rate", ratio)) if isinstance(kwargs, Mapping) else ratio


def one_source(sources: list[dict]) -> str | list:
    """Return sources in their shortest form: a path alone where nothing else is said."""
    short = [source["path"] if len(source) == 1 else source for source in sources]
    return short[0] if len(short) == 1 and isinstance(short[0], str) else short


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def integer(theirs: Mapping[str, Any], key: str, default: int) -> int:
    """Return an option that is a whole number."""
    value = theirs.get(key)
    return int(value) if is_set(value) and is_number(value) else default
