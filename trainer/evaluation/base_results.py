"""Take a base's outcomes from an earlier evaluation, named by `base.results`.

So many models are compared with a base that is scored once. The items, and the options that outcomes depend on, must be those of then.
Samples whose KL is measured run through the base again, which also shows whether it is still the base of then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import yaml

from trainer.errors import UserError
from trainer.evaluation.config import Config
from trainer.evaluation.items import ItemFile
from trainer.evaluation.likelihood import BaseStates, choose_kl_samples, measure_likelihoods
from trainer.evaluation.models import LoadedModel, absolute_name
from trainer.evaluation.report import question_fields
from trainer.evaluation.score_items import Outcome, Outcomes
from trainer.evaluation.tokens import Key, encode
from trainer.model.forward import lm_head

OPTION = "base.results"
SAME = ("generation.engine", "generation.max_tokens", "generation.stop", "data.chat", "data.chat_template", "data.template_kwargs",
        "data.on_overlong", "scoring.tokens_per_pack", "precision", "load_in_4bit")  # options that outcomes depend on
TOLERANCE = 0.01  # nats per token by which a base's log-probs may differ on another day: other packs, other kernels
FEWEST_SAMPLES = 8  # that run through the base again, whatever `scoring.kl_tokens` says


def read_base(files: Sequence[ItemFile], base: str, config: Config) -> dict[Key, Outcome]:
    """Return the outcomes of all items under the base named `base`, from the folder `base.results`.

    Raises UserError if the folder has none, or has them for another base, other items or other options.
    """
    folder = Path(config.base.results).expanduser()
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        earlier = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        records = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        side = "base" if results["base"] is not None else "model"
        label = results[side]
        _check_options(folder, earlier, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        raise UserError(f"{OPTION}: expected the output folder of an evaluation, with results.json, results.jsonl and config.yaml, found "
                        f"otherwise at {folder}") from None
    if absolute_name(label) != absolute_name(base):
        raise UserError(f"{OPTION}: expected the results of {base}, found those of {label} in {folder}; name another folder, or leave it "
                        "out to score the base anew")
    return {Key(f, i): outcome for f, file in enumerate(files) for i, outcome in enumerate(_of_file(file, records, side, folder))}


def _check_options(folder: Path, earlier: dict, config: Config) -> None:
    now = asdict(config)
    for name in SAME:
        found, wanted = earlier, now
        for part in name.split("."):
            found, wanted = found[part], wanted[part]
        if found != wanted:
            raise UserError(f"{OPTION}: expected an evaluation with {name} {wanted}, found {found} in {folder / 'config.yaml'}; use the "
                            f"options of then, or leave {OPTION} out")


def _of_file(file: ItemFile, records: list[dict], side: str, folder: Path) -> list[Outcome]:
    """Return the outcomes of one file's items, in their order."""
    found = [record for record in records if record.get("file") == file.name]
    place = f"{folder / 'results.jsonl'}, file {file.name}"
    if len(found) != len(file.items):
        raise UserError(f"{OPTION}: expected {len(file.items):,} items, found {len(found):,} in {place}; score the base on the same items")
    names = {field.name for field in fields(Outcome)}
    outcomes = []
    for item, record in zip(file.items, found):
        same = record["id"] == item.id and record["metric"] == file.metric and \
            {name: record.get(name) for name in question_fields(item)} == json.loads(json.dumps(question_fields(item)))
        if not same or not isinstance(record.get(side), dict) or not record[side].keys() <= names:
            raise UserError(f"{OPTION}: expected item {item.id} as it is now, found another in {place}; score the base on the same items")
        outcomes.append(Outcome(**record[side]))
    return outcomes


def recall(loaded: LoadedModel, files: Sequence[ItemFile], config: Config, known: dict[Key, Outcome]) -> Outcomes:
    """Return a base's known outcomes, with its states of the samples whose KL will be measured.

    Raises UserError if the log-probs of these samples are not those of then.
    """
    tokens = encode(files, loaded.template, config, loaded.context)
    roles = [files[sample.key.file].role for sample in tokens.samples]
    scored = [i for i, sample in enumerate(tokens.samples) if sample.gives_logprob]
    kept = choose_kl_samples(tokens.samples, roles, config.scoring.kl_tokens, config.statistics.seed)
    numbers = sorted({*kept, *scored[:FEWEST_SAMPLES]})
    states = BaseStates(lm_head(loaded.model))
    samples = [tokens.samples[i] for i in numbers]
    likelihoods = measure_likelihoods(loaded.model, samples, config.scoring.tokens_per_pack, remember=states, keep=range(len(samples)))
    for sample, likelihood in zip(samples, likelihoods):
        then = known[sample.key].logprob
        if then is None or abs(then - likelihood.logprob) > TOLERANCE * sample.tokens:
            item = files[sample.key.file].items[sample.key.item]
            raise UserError(f"{OPTION}: expected the base of then, whose log-prob of item {item.id} in {files[sample.key.file].name} was "
                            f"{'none' if then is None else f'{then:.3f}'}, found {likelihood.logprob:.3f} nats; score the base anew")
    states.hidden = {numbers[j]: rows for j, rows in states.hidden.items() if numbers[j] in kept}
    states.ids = {numbers[j]: ids for j, ids in states.ids.items() if numbers[j] in kept}
    notes = [f"the base's outcomes are those of {config.base.results}"]
    return Outcomes(loaded.name, loaded.label, dict(known), states, notes)
