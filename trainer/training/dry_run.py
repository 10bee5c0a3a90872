"""`--dry_run`: everything that can be known before a run, on one page of terminal: samples as the model sees them, what was cut,
how packs fill, how long the run is, what it holds in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from trainer.config import Config
from trainer.data.prepare import TrainingData, data_summary, heldout_line
from trainer.metrics.throughput import model_size
from trainer.model.loading import meta_model
from trainer.model.lora import add_adapter
from trainer.retention import cached_base, kl
from trainer.runtime.device import compute_dtype, dtype_name
from trainer.training.memory_estimate import estimate

SHOWN_CHARACTERS = 1200  # of each sample
GREEN, DIM, BOLD, PLAIN = "\033[32m", "\033[2m", "\033[1m", "\033[0m"


def show(config: Config, inputs: TrainingData, device: torch.device) -> None:
    """Print the page. Raises UserError for whatever would have stopped the run."""
    model = meta_model(config)
    if config.method != "full":
        with torch.device("meta"):
            model = add_adapter(model, config.lora)
    _show_samples(inputs, config.seed)
    facts = data_summary(inputs, config)
    _show_sources(facts["sources"])
    _show_plan(inputs, facts, config)
    size, dtype = model_size(model), compute_dtype(config.precision, device)
    for line in kl.describe(config.retention, config.method, size.parameters * dtype.itemsize):
        print(line)
    if config.retention.stores_base:
        held = kl.prepare(config.retention, model, [part.role for part in inputs.mixture.parts])
        print(cached_base.announce(Path(config.output), cached_base.layout(held, inputs.samples, inputs.plan, dtype)))
    if config.replay.auto:
        print("replay.auto: the mixture above is without a ratio; probes choose it, and retention.kl, when the run starts")
    print(f"model: {size.parameters:,} parameters, trained {size.trainable:,} ({config.method}), compute {dtype_name(dtype)}")
    print(f"memory: {estimate(model, config, dtype, device)}")
    print("dry run: everything fits together; nothing was trained")


def _show_samples(inputs: TrainingData, seed: int) -> None:
    """Three samples; supervised tokens stand out: green on a terminal, between brackets elsewhere."""
    colour = sys.stdout.isatty()
    opening, closing = (GREEN, PLAIN) if colour else ("[[", "]]")
    samples = inputs.samples
    count = min(3, len(samples.lengths))
    for i in np.sort(np.random.default_rng(seed).choice(len(samples.lengths), count, replace=False)):
        ids, supervised = samples[i]
        pieces = inputs.template.segments(ids, supervised)
        text = "".join(f"{opening}{piece}{closing}" if on else piece for piece, on in pieces)
        print(f"{BOLD * colour}sample {i} of {samples.names[samples.sources[i]]}: {len(ids)} tokens, "
              f"{samples.supervised[i]} supervised{PLAIN * colour}")
        print(text[:SHOWN_CHARACTERS] + (f"{PLAIN * colour} ..." if len(text) > SHOWN_CHARACTERS else ""))
        print()


def _show_sources(sources: list[dict]) -> None:
    print(f"{'source':<20}{'role':<8}{'samples':>9}{'tokens':>12}{'superv.':>9}{'rows':>8}{'tokens':>8}"
          f"{'dropped':>9}{'trunc.':>8}{'split':>7}{'lost':>8}")
    for s in sources:
        print(f"{s['name'][:19]:<20}{s['role']:<8}{s['samples']:>9,}{s['tokens']:>12,}{s['supervised'] / max(1, s['tokens']):>9.0%}"
              f"{s['share_rows']:>8.1%}{s['share_tokens']:>8.1%}{s['dropped']:>9,}{s['truncated']:>8,}{s['split']:>7,}"
              f"{s['tokens_lost']:>8,}")


def _show_plan(inputs: TrainingData, facts: dict, config: Config) -> None:
    lengths = np.array(facts["lengths"])
    low, middle, high = np.percentile(lengths, [10, 50, 90]).astype(int)
    print(f"lengths: median {middle}, 10% below {low}, 10% above {high}, longest {lengths.max()} of {config.data.max_length} allowed")
    print(f"packing: {len(facts['pack_fill'])} packs of {facts['tokens_per_pack']} tokens in the first epoch, "
          f"{facts['packing_efficiency']:.1%} full, no padding")
    if inputs.heldout:
        print(heldout_line(inputs))
    print(f"plan: {inputs.plan.total} steps of {inputs.plan.packs_per_step} packs, {inputs.plan.progress(inputs.plan.total):.3g} epochs")
