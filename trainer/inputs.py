"""The data side of a run, from configured sources to the plan of its steps, and the account of it that the report shows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.chat import ChatTemplate
from trainer.config import Config
from trainer.data import load_sources
from trainer.errors import UserError
from trainer.mixture import Mixture, Part
from trainer.packing import pack
from trainer.plan import Plan
from trainer.samples import Samples, tokenize


@dataclass
class Inputs:
    samples: Samples  # domain and replay
    mixture: Mixture
    plan: Plan
    template: ChatTemplate
    heldout: tuple[Samples, list[np.ndarray]] | None  # samples, and the packs of their indices


def prepare_inputs(config: Config, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Read, tokenize, mix and plan. Raises UserError for data that cannot be trained on."""
    template = ChatTemplate(tokenizer, _read_template(config.data.chat_template))
    domain, replay = (
        load_sources(given, role, config.data.cache) for given, role in ((config.data.train, "domain"), (config.replay.data, "replay")))
    samples = tokenize(domain + replay, template, config.data)
    roles = ["domain"] * len(domain) + ["replay"] * len(replay)
    samples, heldout = _hold_out(config, samples, roles, template)
    parts = [Part(name, role, source.weight) for name, role, (source, _) in zip(samples.names, roles, domain + replay)]
    mixture = Mixture(samples.lengths, samples.sources, parts, config.replay.ratio, config.replay.by, config.seed)
    plan = Plan(samples.lengths, mixture, config.batch, config.epochs, config.max_steps, config.seed)
    return Inputs(samples, mixture, plan, template, heldout)


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"data.chat_template: expected a file with a Jinja template, found no file {path}")
    return Path(path).read_text()


def _hold_out(config: Config, samples: Samples, roles: list[str], template: ChatTemplate):
    """Samples to train on, and the held-out ones with their packs: their own files, or a share of the domain."""
    if config.data.heldout:
        return samples, _packed(config, tokenize(load_sources(config.data.heldout, "held-out", config.data.cache), template, config.data))
    if not config.data.heldout_share:
        return samples, None
    is_domain = np.array([role == "domain" for role in roles])[samples.sources]
    domain = np.random.default_rng(config.seed).permutation(np.flatnonzero(is_domain))
    count = max(1, round(config.data.heldout_share * len(domain)))
    if count >= len(domain):
        raise UserError(f"data.heldout_share: {config.data.heldout_share} of {len(domain)} samples leaves nothing to train on")
    chosen = np.sort(domain[:count])
    rest = np.setdiff1d(np.arange(len(samples.lengths)), chosen)
    return samples.select(rest), _packed(config, samples.select(chosen))


def _packed(config: Config, samples: Samples) -> tuple[Samples, list[np.ndarray]]:
    return samples, pack(samples.lengths, config.batch.tokens_per_pack, config.batch.max_documents, seed=0)


def account(inputs: Inputs, config: Config) -> dict:
    """Sources, shares, lengths and packing of the first epoch, as data.json holds them."""
    samples, shares = inputs.samples, inputs.mixture.shares(0)
    fills = [int(samples.lengths[p].sum()) for step in inputs.plan.epoch(0) for p in step]
    sources = []
    for i, share in enumerate(shares):
        here = samples.sources == i
        facts = {**asdict(share), "rows_per_epoch": share.rows, "tokens": int(samples.lengths[here].sum())}
        sources.append({**facts, "supervised": int(samples.supervised[here].sum()), **samples.over[share.name]})
    return {
        "sources": sources, "lengths": samples.lengths.tolist(), "pack_fill": fills, "tokens_per_pack": config.batch.tokens_per_pack,
        "packing_efficiency": sum(fills) / (len(fills) * config.batch.tokens_per_pack),
    }


def save_account(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents))
