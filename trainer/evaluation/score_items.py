"""What one model makes of every item: answers generated and judged, choices ranked, log-probs, and the divergence from the base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.evaluation.config import Config
from trainer.evaluation.generation import Answer, answers, stopped
from trainer.evaluation.items import ItemFile
from trainer.evaluation.likelihood import BaseStates, Likelihood, chosen, measure
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.scoring import choose, judge
from trainer.evaluation.tokens import Key, Sample, Tokens, encode
from trainer.model.forward import lm_head


@dataclass
class Outcome:
    """One item under one model."""

    right: bool | None = None  # None: held-out text
    prediction: str | None = None  # the generated text, or the chosen choice
    found: str | None = None  # what was compared, of a generated text
    finished: bool | None = None  # a generated answer that ended by itself
    picks: dict[str, bool] | None = None  # of choices: whether each norm picks the right one
    choice_logprobs: list[float] | None = None  # nats
    logprob: float | None = None  # nats, of the right answer's or held-out text's tokens together; None: the text was left out
    tokens: int = 0
    bytes: int = 0
    kl: float | None = None  # nats, KL(base || model) summed over those tokens; None where it was not measured


@dataclass
class Outcomes:
    """All items under one model."""

    side: str
    label: str
    items: dict[Key, Outcome]
    base_states: BaseStates | None = None  # of a base
    notes: list[str] = field(default_factory=list)  # what a reader has to know

    def of(self, f: int) -> list[Outcome]:
        """Those of one file, in its order."""
        return [outcome for key, outcome in self.items.items() if key.file == f]


def score(side: LoadedModel, files: Sequence[ItemFile], config: Config, base: BaseStates | None = None, remember: bool = False,
          completions: list[Answer] | None = None) -> Outcomes:
    """Everything about one model. `base` is what an earlier call with `remember` left; `said` are answers that another engine generated.

    UserError for items that do not fit the model.
    """
    tokens = encode(files, side.template, config, side.context)
    items = {Key(f, i): Outcome() for f, file in enumerate(files) for i in range(len(file.items))}
    found = Outcomes(side.name, side.label, items, notes=_cut_notes(tokens))
    if completions is None:
        how = config.generation
        completions = answers(side.model, side.template, [prompt.ids for prompt in tokens.prompts], how.max_tokens, how.batch)
    _judged(files, tokens, [stopped(answer, config.generation.stop) for answer in completions], items)
    why_no_kl = base.why_no_kl(tokens.samples, lm_head(side.model)) if base else None
    if why_no_kl:
        found.notes.append(f"KL to the base was not measured: {why_no_kl}")
    found.base_states = BaseStates(lm_head(side.model)) if remember else None
    roles = [files[sample.key.file].role for sample in tokens.samples]
    keep = chosen(tokens.samples, roles, config.scoring.kl_tokens, config.statistics.seed) if remember else set()
    likely = measure(side.model, tokens.samples, config.scoring.tokens_per_pack, remember=found.base_states, keep=keep,
                     base=None if why_no_kl else base)
    _likelihoods(files, tokens.samples, likely, items)
    return found


def _cut_notes(tokens: Tokens) -> list[str]:
    counts = {"held-out texts were cut off at the longest sample": tokens.cut, "held-out texts were left out: too long": tokens.dropped,
              "answers were too long to measure their log-prob": tokens.unmeasured}
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def _judged(files: Sequence[ItemFile], tokens: Tokens, completions: Sequence[Answer], items: dict[Key, Outcome]) -> None:
    for (key, _), answer in zip(tokens.prompts, completions, strict=True):
        file = files[key.file]
        right, found = judge(answer.text, file.items[key.item].answers, file.settings)
        outcome = items[key]
        outcome.right, outcome.prediction, outcome.found, outcome.finished = right, answer.text, found, answer.finished


def _likelihoods(files: Sequence[ItemFile], samples: Sequence[Sample], likely: Sequence[Likelihood], items: dict[Key, Outcome]) -> None:
    choices: dict[Key, list[tuple[Sample, Likelihood]]] = defaultdict(list)
    for sample, found in zip(samples, likely, strict=True):
        outcome = items[sample.key]
        if sample.reference:
            outcome.logprob, outcome.tokens, outcome.bytes, outcome.kl = found.logprob, sample.tokens, sample.bytes, found.kl
        if sample.choice is not None:
            choices[sample.key].append((sample, found))
    for key, ranked in choices.items():
        file, outcome = files[key.file], items[key]
        item = file.items[key.item]
        outcome.choice_logprobs = [found.logprob for _, found in ranked]
        picked = choose(outcome.choice_logprobs, item.choices, [sample.tokens for sample, _ in ranked])
        outcome.picks = {norm: choice == item.right for norm, choice in picked.items()}
        outcome.prediction = item.choices[picked[file.settings.choice_by]]
        outcome.right = outcome.picks[file.settings.choice_by]
