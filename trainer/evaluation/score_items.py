"""Score every item under one model: judge answers, rank choices, measure log-probs and KL."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.evaluation.config import Config, Items
from trainer.evaluation.generation import Completion, cut_at_stop, generate_completions
from trainer.evaluation.items import Item, ItemFile
from trainer.evaluation.likelihood import BaseStates, Likelihood, choose_kl_samples, measure_likelihoods
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.rules.text_units import count_words, repetition
from trainer.evaluation.rules.verdicts import judge_rules
from trainer.evaluation.scoring import judge, pick_choices
from trainer.evaluation.tokens import Key, Sample, Tokens, encode
from trainer.limits import LimitError, limits
from trainer.model.forward import lm_head
from trainer.patterns import GIBIBYTES

JUDGING_SECONDS = 1.0  # of CPU time for one answer

@dataclass
class Outcome:
    """One item under one model."""

    right: bool | None = None  # None: held-out text
    prediction: str | None = None  # the generated text, or the choice that is picked
    found: str | None = None  # the part of a generated text that was compared
    finished: bool | None = None  # the model ended the generated answer before the limit
    words: int | None = None  # of the generated text
    repetition: float | None = None  # share of its runs of four words that occurred before in it
    rules: dict[str, list[bool]] | None = None  # strict and loose -> whether the generated text keeps each rule
    picks: dict[str, bool] | None = None  # norm -> whether it picks the right choice
    choice_logprobs: list[float] | None = None  # nats
    logprob: float | None = None  # nats, sum over the tokens of the right answer or held-out text; None: dropped
    tokens: int = 0
    bytes: int = 0
    kl: float | None = None  # nats, KL(base || model) summed over those tokens; None where it was not measured


@dataclass
class Outcomes:
    """The outcomes of all items under one model."""

    name: str  # base or model
    label: str
    items: dict[Key, Outcome]
    base_states: BaseStates | None = None  # of a base
    notes: list[str] = field(default_factory=list)  # warnings for reports

    def of_file(self, f: int) -> list[Outcome]:
        """Return the outcomes of file number f, in its order."""
        return [outcome for key, outcome in self.items.items() if key.file == f]


def score(loaded: LoadedModel, files: Sequence[ItemFile], config: Config, base: BaseStates | None = None, remember: bool = False,
          completions: list[Completion] | None = None) -> Outcomes:
    """Return the outcomes of all items under one model.

    With `remember` they include the states of a base, which a later call takes as `base` to measure the KL. `completions` are answers that
    another engine generated. Raises UserError if an item does not fit the model.
    """
    tokens = encode(files, loaded.template, config, loaded.context)
    items = {Key(f, i): Outcome() for f, file in enumerate(files) for i in range(len(file.items))}
    outcomes = Outcomes(loaded.name, loaded.label, items, notes=_length_notes(tokens) + _choice_notes(files))
    if completions is None:
        completions = generate_completions(loaded.model, loaded.template, [prompt.ids for prompt in tokens.prompts],
                                           [prompt.max_tokens for prompt in tokens.prompts], config.generation.batch)
    outcomes.notes += _judge_completions(files, tokens, completions, items, config.generation.stop)
    why_no_kl = base.why_no_kl(tokens.samples, lm_head(loaded.model)) if base else None
    if why_no_kl:
        outcomes.notes.append(f"KL to the base was not measured: {why_no_kl}")
    outcomes.base_states = BaseStates(lm_head(loaded.model)) if remember else None
    roles = [files[sample.key.file].role for sample in tokens.samples]
    keep = choose_kl_samples(tokens.samples, roles, config.scoring.kl_tokens, config.statistics.seed) if remember else set()
    likelihoods = measure_likelihoods(loaded.model, tokens.samples, config.scoring.tokens_per_pack,
                                      remember=outcomes.base_states, keep=keep, base=None if why_no_kl else base)
    _record_likelihoods(files, tokens.samples, likelihoods, items)
    return outcomes


def _length_notes(tokens: Tokens) -> list[str]:
    counts = {"held-out texts were truncated to the longest sample": tokens.truncated,
              "held-out texts were dropped: too long": tokens.dropped,
              "answers were too long to measure their log-prob": tokens.unmeasured}
    return [f"{count:,} {note}" for note, count in counts.items() if count]


def _choice_notes(files: Sequence[ItemFile]) -> list[str]:
    counts = {file.name: sum(len(set(item.choices)) < len(item.choices) for item in file.items) for file in files}
    return [f"{name}: items with equal choices: {count:,}; either of the two counts" for name, count in counts.items() if count]


def _judge_completions(files: Sequence[ItemFile], tokens: Tokens, completions: Sequence[Completion], items: dict[Key, Outcome],
                       stop: list[str]) -> list[str]:
    """Judge the generated answers, and return a note for each file of which some took too long."""
    endless = Counter()
    for (key, *_), completion in zip(tokens.prompts, completions, strict=True):
        file, outcome = files[key.file], items[key]
        item, completion = file.items[key.item], cut_at_stop(completion, [*stop, *file.options.stop])
        try:
            with limits(JUDGING_SECONDS, GIBIBYTES):
                right, outcome.found, rules = _judge_one(item, completion.text, file.options)
        except LimitError:
            right, rules = False, {form: [False] * len(item.rules) for form in ("strict", "loose")} if item.rules else None
            endless[file.name] += 1
        counts = completion.finished or not file.options.must_end
        outcome.right = right and counts
        outcome.rules = rules and {form: [kept and counts for kept in verdicts] for form, verdicts in rules.items()}
        outcome.prediction, outcome.finished = completion.text, completion.finished
        outcome.words, outcome.repetition = count_words(completion.text), repetition(completion.text)
    return [f"{name}: answers counted as wrong, as its pattern or rule took more than {JUDGING_SECONDS:g} s or {GIBIBYTES:g} GiB on each: "
            f"{count:,}" for name, count in endless.items()]


def _judge_one(item: Item, text: str, options: Items) -> tuple[bool, str | None, dict[str, list[bool]] | None]:
    """Return whether an answer is right, the part of it that was compared, and whether it keeps each rule."""
    if not item.rules:
        return *judge(text, item.answers, options), None
    verdicts = judge_rules(item.rules, text)
    return all(verdicts.strict), None, {form: list(getattr(verdicts, form)) for form in ("strict", "loose")}


def _record_likelihoods(files: Sequence[ItemFile], samples: Sequence[Sample], likelihoods: Sequence[Likelihood],
                        items: dict[Key, Outcome]) -> None:
    choices: dict[Key, list[tuple[Sample, Likelihood]]] = defaultdict(list)
    for sample, likelihood in zip(samples, likelihoods, strict=True):
        outcome = items[sample.key]
        if sample.gives_logprob:
            outcome.logprob, outcome.kl = likelihood.logprob, likelihood.kl
            outcome.tokens, outcome.bytes = sample.tokens, sample.bytes
            if sample.asks_greedy:
                outcome.right = likelihood.greedy
        if sample.choice is not None:
            choices[sample.key].append((sample, likelihood))
    for key, ranked in choices.items():
        file, outcome = files[key.file], items[key]
        item = file.items[key.item]
        outcome.choice_logprobs = [likelihood.logprob for _, likelihood in ranked]
        scored = [item.continuation or choice for choice in item.choices]
        picked = pick_choices(outcome.choice_logprobs, scored, [sample.tokens for sample, _ in ranked])
        outcome.picks = {norm: item.choices[choice] == item.answers[0] for norm, choice in picked.items()}
        outcome.prediction = item.choices[picked[file.options.choice_by]]
        outcome.right = outcome.picks[file.options.choice_by]
