"""Build a run: model, adapter, optimiser, run folder, and the state it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from trainer.config import Config
from trainer.data.batch import NO_PADDING, PadTo
from trainer.data.prepare import TrainingData, data_summary, heldout_line
from trainer.errors import UserError
from trainer.evaluation.items import ItemFile
from trainer.metrics.log import Log
from trainer.metrics.throughput import model_size, peak_flops
from trainer.model import lora, quantization
from trainer.model.bitsandbytes_cpu_check import refuse_misread_layers
from trainer.model.forward import apply_activation_checkpointing, padding_for
from trainer.model.loading import load_model, weights_fingerprint
from trainer.model.patch import PatchReport, patch
from trainer.optim.adamw import FlatAdamW
from trainer.retention import cached_base, kl, monitor, token_weighting
from trainer.runtime import checkpoint
from trainer.runtime.device import compute_dtype, dtype_name, fast_bf16
from trainer.runtime.distributed import Distributed
from trainer.training import run_folder
from trainer.training.job import Job


def require_work_for_all(inputs: TrainingData, dist: Distributed) -> None:
    if inputs.plan.packs_per_step % dist.size:
        pack = inputs.plan.batch.tokens_per_pack
        raise UserError(f"batch.tokens_per_step: expected a multiple of {dist.size * pack}, one pack of {pack} tokens for each of the "
                        f"{dist.size} ranks, got {inputs.plan.batch.tokens_per_step}")


def build(config: Config, inputs: TrainingData, device: torch.device, dist: Distributed,
          items: Sequence[ItemFile] = ()) -> tuple[Job, checkpoint.State]:
    """Model, adapter, patches, optimiser and run folder; from the newest checkpoint where the run goes on from one."""
    model, _ = load_model(config, device)
    torch.manual_seed(config.seed)
    if config.method != "full":
        model = lora.add_adapter(model, config.lora)
    patched = patch(model, config.model.fused_kernels)
    refuse_misread_layers(lora.unfused_layers(model, config.model.fused_kernels))
    patched.backends |= quantization.describe(model)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    fingerprint, roles = inputs.samples.fingerprint, [part.role for part in inputs.mixture.parts]
    watched = monitor.prepare(config, items, model, inputs.template, dist)
    samples, told = token_weighting.reweighted(inputs.samples, config, model, roles, device, dist)
    inputs, held, multiples = replace(inputs, samples=samples), kl.prepare(config.retention, model, roles), padding_for(model)
    optimizer = FlatAdamW(model.parameters(), config.optim)
    dist.broadcast([group.master.data for group in optimizer.groups])
    optimizer.publish()
    optimizer.enable_l2_sp(config.retention.l2)
    output, size = Path(config.output), model_size(model)
    heldout = inputs.heldout[0].fingerprint if inputs.heldout else None
    identity = checkpoint.identity(config, dist.size, samples=fingerprint, heldout_samples=heldout,
                                   base_weights=weights_fingerprint(config.model), quantizer=quantization.bitsandbytes_version(config),
                                   items=monitor.fingerprint(items))
    if config.retention.stores_base:  # while the model is still the base, which a checkpoint would end
        held = cached_base.store(held, samples, inputs.plan, output, identity, device, dist)
    if config.compile:
        compile_layers(model)
    state = start(output, config, identity, optimizer)
    if len(set(dist.gather(state.step))) > 1:  # all ranks see it, so all stop
        raise UserError(f"resume: ranks found different checkpoints in {output}; expected one folder that all of them see")
    facts = data_summary(inputs, config) | {
        "model": {"path": config.model.path or config.model.config, "family": patched.family, "parameters": size.parameters,
                  "trainable": size.trainable}, "backends": patched.backends}
    dist.on_main(lambda: run_folder.open_run(output, config, facts))
    log = None
    if dist.is_main:
        greet(config, facts, inputs, device, patched, multiples)
        for line in [*([told] if told else []), *(watched.describe() if watched else [])]:
            print(line, flush=True)
        if state.step:
            print(f"resuming from step {state.step}")
        log = Log(output, config, inputs.plan.total, state.step)
    return Job(config, output, model, size, optimizer, inputs.samples, inputs.plan, inputs.heldout, device, dist, log,
               held, watched, multiples), state


def start(output: Path, config: Config, identity: dict, optimizer: FlatAdamW) -> checkpoint.State:
    """A fresh state, or that of the newest checkpoint."""
    last = checkpoint.newest(output / "checkpoints")
    if config.resume == "never" or last is None:
        return checkpoint.State(identity)
    return checkpoint.load(last, identity, optimizer)


def greet(config: Config, facts: dict, inputs: TrainingData, device: torch.device, patched: PatchReport, multiples: PadTo) -> None:
    """Say, once, what runs where."""
    dtype, model = compute_dtype(config.precision, device), facts["model"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {name}; compute {dtype_name(dtype)}, fp32 masters; peak {peak_flops(device, dtype)[1]}")
    if config.precision == "auto" and device.type == "cpu" and fast_bf16():
        print("this CPU has bf16 products: with --precision bf16 a step takes about half the time")
    print(patched)
    print(f"parameters: {model['parameters']:,}, trained {model['trainable']:,} ({config.method})")
    for share in facts["sources"]:
        print(f"{share['role']} {share['name']}: {share['samples']:,} samples, {share['share_rows']:.1%} of rows, "
              f"{share['share_tokens']:.1%} of tokens; dropped {share['dropped']}, truncated {share['truncated']}, split {share['split']}")
    for line in kl.describe(config.retention, config.method, model["parameters"] * dtype.itemsize):
        print(line)
    if inputs.heldout:
        print(heldout_line(inputs))
    print(f"plan: {inputs.plan.total} steps of {inputs.plan.packs_per_step} packs of {config.batch.tokens_per_pack} tokens"
          + (f", filled up to multiples of {multiples.tokens}" if multiples != NO_PADDING else ""), flush=True)


def compile_layers(model: torch.nn.Module) -> None:
    """Compile each decoder layer by itself: they are alike, so one graph serves all."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)
