"""Print samples, masks, sources, packing, steps and estimated memory, and train nothing: `--dry_run`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trainer.config import Config
from trainer.data.prepare import TrainingData, data_summary, eval_set_line, note_lines
from trainer.errors import printable
from trainer.metrics.throughput import model_size
from trainer.model import router_balance
from trainer.model.loading import meta_model
from trainer.model.lora import add_adapter, describe
from trainer.model.vocabulary import new_tokens
from trainer.on_policy.sdft import retention_of
from trainer.retention import cached_base, kl
from trainer.runtime.device import compute_dtype, dtype_name
from trainer.training import sharded_estimate
from trainer.training.export_trial import try_export
from trainer.training.memory_estimate import estimate

SHOWN_CHARACTERS = 1200  # of each sample, and half as many of each part of it that is not supervised
GREEN, BOLD, PLAIN = "\033[32m", "\033[1m", "\033[0m"


def print_dry_run(config: Config, data: TrainingData, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the page. Raises UserError for whatever would have stopped the run."""
    model = meta_model(config)
    if config.method != "full":
        with torch.device("meta"):
            model = add_adapter(model, config.lora, tokenizer.convert_tokens_to_ids(new_tokens(config.model)))
    balance = router_balance.prepare(config.router_aux_loss_coef, model)
    summary = data_summary(data, config)
    _print_samples(data, config.seed)
    _print_sources(summary["sources"])
    _print_plan(data, summary, config.data.max_length)
    size, dtype = model_size(model), compute_dtype(config.precision, device)
    for line in [*kl.describe(retention_of(config), config.method, size.parameters * dtype.itemsize), *([str(balance)] if balance else [])]:
        print(line)
    if config.retention.caches_base:
        kl_to_base = kl.prepare(config.retention, model, [source.role for source in data.mixture.parts])
        print(cached_base.size_line(Path(config.output), cached_base.cached_rows(kl_to_base, data.samples, data.plan, dtype)))
    if config.data.curriculum == "loss":
        print("curriculum: the base reads the domain's samples when the run starts; until then the plan above has them in random order")
    if config.replay_search.enabled:
        print("replay search: the mixture above has no replay.ratio; probe runs choose it, and retention.kl_weight, when the run starts")
    print(f"model: {size.parameters:,} parameters, trained {size.trainable:,} ({config.method}), compute {dtype_name(dtype)}")
    for name, text in describe(model).items():
        print(f"{name}: {text}")
    print(f"memory: {estimate(model, config, dtype, device)}")
    for line in sharded_estimate.describe(model, config, dtype, device):
        print(line)
    print(f"export: {try_export(config, model, tokenizer)}")
    print("dry run: the options, data and model fit together; nothing was trained")


def _print_samples(data: TrainingData, seed: int) -> None:
    """Print three samples; supervised tokens are green on a terminal, and in [[brackets]] elsewhere."""
    colour = sys.stdout.isatty()
    opening, closing = (GREEN, PLAIN) if colour else ("[[", "]]")
    samples = data.samples
    count = min(3, len(samples.lengths))
    for i in np.sort(np.random.default_rng(seed).choice(len(samples.lengths), count, replace=False)):
        ids, supervised = samples[i]
        pieces = [(printable(piece), on) for piece, on in data.template.segments(ids, supervised)]
        text = "".join(f"{opening}{piece}{closing}" if on else _shortened(piece) for piece, on in pieces)
        print(f"{BOLD * colour}sample {i} of {samples.names[samples.sources[i]]}: {len(ids)} tokens, "
              f"{samples.supervised[i]} supervised{PLAIN * colour}")
        print(text[:SHOWN_CHARACTERS] + (f"{PLAIN * colour} ..." if len(text) > SHOWN_CHARACTERS else ""))
        print()


def _shortened(text: str) -> str:
    """Return a text without its middle, if it is long.

    It would keep what is supervised from being shown.
    """
    rest = len(text) - SHOWN_CHARACTERS // 2
    half = SHOWN_CHARACTERS // 4
    return f"{text[:half]} ... ({rest:,} characters) ... {text[-half:]}" if rest > half else text


def _print_sources(sources: list[dict]) -> None:
    """Print a table of the sources, then their notes.

    It shows sizes, shares of an epoch, and what happened to overlong and other samples.
    """
    print(f"{'source':<20}{'role':<8}{'samples':>9}{'tokens':>12}{'supervised':>12}{'% samples':>11}{'% tokens':>10}"
          f"{'dropped':>9}{'truncated':>11}{'split':>7}{'unsupervised':>14}{'refused':>9}{'lost tokens':>13}")
    for s in sources:
        print(f"{s['name'][:19]:<20}{s['role']:<8}{s['samples']:>9,}{s['tokens']:>12,}{s['supervised'] / max(1, s['tokens']):>12.0%}"
              f"{s['share_samples']:>11.1%}{s['share_tokens']:>10.1%}{s['dropped']:>9,}{s['truncated']:>11,}{s['split']:>7,}"
              f"{s['unsupervised']:>14,}{s['refused']:>9,}{s['tokens_lost']:>13,}")
    for line in note_lines(sources):
        print(printable(line))


def _print_plan(data: TrainingData, summary: dict, max_length: int) -> None:
    lengths, plan = np.array(summary["lengths"]), data.plan
    low, middle, high = np.percentile(lengths, [10, 50, 90]).astype(int)
    print(f"lengths: median {middle}, 10% below {low}, 10% above {high}, longest {lengths.max()} of {max_length} allowed")
    print(f"packing: {len(summary['pack_fill'])} packs of {summary['tokens_per_pack']} tokens in the first epoch, "
          f"{summary['packing_efficiency']:.1%} full, no padding")
    if data.eval_set:
        print(printable(eval_set_line(data)))
    print(f"plan: {plan.total} steps of {plan.packs_per_step} packs, {plan.progress(plan.total):.3g} epochs")
