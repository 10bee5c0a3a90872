"""Refuse values of options that no run can use, alone or beside others, in one line each."""

from __future__ import annotations

import re
import sys

from trainer.config import BatchSize, Config, Data, Optim, Source
from trainer.errors import require
from trainer.hub_names import is_hub_name

MOST_TOKENS = 2**31 - 1  # in a pack, whose positions are int32
MOST_PASSES = 100_000  # over the data: more are a typing mistake, and would take minutes to plan


def validate(config: Config) -> None:
    """Raise UserError, which names the option, for values that no run can use.

    The parser has checked their types.
    """
    for option, sources in (("data.train", config.data.train), ("data.eval", config.data.eval), ("replay.data", config.replay.data)):
        for source in [sources] if isinstance(sources, str) else sources:
            _validate_source(option, source)
    require(bool(config.output.strip()), "output", "a folder", "none")
    _validate_model(config)
    _validate_lora(config)
    require(config.optim.loraplus_lr_ratio == 1 or config.method != "full", "optim.loraplus_lr_ratio", "method lora or qlora beside it",
            "full")
    require(config.optim.name != "muon" or config.method == "full", "optim.name", "method full beside muon, as A and B are no layers' own "
            "matrices", config.method)
    _validate_data(config.data)
    _validate_batch(config.batch, config.data.max_length)
    require(config.replay.ratio is None or 0 <= config.replay.ratio < 1, "replay.ratio", "0 <= ratio < 1", config.replay.ratio)
    _validate_optim(config.optim)
    require(0 <= config.router_aux_loss_coef <= sys.float_info.max, "router_aux_loss_coef", "0 or more", config.router_aux_loss_coef)
    _validate_retention(config)
    _validate_on_policy(config)
    _validate_forgetting(config)
    if config.replay_search.enabled:
        _validate_replay_search(config)
    require(0 <= config.seed < 2**63, "seed", "0 <= seed < 2^63", config.seed)
    require(0 < config.epochs <= MOST_PASSES, "epochs", f"above 0, at most {MOST_PASSES:,}; to end after some steps, set max_steps",
            config.epochs)
    require(config.max_steps is None or config.max_steps >= 1, "max_steps", "1 or more", config.max_steps)
    _validate_intervals(config)
    _validate_export(config)
    if config.fsdp.enabled:
        _validate_fsdp(config)


def _validate_export(config: Config) -> None:
    export = config.export
    require(export.push_to_hub is None or is_hub_name(export.push_to_hub), "export.push_to_hub",
            "a name on the hub, such as me/support-lora", export.push_to_hub)
    require(not export.public or export.push_to_hub is not None, "export.public", "export.push_to_hub beside it", "none")
    require(export.gguf == "none" or config.method == "full" or export.format != "adapter", "export.gguf",
            "export.format merged or both beside it, as a GGUF file holds a whole model", export.format)
    require(export.llama_cpp is None or export.gguf != "none", "export.llama_cpp", "export.gguf beside it", "none")


def _validate_source(option: str, source: str | Source) -> None:
    require(not str(source).startswith(("[", "{")), option, "a path, or a list of sources in YAML", source)
    if isinstance(source, Source):
        require(0 < source.weight <= MOST_PASSES, f"{option}: weight of {source.path}", f"above 0, at most {MOST_PASSES:,}", source.weight)
        require(source.max_records is None or source.max_records >= 1, f"{option}: max_records of {source.path}", "1 or more",
                source.max_records)


def _validate_model(config: Config) -> None:
    model = config.model
    require((model.path is None) != (model.config is None), "model.path, model.config", "exactly one of them",
            "neither" if model.path is None else "both")
    require(model.config is None or config.method == "full", "method",
            "full beside model.config: an adapter on random weights has no base that others could load", config.method)
    beside_adapter = config.method != "full" and config.lora.path is None
    require(beside_adapter or not config.lora.modules_to_save, "lora.modules_to_save", "method lora or qlora, and no lora.path, beside it",
            config.method if config.method == "full" else "lora.path")
    require(not model.new_tokens or config.lora.path is None, "model.new_tokens", "no lora.path beside it, as a saved adapter has rows for "
            "its own tokens alone", "lora.path")


def _validate_lora(config: Config) -> None:
    """Refuse options of an adapter that do not compose."""
    lora, patterns = config.lora, config.lora.rank_pattern or config.lora.alpha_pattern
    require(all(rank >= 1 for rank in lora.rank_pattern.values()), "lora.rank_pattern", "ranks of 1 or more", lora.rank_pattern)
    require(all(alpha > 0 for alpha in lora.alpha_pattern.values()), "lora.alpha_pattern", "alphas above 0", lora.alpha_pattern)
    new = config.method != "full" and lora.path is None
    for option, is_set in (("lora.rank_pattern", lora.rank_pattern), ("lora.alpha_pattern", lora.alpha_pattern),
                           ("lora.init", lora.init != "default")):
        require(new or not is_set, option, "method lora or qlora, and no lora.path, beside it", "full" if config.method == "full" else
                "lora.path")
        require(not is_set or not lora.experts, option, "lora.experts false beside it, as PEFT has it for linear layers alone", "true")
    needs_base = (config.retention.kl_weight > 0 or config.retention.token_weighting in ("stm", "flow") or config.retention.l2_sp > 0
                  or bool(config.forgetting.general) or config.eval.show > 0 or config.data.curriculum == "loss")
    for unfit, what in ((config.method == "qlora", "method lora"), (lora.dora, "lora.dora false"),
                        (bool(lora.modules_to_save or config.model.new_tokens), "no lora.modules_to_save and model.new_tokens"),
                        (lora.rslora and bool(patterns), "no lora.rslora with patterns"),
                        (needs_base, "nothing that runs the base (KL, stm, flow, l2_sp, forgetting.general, eval.show, curriculum loss)")):
        require(not (lora.mutates_base and unfit), "lora.init", f"{what} beside {lora.init}, which takes its start out of the base's "
                "weights; choose default, or eva", lora.init)
    require(lora.init != "loftq" or (config.method == "qlora" and not lora.dora), "lora.init",
            "method qlora, and no lora.dora, beside loftq, which starts from the error of 4-bit weights", config.method)
    require(lora.init != "eva" or not (lora.dora or config.replay_search.enabled), "lora.init", "no lora.dora or replay_search beside eva",
            lora.init)


def _validate_data(data: Data) -> None:
    require(bool(data.train), "data.train", "at least one file, folder or hub data set", "none")
    require(data.max_length >= 2, "data.max_length", "2 tokens or more", data.max_length)
    require(0 <= data.eval_fraction < 1, "data.eval_fraction", "0 <= share < 1", data.eval_fraction)
    require(not (data.eval and data.eval_fraction), "data.eval, data.eval_fraction", "one of them", "both")
    require(data.num_proc >= 0, "data.num_proc", "0 or more", data.num_proc)


def _validate_batch(batch: BatchSize, max_length: int) -> None:
    require(batch.tokens_per_pack >= max_length, "batch.tokens_per_pack",
            f"at least data.max_length = {max_length}, so that every sample fits a pack", batch.tokens_per_pack)
    require(batch.tokens_per_pack <= MOST_TOKENS, "batch.tokens_per_pack", f"at most {MOST_TOKENS:,}", batch.tokens_per_pack)
    require(batch.tokens_per_step % batch.tokens_per_pack == 0 and batch.tokens_per_step > 0, "batch.tokens_per_step",
            f"a multiple of batch.tokens_per_pack = {batch.tokens_per_pack}", batch.tokens_per_step)
    require(batch.max_samples_per_pack >= 1, "batch.max_samples_per_pack", "1 or more", batch.max_samples_per_pack)


def _validate_optim(optim: Optim) -> None:
    require(optim.lr > 0, "optim.lr", "above 0", optim.lr)
    for name, ratio, steps in (("warmup", optim.warmup_ratio, optim.warmup_steps), ("decay", optim.decay_ratio, optim.decay_steps)):
        require(0 <= ratio < 1, f"optim.{name}_ratio", f"0 <= ratio < 1; for a number of steps set optim.{name}_steps", ratio)
        require(steps >= 0, f"optim.{name}_steps", f"1 or more, or 0 to use optim.{name}_ratio", steps)
    require(0 <= optim.beta1 < 1 and 0 <= optim.beta2 < 1, "optim.beta1, optim.beta2", "0 <= beta < 1", (optim.beta1, optim.beta2))
    require(optim.loraplus_lr_ratio > 0, "optim.loraplus_lr_ratio", "above 0", optim.loraplus_lr_ratio)
    require(0 <= optim.ema_decay < 1, "optim.ema_decay", "0 <= decay < 1", optim.ema_decay)
    require(optim.neftune_noise_alpha >= 0, "optim.neftune_noise_alpha", "0 or more", optim.neftune_noise_alpha)
    require(optim.num_cycles == 1 or optim.lr_scheduler == "cosine_with_restarts", "optim.num_cycles",
            "optim.lr_scheduler cosine_with_restarts beside it", optim.lr_scheduler)
    require(optim.num_cycles >= 1, "optim.num_cycles", "1 or more", optim.num_cycles)
    require(optim.eps > 0, "optim.eps", "above 0", optim.eps)
    require(optim.weight_decay >= 0, "optim.weight_decay", "0 or more", optim.weight_decay)
    require(optim.weight_decay * optim.lr <= 1, "optim.weight_decay", f"at most 1 / optim.lr = {1 / optim.lr:g}, at which a step ends at 0",
            optim.weight_decay)
    require(0 <= optim.min_lr_ratio <= 1, "optim.min_lr_ratio", "0 <= ratio <= 1", optim.min_lr_ratio)
    require(optim.max_grad_norm >= 0, "optim.max_grad_norm", "above 0, or 0 for no clipping", optim.max_grad_norm)


def _validate_intervals(config: Config) -> None:
    """Check the numbers of steps between logs, evaluations and checkpoints."""
    require(config.checkpoint.every >= 0, "checkpoint.every", "0 or more", config.checkpoint.every)
    require(config.checkpoint.keep >= 1, "checkpoint.keep", "1 or more", config.checkpoint.keep)
    require(config.logging.every >= 1, "logging.every", "1 or more", config.logging.every)
    profiled_steps(config.logging.profile_steps)
    every, patience = config.eval.every, config.eval.patience
    require(every >= 0 and patience >= 0, "eval.every, eval.patience", "0 or more", (every, patience))
    require(config.eval.show >= 0, "eval.show", "a number of prompts, 0 or more", config.eval.show)
    require(not patience or every > 0, "eval.patience", "eval.every above 0 beside it", every)


def _validate_retention(config: Config) -> None:
    retention, lr, finite = config.retention, config.optim.lr, sys.float_info.max
    require(0 <= retention.kl_weight <= finite, "retention.kl_weight", "0 or more", retention.kl_weight)
    require(0 <= retention.l2_sp <= finite, "retention.l2_sp", "0 or more", retention.l2_sp)
    require(retention.l2_sp * lr <= 1, "retention.l2_sp", f"at most 1 / optim.lr = {1 / lr:g}, at which a step goes all the way back",
            retention.l2_sp)
    require(1 < retention.stm_threshold <= finite, "retention.stm_threshold", "a perplexity above 1", retention.stm_threshold)
    needs_base = {"retention.kl_weight": retention.kl_weight > 0, "retention.l2_sp": retention.l2_sp > 0,
                  "retention.token_weighting": retention.token_weighting in ("stm", "flow"),
                  "forgetting.general": bool(config.forgetting.general), "eval.show": config.eval.show > 0,
                  "data.curriculum": config.data.curriculum == "loss"}
    for option, is_set in needs_base.items():
        require(not is_set or config.model.config is None, option, "model.path, as random weights are no base", "model.config")
    counts_replay = retention.kl_weight > 0 and retention.kl_sources == "replay"
    require(not counts_replay or (bool(config.replay.data) and config.replay.ratio != 0), "retention.kl_weight",
            "replay samples to count (replay.data, and a replay.ratio that is not 0), or retention.kl_sources=domain or all", "none")


def _validate_on_policy(config: Config) -> None:
    chosen = config.on_policy
    if chosen.method == "none":
        return
    for option, value in (("every", chosen.every), ("max_tokens", chosen.max_tokens)):
        require(1 <= value < 2**31, f"on_policy.{option}", "1 or more", value)
    require("{answer}" in chosen.prompt, "on_policy.prompt", "{answer}, the example that the base is shown", chosen.prompt)
    others = {
        "retention.kl_weight": (config.retention.kl_weight, 0), "retention.kl_positions": (config.retention.kl_positions, "supervised"),
        "retention.kl_mask_target": (config.retention.kl_mask_target, False),
        "retention.kl_reference": (config.retention.kl_reference, "live"),
        "retention.token_weighting": (config.retention.token_weighting, "none"), "data.eval_fraction": (config.data.eval_fraction, 0),
        "data.curriculum": (config.data.curriculum, "none"), "replay_search.enabled": (config.replay_search.enabled, False),
        "fsdp.enabled": (config.fsdp.enabled, False)}
    for option, (value, only) in others.items():
        require(value == only, option, f"{only} beside on_policy.method sdft", value)
    require(config.model.config is None, "on_policy.method", "model.path, as random weights teach nothing", "model.config")


def _validate_forgetting(config: Config) -> None:
    forgetting = config.forgetting
    for name, is_set in (("domain", forgetting.domain), ("every", forgetting.every), ("floor", forgetting.floor is not None)):
        require(bool(forgetting.general) or not is_set, f"forgetting.{name}", "general items, as forgetting.general, beside it", "none")
    floor = forgetting.floor
    require(floor is None or 0 < floor <= 1, "forgetting.floor", "a share of the base's accuracy, 0 < floor <= 1", floor)
    require(forgetting.every >= 0 and forgetting.patience >= 0, "forgetting.every, forgetting.patience", "0 or more",
            (forgetting.every, forgetting.patience))
    require(forgetting.max_tokens >= 1, "forgetting.max_tokens", "1 or more", forgetting.max_tokens)


def _validate_replay_search(config: Config) -> None:
    search, replay = config.replay_search, config.replay
    require(config.forgetting.floor is not None, "replay_search.enabled", "forgetting.general and forgetting.floor beside it", "no floor")
    require(bool(replay.data), "replay_search.enabled", "replay.data beside it", "none")
    require(replay.ratio is None, "replay_search.enabled, replay.ratio",
            "one of them: the search chooses from replay_search.ratios", "both")
    require(config.retention.kl_weight == 0, "replay_search.enabled, retention.kl_weight",
            "one of them: the search chooses from replay_search.kl_weights", "both")
    require(_rises(search.ratios) and 0 < search.ratios[0] and search.ratios[-1] < 1, "replay_search.ratios",
            "ratios above 0 and below 1, rising", search.ratios)
    require(_rises(search.kl_weights) and 0 <= search.kl_weights[0] and search.kl_weights[-1] < sys.float_info.max,
            "replay_search.kl_weights", "weights of 0 or more, rising", search.kl_weights)
    require(0 < search.probe_fraction <= 1, "replay_search.probe_fraction", "0 < fraction <= 1", search.probe_fraction)


def _validate_fsdp(config: Config) -> None:
    """Refuse what needs the whole model on one rank, or optimizer states that other shards could not read."""
    require(config.fsdp.shard_size >= 0, "fsdp.shard_size", "a number of ranks, or 0 for all", config.fsdp.shard_size)
    retention, weighting = config.retention, config.retention.token_weighting
    for option, value, usable in (
            ("optim.name", config.optim.name, config.optim.name == "adamw"),
            ("optim.loraplus_lr_ratio", config.optim.loraplus_lr_ratio, config.optim.loraplus_lr_ratio == 1),
            ("optim.ema_decay", config.optim.ema_decay, config.optim.ema_decay == 0),
            ("lora.init", config.lora.init, config.lora.init in ("default", "gaussian")),
            ("compile", config.compile, not config.compile),
            ("retention.kl_weight", retention.kl_weight, retention.kl_weight == 0 or config.method != "full"),
            ("retention.kl_reference", retention.kl_reference, not retention.caches_base),
            ("retention.token_weighting", weighting, weighting not in ("stm", "flow")),
            ("forgetting.general", config.forgetting.general, not config.forgetting.general),
            ("data.curriculum", config.data.curriculum, config.data.curriculum != "loss"),
            ("eval.show", config.eval.show, config.eval.show == 0)):
        require(usable, option, "its default beside fsdp.enabled, as sharded weights do not support it; remove one of them", value)


def _rises(values: list[float]) -> bool:
    return bool(values) and sorted(set(values)) == values


def profiled_steps(steps: str | None) -> range | None:
    """Parse `logging.profile_steps`, such as 20-25: steps from 1, as in log lines.

    The dash is there because YAML 1.1 reads 20:25 as the number 1225.
    """
    if steps is None:
        return None
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", steps)
    require(bool(match) and 1 <= int(match[1]) < int(match[2]), "logging.profile_steps",
            "FIRST-LAST, two steps with 1 <= FIRST < LAST, as in 20-25", steps)
    return range(int(match[1]), int(match[2]) + 1)
