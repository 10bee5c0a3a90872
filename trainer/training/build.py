"""Build a run in steps: model, measurements of the base, optimizer, initial state, run folder and log."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.config import Config
from trainer.data.batch import NO_PADDING, PadTo
from trainer.data.prepare import TrainingData, data_summary, eval_set_line, note_lines, plan_steps
from trainer.data.samples import Samples
from trainer.data.step_plan import StepPlan
from trainer.errors import UserError, printable, require
from trainer.evaluation.items import ItemFile
from trainer.metrics.log import Log
from trainer.metrics.throughput import model_size, peak_flops
from trainer.model import lora, quantization, router_balance, sharding, text_part
from trainer.model.bitsandbytes_cpu_check import refuse_misread_layers
from trainer.model.forward import apply_activation_checkpointing, padding_for, unwrap_peft
from trainer.model.loading import load_model, weights_fingerprint
from trainer.model.neftune import add_noise
from trainer.model.patch import PatchReport, patch
from trainer.model.vocabulary import new_tokens
from trainer.on_policy.engines import InMemory
from trainer.on_policy.responder import Responder
from trainer.on_policy.sdft import retention_of
from trainer.optim.adamw import FlatAdamW
from trainer.optim.apart import apart
from trainer.optim.sharded_adamw import ShardedAdamW
from trainer.retention import cached_base, kl, monitor, token_weighting
from trainer.retention.base_losses import base_losses, order_fingerprint
from trainer.retention.kl import KlToBase
from trainer.retention.monitor import ForgettingMonitor
from trainer.runtime import checkpoint
from trainer.runtime.device import compute_dtype, dtype_name, fast_bf16
from trainer.runtime.distributed import Distributed
from trainer.training import lora_start, run_folder, show_answers
from trainer.training.export_trial import try_export
from trainer.training.loader import StepLoader
from trainer.training.on_policy_loader import OnPolicyLoader
from trainer.training.training_run import TrainingRun


@dataclass
class BaseMeasurements:
    """Results of running the base, before training changes it."""

    samples: Samples  # with the weights and masks that the base gives their tokens
    kl: KlToBase | None
    monitor: ForgettingMonitor | None
    summary_lines: list[str]


def build(config: Config, data: TrainingData, device: torch.device, dist: Distributed, items: Sequence[ItemFile],
          tokenizer: PreTrainedTokenizerBase) -> tuple[TrainingRun, checkpoint.State]:
    """Return a run that is ready to train, and the state it starts from.

    The state is a fresh one, or that of the newest checkpoint if the run resumes. Opens the run folder and prints the start summary. Raises
    UserError for anything that the user can mend, so also for what would fail only at the export.
    """
    output = Path(config.output)
    model, patched = build_model(config, device)
    size, pad_to = model_size(model), padding_for(model)
    ended = config.resume != "never" and checkpoint.has_ended(checkpoint.newest(output / "checkpoints"))
    dist.on_main(lambda: try_export(config, model, tokenizer, ended))
    if config.lora.init in ("eva", "loftq") and not ended:
        print_lines([lora_start.from_inputs(model, data.samples, device) if config.lora.init == "eva" else
                     lora_start.from_quantization_error(model, config)])
    balance = router_balance.prepare(config.router_aux_loss_coef, model)
    identity = run_identity(config, data, items, dist)
    if config.data.curriculum == "loss":
        data, identity = order_by_base_loss(config, data, identity, model, device, dist)
    base = (BaseMeasurements(data.samples, None, monitor.unscored(config, items, model, data.template), []) if ended else
            measure_base(config, data, items, identity, model, device, dist))
    showing = show_answers.ask_base(config, data, items, model) if dist.is_main else None
    data = replace(data, samples=base.samples)
    whole = shard_model(config, model, device, dist) if dist.sharded else None
    optimizer = build_optimizer(config, model, dist)
    if config.compile:
        compile_layers(model)
    state = load_or_start(output, config.resume, identity, optimizer, dist)
    summary = data_summary(data, config) | {
        "model": {"path": config.model.path or config.model.config, "family": patched.family, "parameters": size.parameters,
                  "trainable": size.trainable},
        "backends": patched.backends}
    open_folder = partial(run_folder.open_run, output, config, summary, fresh=not state.step)
    dist.on_main(open_folder)
    if dist.is_main:
        print_summary(config, data, summary, patched, pad_to, device)
        print_lines(base.summary_lines + ([showing.describe()] if showing else []))
        print_lines([str(balance)] if balance else [])
        print_lines([f"resuming from step {state.step}" + (", the last one: only the export is left" if state.ended else "")]
                    if state.step else [])
        print_lines([sharding.describe(config.fsdp, dist.size)] if dist.sharded else [])
    log = Log(output, config, data.plan.total, state.step, open_folder) if dist.is_main and not state.ended else None
    loader = StepLoader(data.plan, base.samples, dist, device, base.kl, pad_to)
    if data.demonstrations:
        loader = answering(loader, config, data, model)
    return TrainingRun(config, output, device, dist, model, size, optimizer, data.plan, loader, base.kl, base.monitor, data.eval_set,
                       log, balance, showing, whole), state


def require_packs_for_all_ranks(plan: StepPlan, dist: Distributed) -> None:
    """Raise UserError unless every rank gets as many packs of a step."""
    if plan.packs_per_step % dist.size:
        capacity = plan.batch_size.tokens_per_pack
        raise UserError(f"batch.tokens_per_step: expected a multiple of {dist.size * capacity}, one pack of {capacity} tokens for each of "
                        f"the {dist.size} ranks, got {plan.batch_size.tokens_per_step}")


# ---------------------------------------------------------------- the steps of building


def build_model(config: Config, device: torch.device) -> tuple[nn.Module, PatchReport]:
    """Load the model, add the adapter, replace layers by fused ones, and set up activation checkpointing."""
    model, tokenizer = load_model(config, device, on_host=config.fsdp.enabled and config.method != "qlora")
    torch.manual_seed(config.seed)
    if config.method != "full":
        model = lora.add_adapter(model, config.lora, tokenizer.convert_tokens_to_ids(new_tokens(config.model)))
    patched = patch(model, config.model.fused_kernels, device)
    refuse_misread_layers(lora.unfused_layers(model, config.model.fused_kernels))
    patched.backends |= text_part.describe(unwrap_peft(model)) | quantization.describe(model) | lora.describe(model)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    add_noise(model, config.optim.neftune_noise_alpha)
    return model, patched


def run_identity(config: Config, data: TrainingData, items: Sequence[ItemFile], dist: Distributed) -> dict:
    """Return all that decides what a run computes.

    A checkpoint, or cached base states, serve only a run of the same identity.
    """
    return checkpoint.identity(
        config, dist.size, samples=data.samples.fingerprint, eval_samples=data.eval_set.samples.fingerprint if data.eval_set else None,
        base_weights=weights_fingerprint(config.model), quantizer=quantization.bitsandbytes_version(config),
        items=monitor.fingerprint(items), **({"demonstrations": data.demonstrations.fingerprint} if data.demonstrations else {}))


def order_by_base_loss(config: Config, data: TrainingData, identity: dict, model: nn.Module, device: torch.device,
                       dist: Distributed) -> tuple[TrainingData, dict]:
    """Return the data with steps from easy to hard for the base, and the identity with that order.

    `model` is still the base here.
    """
    is_domain = np.array([part.role == "domain" for part in data.mixture.parts])[data.samples.sources]
    losses = base_losses(data.samples, is_domain, model, config.batch, Path(config.output), identity, device, dist)
    plan = plan_steps(config, data.samples, data.mixture, losses)
    return replace(data, plan=plan), identity | {"curriculum_order": order_fingerprint(losses)}


def measure_base(config: Config, data: TrainingData, items: Sequence[ItemFile], identity: dict, model: nn.Module, device: torch.device,
                 dist: Distributed) -> BaseMeasurements:
    """Run the base to score items, to weight tokens and to cache its hidden states, as the run needs it.

    Invariant: `model` is still the base here (with an adapter: the base is the model with the adapter switched off). So this comes before
    a checkpoint is loaded and before the first step, also in a resumed run, which measures the same base again.

    Order: the KL's states are cached last, since they are those of the samples whose tokens have been weighted and masked.
    """
    roles = [source.role for source in data.mixture.parts]
    forgetting = monitor.prepare(config, items, model, data.template, dist)
    samples, weighting_line = token_weighting.apply_token_weighting(data.samples, config, model, roles, device, dist)
    kl_to_base = kl.prepare(retention_of(config), model, roles, in_step=dist.sharded)
    if config.retention.caches_base:
        kl_to_base = cached_base.with_cached_base(kl_to_base, samples, data.plan, Path(config.output), identity, device, dist)
    lines = [weighting_line] if weighting_line else []
    if forgetting and dist.is_main:
        lines += forgetting.describe()
    return BaseMeasurements(samples, kl_to_base, forgetting, lines)


def answering(loader: StepLoader, config: Config, data: TrainingData, model: nn.Module) -> OnPolicyLoader:
    """Return a loader that lets the model answer before the steps that train on the answers.

    Raises UserError for several processes.
    """
    require(loader.dist.size == 1, "on_policy.method", "one process, started without torchrun, beside sdft", loader.dist.size)
    folder, chosen = Path(config.output) / "answers", config.on_policy
    if config.resume == "never" or checkpoint.newest(Path(config.output) / "checkpoints") is None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that never came to its first checkpoint
    responder = Responder(InMemory(model, data.template, config.compile), folder, chosen.max_tokens, config.data.max_length, config.seed,
                          data.template.tokenizer)
    return OnPolicyLoader(loader, data.demonstrations, responder, chosen.every)


def shard_model(config: Config, model: nn.Module, device: torch.device, dist: Distributed) -> nn.Module:
    """Shard the model over the ranks, and return a copy without weights, to gather them into.

    Raises UserError.
    """
    if config.method != "full":
        dist.broadcast([p.data for p in model.parameters() if p.requires_grad])
    whole = sharding.weightless_copy(model)
    sharding.shard(model, config.fsdp, compute_dtype(config.precision, device), device, dist)
    return whole


def build_optimizer(config: Config, model: nn.Module, dist: Distributed) -> FlatAdamW | ShardedAdamW:
    """Make the optimizer, give all ranks the weights of rank 0, and note where L2-SP pulls them back to."""
    if dist.sharded:
        optimizer = ShardedAdamW(model.named_parameters(), config.optim)
        optimizer.enable_l2_sp(config.retention.l2_sp)
        return optimizer
    optimizer = FlatAdamW(model.parameters(), config.optim, apart(model, config), {p: name for name, p in model.named_parameters()})
    dist.broadcast([group.master.data for group in optimizer.groups])
    optimizer.publish()
    optimizer.enable_l2_sp(config.retention.l2_sp)
    return optimizer


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer by itself: they are alike, so one graph serves all."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)


def load_or_start(output: Path, resume: str, identity: dict, optimizer: FlatAdamW | ShardedAdamW, dist: Distributed) -> checkpoint.State:
    """Return the state of the newest checkpoint, loaded into the optimizer, or a fresh one.

    Raises UserError if ranks see different checkpoints.
    """
    last = checkpoint.newest(output / "checkpoints")
    fresh = resume == "never" or last is None
    state = checkpoint.State(identity) if fresh else checkpoint.load(last, identity, optimizer, dist.sharded)
    saved, state.identity = state.identity, identity
    if dist.is_main and saved["ranks"] != dist.size:
        print(f"resuming with {dist.size} ranks from {saved['ranks']}: sums over packs round in another order, dropout draws other masks")
    if len(set(dist.gather(state.step))) > 1:  # all ranks see it, so all stop
        raise UserError(f"resume: expected one run folder that all ranks see, found different checkpoints in {output}; "
                        "put --output on a shared disk")
    return state


# ---------------------------------------------------------------- the start summary


def print_summary(config: Config, data: TrainingData, summary: dict, patched: PatchReport, pad_to: PadTo, device: torch.device) -> None:
    """Print what is trained on what, and on which device."""
    dtype, model, plan = compute_dtype(config.precision, device), summary["model"], data.plan
    lines = [f"device: {device_name(device)}; compute {dtype_name(dtype)}, fp32 masters; peak {peak_flops(device, dtype)[1]}"]
    if config.precision == "auto" and device.type == "cpu" and fast_bf16():
        lines.append("hint: this CPU has bf16 matmuls; a step is about twice as fast with --precision bf16")
    lines += [str(patched), f"parameters: {model['parameters']:,}, trained {model['trainable']:,} ({config.method})"]
    lines += [source_line(source) for source in summary["sources"]] + note_lines(summary["sources"])
    if config.on_policy.method != "none":
        lines.append(f"on_policy: sdft; the model answers every {config.on_policy.every} steps, and the base, shown the chats' answers, "
                     "teaches it on its own")
    lines += kl.describe(retention_of(config), config.method, model["parameters"] * dtype.itemsize)
    if data.eval_set:
        lines.append(eval_set_line(data))
    padded = f", padded to multiples of {pad_to.tokens}" if pad_to != NO_PADDING else ""
    lines.append(f"plan: {plan.total} steps of {plan.packs_per_step} packs of {config.batch.tokens_per_pack} tokens{padded}")
    print_lines(lines)


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(printable(line), flush=True)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def source_line(source: dict) -> str:
    s = source
    return (f"{s['role']} {s['name']}: {s['samples']:,} samples, {s['share_samples']:.1%} of samples, {s['share_tokens']:.1%} of tokens; "
            f"dropped {s['dropped']}, truncated {s['truncated']}, split {s['split']}, "
            f"unsupervised {s['unsupervised']}, refused {s['refused']}")
