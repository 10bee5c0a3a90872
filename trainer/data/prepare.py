"""Prepare the data of a run: from configured sources to the plan of its steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trainer.config import Config, Source
from trainer.data.chat_template import ChatTemplate, read_template
from trainer.data.curriculum import Curriculum
from trainer.data.demonstrations import Demonstrations, read_demonstrations
from trainer.data.mixture import Mixture, MixtureSource
from trainer.data.names import distinct
from trainer.data.packing import pack
from trainer.data.samples import Samples
from trainer.data.sources import load_sources
from trainer.data.step_plan import StepPlan
from trainer.data.tokenize import tokenize
from trainer.errors import UserError
from trainer.progress import announce


class EvalSet(NamedTuple):
    """Samples that are evaluated during training and never trained on, and their packs."""

    samples: Samples
    packs: list[np.ndarray]  # of indices into `samples`
    records: list[Dataset]  # of each source of `samples`


@dataclass
class TrainingData:
    samples: Samples  # domain and replay
    mixture: Mixture
    plan: StepPlan
    template: ChatTemplate
    eval_set: EvalSet | None
    records: list[Dataset]  # of each source of `samples`
    demonstrations: Demonstrations | None = None  # of the domain, whose samples have room in place of answers: on_policy.method sdft


def prepare_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read, tokenize, mix and plan the data of a run. Raises UserError for data that cannot be trained on."""
    data, replay = config.data, config.replay
    _make_cache_dir(data.cache_dir)
    template = ChatTemplate(tokenizer, read_template(data.chat_template), data.chat_template, keywords=data.template_kwargs,
                            mask_empty_reasoning=data.empty_reasoning == "mask")
    template.check_keywords()
    domain_sources = load_sources(data.train, "domain", data.cache_dir, data.on_bad_row)
    replay_sources = load_sources(replay.data, "replay", data.cache_dir, data.on_bad_row)
    sources = domain_sources + replay_sources
    roles = ["domain"] * len(domain_sources) + ["replay"] * len(replay_sources)

    records = [of_source for _, of_source in sources]
    samples, demonstrations = _samples(config, sources, len(domain_sources), template)
    samples, eval_set = _split_eval_set(config, samples, roles, template, records)
    parts = [MixtureSource(name, role, source.weight) for name, role, (source, _) in zip(samples.names, roles, sources)]
    mixture = Mixture(samples.lengths, samples.sources, parts, replay.ratio, replay.unit, config.seed)
    with announce(f"data: planning {config.epochs:,g} epochs of {len(samples):,} samples"):
        plan = plan_steps(config, samples, mixture)
    return TrainingData(samples, mixture, plan, template, eval_set, records, demonstrations)


def _samples(config: Config, sources: list[tuple[Source, Dataset]], domain: int,
             template: ChatTemplate) -> tuple[Samples, Demonstrations | None]:
    """Return the samples of all sources, and the demonstrations that SDFT makes of the domain's.

    The first `domain` sources are the domain's.
    """
    if config.on_policy.method == "none":
        return tokenize(sources, template, config.data), None
    names = distinct([source.name for source, _ in sources])
    samples, demonstrations = read_demonstrations(sources[:domain], names, template, config)
    return (samples.beside(tokenize(sources[domain:], template, config.data, names[domain:])) if sources[domain:] else samples,
            demonstrations)


def plan_steps(config: Config, samples: Samples, mixture: Mixture, base_losses: np.ndarray | None = None) -> StepPlan:
    """Return the steps of a run.

    `base_losses` [n] are the losses of samples under the base, which `data.curriculum: loss` goes by. Without them its order is random:
    the number of steps and what packs hold are near to those of the plan that is made when they are measured.
    """
    curriculum = None
    if config.data.curriculum != "none":
        unmeasured = np.zeros(len(samples)) if base_losses is None else base_losses
        is_replay = np.array([part.role == "replay" for part in mixture.parts])[samples.sources]
        curriculum = Curriculum(samples.lengths if config.data.curriculum == "length" else unmeasured, is_replay,
                                samples.lengths if config.replay.unit == "tokens" else np.ones_like(samples.lengths))
    return StepPlan(samples.lengths, mixture, config.batch, config.epochs, config.max_steps, config.seed, curriculum)


def _make_cache_dir(path: str | None) -> None:
    try:
        if path is not None:
            Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot make the folder {path}: {error.strerror}; choose another") from None


def _split_eval_set(config: Config, samples: Samples, roles: list[str], template: ChatTemplate,
                    records: list[Dataset]) -> tuple[Samples, EvalSet | None]:
    """Return the samples to train on, and the eval set.

    The eval set is read from `data.eval`, or is `data.eval_fraction` of the domain's records.
    """
    data = config.data
    if data.eval:
        sources = load_sources(data.eval, "eval", data.cache_dir, data.on_bad_row)
        return samples, _packed(config, tokenize(sources, template, data), [of_source for _, of_source in sources])
    if not data.eval_fraction:
        return samples, None
    is_domain = np.array([role == "domain" for role in roles])[samples.sources]
    pairs = np.stack([samples.sources, samples.records])
    record = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()  # a number for each record, over all sources
    domain = np.random.default_rng(config.seed).permutation(np.unique(record[is_domain]))
    count = max(1, round(data.eval_fraction * len(domain)))
    if count >= len(domain):
        raise UserError(f"data.eval_fraction: expected a fraction that leaves records to train on, got {data.eval_fraction} of "
                        f"{len(domain)} records; lower it, or add records")
    is_eval = np.isin(record, domain[:count])  # all samples of a record that was split are on one side
    return samples.select(np.flatnonzero(~is_eval)), _packed(config, samples.select(np.flatnonzero(is_eval)), records)


def _packed(config: Config, samples: Samples, records: list[Dataset]) -> EvalSet:
    return EvalSet(samples, pack(samples.lengths, config.batch.tokens_per_pack, config.batch.max_samples_per_pack, seed=0), records)


def eval_set_line(training_data: TrainingData) -> str:
    """Return the console line on the eval set, with a warning if samples of it are also trained on."""
    trained, evaluated = training_data.samples, training_data.eval_set.samples
    known = {hash(trained[i][0].tobytes()) for i in range(len(trained))}
    shared = sum(hash(evaluated[i][0].tobytes()) in known for i in range(len(evaluated)))
    warning = f"; WARNING: {shared:,} of them are also trained on, so their loss says nothing about new text" if shared else ""
    notes = "".join(f"; {name}: {note}" for name, report in evaluated.length_report.items() if name not in trained.length_report
                    for note in report["notes"])
    return f"eval set: {len(evaluated):,} samples, {int(evaluated.supervised.sum()):,} supervised tokens{warning}{notes}"


def note_lines(sources: list[dict]) -> list[str]:
    """Return the console lines of what the sources of a summary have to tell beside their numbers."""
    return [f"{source['name']}: {note}" for source in sources for note in source["notes"]]


def data_summary(training_data: TrainingData, config: Config) -> dict:
    """Return sources, shares, lengths and packing of the first epoch, as data.json stores them."""
    samples, shares = training_data.samples, training_data.mixture.shares(0)
    pack_tokens = [int(samples.lengths[members].sum()) for step in training_data.plan.epoch(0) for members in step]
    sources = []
    for i, share in enumerate(shares):
        of_source = samples.sources == i
        sources.append({
            **asdict(share),
            "tokens": int(samples.lengths[of_source].sum()),
            "supervised": int(samples.supervised[of_source].sum()),
            **samples.length_report[share.name],
        })
    return {
        "sources": sources,
        "lengths": samples.lengths.tolist(),
        "pack_fill": pack_tokens,
        "tokens_per_pack": config.batch.tokens_per_pack,
        "packing_efficiency": sum(pack_tokens) / (len(pack_tokens) * config.batch.tokens_per_pack),
    }
