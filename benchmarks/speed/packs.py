"""Time a step in packs beside one sample at a time, for hybrid models and mixtures of experts.

One sample at a time is what a model gets that cannot run packs: its samples go through it one by one, with the same adapters, loss and
optimizer. So the ratio is what packing gains. Models have random weights and some five million parameters; LoRA on all linear layers.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import record, show, timing
from benchmarks.harness.arguments import add_timing_arguments, check_names, check_timing
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.synthetic_models import adapted, log_normal_lengths, quiet, random_samples
from benchmarks.harness.timing import Contender, TokenSamples
from benchmarks.speed.contenders import Steadfast, in_memory, require_agreement
from trainer.model.forward import unwrap_peft
from trainer.model.mixers import runs_by_sample
from trainer.model.packed_attention import is_packed

VOCABULARY, RANK, LEARNING_RATE = 2048, 8, 1e-3
SAMPLES, MEAN_LENGTH, TOKENS_PER_STEP = 256, 100, 2048
COMPARED = 2  # steps
PACKS, ONE_BY_ONE = "packs", "one sample at a time"

DELTA_NET = dict(head_dim=32, linear_num_value_heads=8, linear_num_key_heads=8, linear_key_head_dim=32, linear_value_head_dim=32)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=256)
SHAPES: dict[str, dict] = {  # family: its settings beside those of all
    "qwen3": dict(head_dim=32),
    "qwen3_5_text": DELTA_NET,
    "lfm2": dict(layer_types=["conv", "conv", "full_attention"] * 2),
    "granitemoehybrid": dict(layer_types=["mamba", "mamba", "attention"] * 2, mamba_n_heads=16, mamba_d_head=32, mamba_d_state=32,
                             mamba_n_groups=1, num_local_experts=0, shared_intermediate_size=768),
    "gpt_oss": dict(head_dim=32, num_local_experts=8, num_experts_per_tok=2, intermediate_size=256),
    "qwen3_moe": dict(head_dim=32, num_experts=8, **EXPERTS),
}


def make_model(family: str) -> nn.Module:
    """Make the family's model, with random weights, and an adapter."""
    shape = dict(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
                 num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=0, pad_token_id=1, eos_token_id=3, use_cache=False)
    torch.manual_seed(0)
    return adapted(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(shape | SHAPES[family]))), RANK)


def contender(family: str, samples: TokenSamples, packs: bool) -> Steadfast:
    """Return the trainer's step, on packs or on one sample at a time."""
    model = make_model(family)
    base = unwrap_peft(model)
    stock = base.config._attn_implementation
    made = in_memory(model, samples, TOKENS_PER_STEP, LEARNING_RATE)
    if not packs:
        base.set_attn_implementation(stock)
    return made


def measure(family: str, samples: TokenSamples, rounds: int) -> tuple[dict, float, dict]:
    """Return a family's row, the largest difference of losses, and the raw times."""
    made = {name: contender(family, samples, name == PACKS) for name in (ONE_BY_ONE, PACKS)}
    base = unwrap_peft(made[PACKS].model)
    batches = [samples[i * 16:(i + 1) * 16] for i in range(COMPARED)]
    losses = {name: [float(one.step_on(batch).loss) for batch in batches] for name, one in made.items()}
    difference = require_agreement(losses[PACKS], losses[ONE_BY_ONE], "fp32", ONE_BY_ONE)
    timed = [Contender(name, one.step) for name, one in made.items()]
    measured = timing.interleave([*timed, timing.again(timed[1])], rounds, 1)
    ratio, noise = (timing.ratio(measured[PACKS], measured[other], timing.tokens_per_cpu_second)
                    for other in (ONE_BY_ONE, f"{PACKS}{timing.AGAIN}"))
    row = {"line": family, "packed": is_packed(base), "mixers": sum(map(runs_by_sample, base.modules())),
           "parameters": sum(p.numel() for p in base.parameters() if not p.requires_grad),
           "tokens_per_cpu_second": {name: asdict(timing.spread(measured[name])) for name in made},
           "ratio": {ONE_BY_ONE: asdict(ratio)}, "same": asdict(noise)}
    return row, difference, timing.raw(measured)


# ---------------------------------------------------------------- the suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", metavar="FAMILY", default=list(SHAPES), help="of: " + ", ".join(SHAPES))
    add_timing_arguments(parser, rounds=7)


def run(arguments: argparse.Namespace) -> dict:
    """Measure each family, and return the record."""
    check_timing(arguments)
    check_names("--families", arguments.families, SHAPES)
    quiet()
    torch.set_num_threads(1)
    lengths = log_normal_lengths(SAMPLES, MEAN_LENGTH, np.random.default_rng(0), TOKENS_PER_STEP)
    samples = random_samples(lengths, VOCABULARY, seed=0)
    summary, agreed, raw = [], {}, {}
    for family in arguments.families:
        row, agreed[family], times = measure(family, samples, arguments.rounds)
        print(f"{family}: × {show.interval(row['ratio'][ONE_BY_ONE])} {ONE_BY_ONE}", file=sys.stderr, flush=True)
        summary.append(row)
        raw |= {f"{family}: {name}": one for name, one in times.items()}
    conditions = {"rounds": arguments.rounds, "rank": RANK, "tokens_per_step": TOKENS_PER_STEP, "mean_length": float(lengths.mean()),
                  "vocabulary": VOCABULARY, "dtype": "fp32"}
    return record.make("packs-cpu", conditions, agreed, summary, raw)


def table(made: dict) -> list[list[str]]:
    rows = [["family", "layers by sample", "parameters", f"{ONE_BY_ONE}, tokens/CPU-s", f"{PACKS}, tokens/CPU-s", "ratio"]]
    for row in made["summary"]:
        speeds = [f"{row['tokens_per_cpu_second'][name]['value']:,.0f}" for name in (ONE_BY_ONE, PACKS)]
        how = str(row["mixers"]) if row["packed"] else "all"
        rows.append([row["line"], how, f"{row['parameters'] / 1e6:.1f} M", *speeds, show.interval(row["ratio"][ONE_BY_ONE])])
    return rows


def caption(made: dict) -> Caption:
    c = made["conditions"]
    noise = [row["same"]["value"] for row in made["summary"]]
    return Caption(
        f"A training step of {c['tokens_per_step']:,} tokens in {c['dtype']}, in packs and one sample at a time; samples of "
        f"{c['mean_length']:.0f} tokens on average, LoRA of rank {c['rank']}; CPU time, {show.machine(made)}.",
        ("Layers by sample: state spaces, delta nets and convolutions, which run each sample by itself inside a pack.",
         f"Medians of {c['rounds']} interleaved rounds, ratios with 95% intervals. Noise: packs timed against themselves: "
         f"{min(noise):.2f}-{max(noise):.2f}.",
         f"Losses agree, at worst to {max(made['agreement'].values()):.0e}.", f"{origin(made)}."))


def headline(made: dict) -> str:
    ratios = [row["ratio"][ONE_BY_ONE]["value"] for row in made["summary"] if row["packed"]]
    return f"Packs are {min(ratios):.1f} to {max(ratios):.1f} times as fast as one sample at a time" if ratios else ""


def draw(made: dict, figure) -> None:
    """Draw the ratio of each family."""
    rows = made["summary"][::-1]
    axes = show.axes_of(figure, 8, 3)
    show.bars(axes, [row["line"] for row in rows], [row["ratio"][ONE_BY_ONE] for row in rows], [show.OURS] * len(rows), ".2f")
    axes.set_xlabel(f"speed in packs, × {ONE_BY_ONE}")


SUITE = Suite("packs", "Hybrid models and mixtures of experts in packs, beside one sample at a time", add_arguments, run,
              {"packs": View(table, caption, draw, headline)})
