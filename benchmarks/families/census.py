"""Try every text family of the installed transformers: how its packs run, and whether they are exact.

Each family becomes a tiny model with random weights, which examine.py takes through loading, a pack, and a step of LoRA, QLoRA and full
fine-tuning. A traceback, or a result that differs from stock transformers', fails the suite; a refusal in one line does not.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter, defaultdict
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from benchmarks.families.examine import METHODS, examine
from benchmarks.families.tiny_configs import VARIANTS, model_type
from benchmarks.harness import parallel, record, show
from benchmarks.harness.record import origin
from benchmarks.harness.suite import Caption, Suite, View
from benchmarks.harness.synthetic_models import quiet
from trainer.errors import UserError

MODES = ("fused", "fused, mixers by sample", "packed", "packed, mixers by sample", "one by one", "refused", "fails")
ELSEWHERE = {  # families of these classes that are no text models, or that need more than transformers
    "needs other input than text": "blip blip-2 evolla git idefics instructblip instructblipvideo kosmos-2 kosmos-2.5 moshi pi0 pix2struct "
                                   "shieldgemma2 voxtral_realtime",
    "has an encoder of sound with no small form": "fun_asr_nano granite_speech granite_speech_plus kyutai_speech_to_text qwen2_5_omni "
                                                  "qwen3_omni_moe vibevoice_asr",
    "drafts tokens for another model": "gemma4_assistant gemma4_unified_assistant",
    "does not predict the next token": "diffusion_gemma",
    "has no gradient outside training mode": "reformer",
    "needs the package timm": "fast_vlm gemma3n perception_lm",
}


def left_out(family: str) -> str | None:
    """Return why the census leaves a family out, or None."""
    for why, names in ELSEWHERE.items():
        if family in names.split():
            return why
    return "an encoder and a decoder" if _is_encoder_decoder(model_type(family)) else None


def _is_encoder_decoder(family: str) -> bool:
    try:
        return bool(CONFIG_MAPPING[family]().is_encoder_decoder)
    except Exception:  # a configuration that has to be given its parts
        return True


def families() -> list[str]:
    """Return the families that predict text, alone or in a model that also sees."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *VARIANTS})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="model types to try (default: all)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes of one thread (default: one a core)")


def run(arguments: argparse.Namespace) -> dict:
    """Examine the families in worker processes, and return the record."""
    quiet()
    known = families()
    if unknown := sorted(set(arguments.families or ()) - set(known)):
        raise UserError(f"--families: expected model types of transformers, got {', '.join(unknown)}; one of {', '.join(known)}")
    reasons = {family: why for family in arguments.families or known if (why := left_out(family))}
    begun = time.perf_counter()
    with parallel.pool(arguments.workers) as workers:
        tried = [workers.submit(examine, family) for family in arguments.families or known if family not in reasons]
        rows = parallel.results_of(begun, tried, lambda row: f"{row['line']}: {outcome(row)}")
    rows.sort(key=lambda row: row["line"])
    errors = {kind: max((row[kind] for row in rows if row.get(kind) is not None), default=0.0) for kind in ("logits", "gradients")}
    conditions = {"left_out": reasons, "minutes": (time.perf_counter() - begun) / 60, "threads": torch.get_num_threads(),
                  "workers": arguments.workers}
    return record.make("families-cpu" + "-part" * bool(arguments.families), conditions, errors, rows, {})


def outcome(row: dict) -> str:
    """Return how a family's packs run, that it is refused, or that it fails."""
    stages = row["stages"]
    if any(not result.startswith(("ok", "refused")) for result in stages.values()):
        return "fails"
    return "refused" if stages.get("pack") != "ok" else row["mode"]


def reasons(row: dict) -> str:
    """Return why a family fails, is refused, or runs one by one."""
    kind = outcome(row)
    if kind == "refused":
        return row["stages"]["pack"].removeprefix("refused: ")
    if kind == "fails":
        return "; ".join(f"{stage}: {result}" for stage, result in row["stages"].items() if not result.startswith(("ok", "refused")))
    return row["why"] or ""


def status(made: dict) -> int:
    return int(any(outcome(row) == "fails" for row in made["summary"]))


# ---------------------------------------------------------------- how a record is shown


def table(made: dict) -> list[list[str]]:
    grouped: dict[tuple[int, str], list[str]] = defaultdict(list)
    for row in made["summary"]:
        grouped[MODES.index(outcome(row)), general(reasons(row), row["line"])].append(row["line"])
    ordered = sorted(grouped.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1]))
    return [["a pack runs", "why", "families"], *([MODES[mode], why, ", ".join(names)] for (mode, why), names in ordered)]


def general(why: str, family: str) -> str:
    """Return a reason without what is special to one family: its names and figures."""
    why = re.sub(r", by [\d.e+-]+ of a token|\b\w+(?=Attention is )|packed attention: |transformers\.models(\.\w+)+\.", "", why)
    return why.replace(f" in {family};", ";").replace("|", "\\|")


def caption(made: dict) -> Caption:
    count, c, agreement = Counter(map(outcome, made["summary"])), made["conditions"], made["agreement"]
    return Caption(
        f"{len(made['summary'])} families of transformers {made['versions']['transformers']}, each a tiny model with random weights: "
        f"{', '.join(f'{count[mode]} {mode}' for mode in MODES if count[mode])}. Logits and gradients of a pack equal stock transformers', "
        f"one sample at a time, within {agreement['logits']:.0e} and {agreement['gradients']:.0e}.",
        ("Fused: norms, attention or MLPs by our kernels. Packed: stock layers, all samples in one call. Mixers by sample: convolutions "
         "and state spaces run each sample by itself, all else in one call. One by one: a sample a call.",
         "Each also generates stock transformers' tokens, is as exact as they are in bf16, and trains a step with LoRA, QLoRA and all "
         "weights; the adapter in stock PEFT, on the checkpoint's own class, and the exported models give the trained logits.",
         *(f"Refused by {method}: {'; '.join(refused)}." for method in METHODS if (refused := refused_by(method, made["summary"]))),
         *([f"Not tried: {'; '.join(not_tried(c['left_out']))}."] if c["left_out"] else []),
         f"{c['minutes']:.0f} minutes with {c['workers']} workers of one thread; {origin(made)}."))


def refused_by(method: str, rows: list[dict]) -> list[str]:
    """Return the families that run packs and refuse a method, with the reason."""
    results = {row["line"]: row["stages"].get(method, "ok") for row in rows if outcome(row) not in ("refused", "fails")}
    return [f"{family} ({result.removeprefix('refused: ')})" for family, result in results.items() if result != "ok"]


def not_tried(left_out: dict[str, str]) -> list[str]:
    """Return the families that were left out, by reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for family, why in left_out.items():
        by_reason[why].append(family)
    return [f"{', '.join(names)} ({why})" for why, names in by_reason.items()]


def draw(made: dict, figure: Any) -> None:
    """Draw how many families run in each way."""
    count = Counter(map(outcome, made["summary"]))
    axes = show.axes_of(figure, 8, 2.6)
    modes = [mode for mode in reversed(MODES) if count[mode]]
    axes.barh(modes, [count[mode] for mode in modes], color=[show.OURS if mode in MODES[:4] else show.OTHERS for mode in modes])
    for i, mode in enumerate(modes):
        axes.text(count[mode], i, f" {count[mode]}", va="center", fontsize=9)
    axes.set_xlabel("families")


SUITE = Suite("families", "Every text family of transformers: how its packs run, and whether they are exact", add_arguments, run,
              {"families": View(table, caption, draw, lambda made: "How packs of each family run", text_columns=3)}, status)
