"""Stage `select`: choose a response to each instruction for the replay set, and a rejected one.

The rules (`select.rule`):

- best: the response with the best rating;
- majority: of the responses within `select.margin` points of the best, the text that most of them have word for word (self-consistency,
  Wang et al., arXiv 2203.11171), and of several such texts the likeliest one per token under the base. Long responses are all different,
  so that only the likelihood decides;
- base_likelihood: of the responses within the margin the likeliest one per token under the base, which changes the base least (GRAPE,
  arXiv 2502.04194);
- first: the first of `select.candidates`, which needs no judge.

Where judges compared the two best responses, the one that they prefer over both orders is chosen, whatever the rule. The stage starts
afresh at every call and changes only its own drops, ratings and choices, so that one pool gives replay sets by every rule.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from synth.config import Config, name_of
from synth.judging.calibration import rate_responses
from synth.pool import seeds
from synth.pool.store import ITEM_IS_CLEAN
from synth.pool.synthesis_run import SynthesisRun
from synth.reporting.export import export
from synth.stages.judge import pin_judge_settings
from synth.stages.respond import GREEDY
from trainer.errors import UserError

EQUAL = 1e-9  # points within which two ratings are equal
# Reasons for a drop, as the pool keeps them
NO_RESPONSE, NO_RATING, LOW_SCORE, NO_WEIGHT = "no usable response", "no response with all scores", "below min_score", "weight 0"

# Every clean item with its weight, once for each of its usable responses; a row is a CandidateRow
CANDIDATES = f"""
    SELECT id, t.weight, r.model, r.sample, r.text, q.value, r.base_logprob, r.base_tokens
    FROM items LEFT JOIN traits AS t ON t.item = id
    LEFT JOIN responses AS r ON r.item = id AND r.reason IS NULL
    LEFT JOIN ratings AS q ON q.item = id AND q.model = r.model AND q.sample = r.sample
    WHERE {ITEM_IS_CLEAN} ORDER BY id, r.model, r.sample"""
COMPARISONS = "SELECT item, judge, model, sample, other_model, other_sample, preference FROM comparisons ORDER BY item"
DROPS_BY_REASON = "SELECT reason, count(*) FROM drops WHERE stage = 'select' GROUP BY reason ORDER BY reason"


class ResponseKey(NamedTuple):
    """A response to a given item."""

    model: str
    sample: int


class Candidate(NamedTuple):
    """A usable response to a given item."""

    model: str
    sample: int
    text: str
    value: float | None  # rating; None where a score is missing
    likelihood: float | None = None  # mean log-probability of its tokens under the base; None where the base has not read it

    @property
    def key(self) -> ResponseKey:
        return ResponseKey(self.model, self.sample)


class Selection(NamedTuple):
    """A row of the table `selection`, without the item."""

    chosen: Candidate
    rejected: Candidate | None

    @property
    def row(self) -> tuple:
        rejected = (*self.rejected.key, self.rejected.value) if self.rejected else (None, None, None)
        return *self.chosen.key, self.chosen.value, *rejected


def select(run: SynthesisRun) -> None:
    """Run the stage, and write the replay set."""
    options = run.config.select
    needs_judges = options.rule != "first"
    run.require("judge" if needs_judges else "respond")
    if needs_judges:
        pin_judge_settings(run)
    allowed = AllowedCandidates(run)
    with run.pool.transaction():
        run.pool.set("done.select", False)
        for statement in ("DELETE FROM drops WHERE stage = 'select'", "DELETE FROM selection", "DELETE FROM ratings"):
            run.pool.connection.execute(statement)
        scales = rate_responses(run) if needs_judges else {}
        preferred = read_preferences(run) if run.config.judge.pairwise else {}
        selections, drops = [], []
        for item, weight, candidates in read_candidates(run):
            candidates = allowed.ordered(candidates)
            drop = drop_reason(candidates, weight, options.min_score if needs_judges else None)
            if drop:
                drops.append((item, "select", *drop))
                continue
            selection = choose(run.config, item, candidates, preferred.get(item)) if needs_judges else Selection(candidates[0], None)
            selections.append((item, *selection.row))
        run.pool.insert("selection", selections)
        run.pool.insert("drops", drops)
    run.say(summary_line(run))
    export(run, scales)
    run.finish("select")


def summary_line(run: SynthesisRun) -> str:
    """Return a line for the console: items selected and dropped, and responses left out."""
    (selected, pairs), = run.pool.select("SELECT count(*), count(rejected_model) FROM selection")
    (responses, complete), = run.pool.select("SELECT count(*), count(value) FROM ratings")
    dropped = "".join(f"; dropped {count:,}: {reason}" for reason, count in run.pool.select(DROPS_BY_REASON))
    if not responses:
        scores = "no judge was needed"
    elif complete < responses:
        scores = f"{responses - complete:,} of {responses:,} responses lack a score and were left out"
    else:
        scores = f"all {responses:,} responses have their scores"
    return f"select: {selected:,} items selected, {pairs:,} of them with a rejected response{dropped}; {scores}"


# ---------------------------------------------------------------- candidates


class CandidateRow(NamedTuple):
    """A row of the query CANDIDATES; an item without usable responses has one row without a model."""

    item: int
    weight: float | None
    model: str | None
    sample: int | None
    text: str | None
    value: float | None
    base_logprob: float | None
    base_tokens: int | None

    def candidate(self) -> Candidate:
        is_read = self.base_logprob is not None and self.base_tokens
        return Candidate(self.model, self.sample, self.text, self.value, self.base_logprob / self.base_tokens if is_read else None)


def read_candidates(run: SynthesisRun) -> Iterator[tuple[int, float, list[Candidate]]]:
    """Yield every clean item with its weight and its usable responses, in the order of their keys."""
    rows = map(CandidateRow._make, run.pool.connection.execute(CANDIDATES))
    for item, of_item in itertools.groupby(rows, key=attrgetter("item")):
        of_item = list(of_item)
        weight = of_item[0].weight
        yield item, 1.0 if weight is None else weight, [row.candidate() for row in of_item if row.model is not None]


class AllowedCandidates:
    """The responses that `select.candidates` names, in that order.

    Raises UserError for a name that the pool does not have.
    """

    def __init__(self, run: SynthesisRun):
        config = run.config
        models = [name_of(model) for model in (config.base, *config.responders)]
        samples = {model: list(range(config.respond.num_samples)) for model in models}
        if config.respond.include_greedy:
            samples[name_of(config.base)].append(GREEDY)
        by_name = {model: [ResponseKey(model, sample) for sample in samples[model]] for model in models}
        single = {f"{key.model}:{'greedy' if key.sample == GREEDY else key.sample}": [key] for keys in by_name.values() for key in keys}
        names = by_name | single
        for name in config.select.candidates:
            if name not in names:
                raise UserError(f"select.candidates: expected names among {', '.join([*models, *single])}, got {name}")
        keys = [key for name in config.select.candidates or models for key in names[name]]
        self.position = {key: position for position, key in reversed(list(enumerate(keys)))}  # the first of several

    def ordered(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Return those of `candidates` that are allowed, in their order."""
        allowed = (candidate for candidate in candidates if candidate.key in self.position)
        return sorted(allowed, key=lambda candidate: self.position[candidate.key])


def drop_reason(candidates: Sequence[Candidate], weight: float, min_score: float | None) -> tuple[str, str | None] | None:
    """Return the reason to drop an item and a detail; None where it is kept.

    Without `min_score` no rating is needed.
    """
    if weight <= 0:
        return NO_WEIGHT, None
    if not candidates:
        return NO_RESPONSE, None
    if min_score is None:
        return None
    best = max((candidate.value for candidate in candidates if candidate.value is not None), default=None)
    if best is None:
        return NO_RATING, None
    return (LOW_SCORE, f"{best:.3f}") if best < min_score - EQUAL else None


# ---------------------------------------------------------------- pairwise preferences


class Comparison(NamedTuple):
    """A row of the query COMPARISONS; the judge saw the response of `model` first."""

    item: int
    judge: str
    model: str
    sample: int
    other_model: str
    other_sample: int
    preference: float | None  # the first response's share; None where it could not be read

    @property
    def first(self) -> ResponseKey:
        return ResponseKey(self.model, self.sample)


def read_preferences(run: SynthesisRun) -> dict[int, ResponseKey]:
    """Return the preferred response of each item whose two best were compared with a clear result."""
    rows = map(Comparison._make, run.pool.connection.execute(COMPARISONS))
    by_item = ((item, preferred_response(comparisons)) for item, comparisons in itertools.groupby(rows, key=attrgetter("item")))
    return {item: key for item, key in by_item if key}


def preferred_response(comparisons: Iterable[Comparison]) -> ResponseKey | None:
    """Return the response that the judges prefer on the mean over both orders.

    `comparisons` are those of one item. None where the mean share is one half, or no judge has a result in both orders.
    """
    shares: dict[str, dict[ResponseKey, float]] = defaultdict(dict)  # by judge and by the response shown first
    for comparison in comparisons:
        if comparison.preference is not None:
            shares[comparison.judge][comparison.first] = comparison.preference
    complete = [sorted(shares[judge].items()) for judge in sorted(shares) if len(shares[judge]) == 2]
    if not complete:
        return None
    (one, _), (other, _) = complete[0]
    mean = sum((share_of_one + 1 - share_of_other) / 2 for (_, share_of_one), (_, share_of_other) in complete) / len(complete)
    if abs(mean - 0.5) < EQUAL:
        return None
    return one if mean > 0.5 else other


# ---------------------------------------------------------------- the choice


def choose(config: Config, item: int, candidates: Sequence[Candidate], preferred: ResponseKey | None = None) -> Selection:
    """Choose and reject among candidates of which at least one is rated."""
    rated = [candidate for candidate in candidates if candidate.value is not None]
    chosen = next((candidate for candidate in rated if candidate.key == preferred), None) or choose_by_rule(config, item, rated)
    return Selection(chosen, choose_rejected(config, item, rated, chosen))


def choose_by_rule(config: Config, item: int, rated: Sequence[Candidate]) -> Candidate:
    """Choose by `select.rule`; the seed breaks ties.

    Where the base has read no response within the margin, the best one is chosen.
    """
    rule, best = config.select.rule, max(candidate.value for candidate in rated)
    if rule != "best":
        near = [candidate for candidate in rated if candidate.value >= best - config.select.margin - EQUAL]
        votes = Counter(candidate.text for candidate in near) if rule == "majority" else Counter()
        read = [candidate for candidate in near if candidate.likelihood is not None]
        if read:
            return min(read, key=lambda candidate: (-votes[candidate.text], -candidate.likelihood, tie_break(config, item, candidate)))
    return min((candidate for candidate in rated if candidate.value >= best - EQUAL), key=lambda one: tie_break(config, item, one))


def choose_rejected(config: Config, item: int, rated: Sequence[Candidate], chosen: Candidate) -> Candidate | None:
    """Return the worst response, if it is worse than the chosen one by more than `select.margin`.

    Responses with the chosen text do not count.
    """
    others = [candidate for candidate in rated if candidate.text != chosen.text]
    worst = min((candidate.value for candidate in others), default=chosen.value)
    if worst >= chosen.value - config.select.margin - EQUAL:
        return None
    return min((candidate for candidate in others if candidate.value <= worst + EQUAL), key=lambda one: tie_break(config, item, one))


def tie_break(config: Config, item: int, candidate: Candidate) -> int:
    """Return a number drawn from the seed that decides between equal candidates."""
    return seeds.seed(config.seed, "select", candidate.model, candidate.sample, item)
