"""The data side of a run, from configured sources to the plan of its steps, and the account of it that the report shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.config import Config
from trainer.data.chat_template import ChatTemplate, read_template
from trainer.data.mixture import Mixture, MixtureSource
from trainer.data.packing import pack
from trainer.data.samples import Samples
from trainer.data.sources import load_sources
from trainer.data.step_plan import StepPlan
from trainer.data.tokenize import tokenize
from trainer.errors import UserError


@dataclass
class TrainingData:
    samples: Samples  # domain and replay
    mixture: Mixture
    plan: StepPlan
    template: ChatTemplate
    heldout: tuple[Samples, list[np.ndarray]] | None  # samples, and the packs of their indices


def prepare_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read, tokenize, mix and plan. Raises UserError for data that cannot be trained on."""
    _check_cache(config.data.cache_dir)
    template = ChatTemplate(tokenizer, read_template(config.data.chat_template), config.data.chat_template)
    domain, replay = (
        load_sources(given, role, config.data.cache_dir) for given, role in ((config.data.train, "domain"), (config.replay.data, "replay")))
    samples = tokenize(domain + replay, template, config.data)
    roles = ["domain"] * len(domain) + ["replay"] * len(replay)
    samples, heldout = _hold_out(config, samples, roles, template)
    parts = [MixtureSource(name, role, source.weight) for name, role, (source, _) in zip(samples.names, roles, domain + replay)]
    mixture = Mixture(samples.lengths, samples.sources, parts, config.replay.ratio, config.replay.unit, config.seed)
    plan = StepPlan(samples.lengths, mixture, config.batch, config.epochs, config.max_steps, config.seed)
    return TrainingData(samples, mixture, plan, template, heldout)


def _check_cache(path: str | None) -> None:
    try:
        if path is not None:
            Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot make the folder {path}: {error.strerror}; choose another") from None


def _hold_out(config: Config, samples: Samples, roles: list[str], template: ChatTemplate):
    """Samples to train on, and the held-out ones with their packs: their own files, or a share of the domain."""
    if config.data.eval:
        return samples, _packed(config, tokenize(load_sources(config.data.eval, "held-out", config.data.cache_dir), template, config.data))
    if not config.data.eval_fraction:
        return samples, None
    is_domain = np.array([role == "domain" for role in roles])[samples.sources]
    pairs = np.stack([samples.sources, samples.records])
    record = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()  # a number for each record, over all sources
    domain = np.random.default_rng(config.seed).permutation(np.unique(record[is_domain]))
    count = max(1, round(config.data.eval_fraction * len(domain)))
    if count >= len(domain):
        raise UserError(f"data.eval_fraction: {config.data.eval_fraction} of {len(domain)} records leaves nothing to train on")
    chosen = np.isin(record, domain[:count])  # all parts of a record that was split go the same way
    return samples.select(np.flatnonzero(~chosen)), _packed(config, samples.select(np.flatnonzero(chosen)))


def heldout_line(inputs: TrainingData) -> str:
    """How much is held out, and how much of that is trained on all the same."""
    held, known = inputs.heldout[0], {hash(inputs.samples[i][0].tobytes()) for i in range(len(inputs.samples))}
    shared = sum(hash(held[i][0].tobytes()) in known for i in range(len(held)))
    warning = f"; WARNING: {shared:,} of them are also trained on, so their loss says nothing about new text" if shared else ""
    return f"held out: {len(held):,} samples, {int(held.supervised.sum()):,} supervised tokens{warning}"


def _packed(config: Config, samples: Samples) -> tuple[Samples, list[np.ndarray]]:
    return samples, pack(samples.lengths, config.batch.tokens_per_pack, config.batch.max_samples_per_pack, seed=0)


def data_summary(inputs: TrainingData, config: Config) -> dict:
    """Sources, shares, lengths and packing of the first epoch, as data.json holds them."""
    samples, shares = inputs.samples, inputs.mixture.shares(0)
    fills = [int(samples.lengths[p].sum()) for step in inputs.plan.epoch(0) for p in step]
    sources = []
    for i, share in enumerate(shares):
        here = samples.sources == i
        facts = {**asdict(share), "rows_per_epoch": share.rows, "tokens": int(samples.lengths[here].sum())}
        sources.append({**facts, "supervised": int(samples.supervised[here].sum()), **samples.length_report[share.name]})
    return {
        "sources": sources, "lengths": samples.lengths.tolist(), "pack_fill": fills, "tokens_per_pack": config.batch.tokens_per_pack,
        "packing_efficiency": sum(fills) / (len(fills) * config.batch.tokens_per_pack),
    }
