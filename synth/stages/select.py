"""Stage `select`: which answer to each instruction goes into the replay set, and which one it is to be preferred to.

The best-rated one; or, of those within `select.margin` points of the best, the one that most of them say word for word (self-consistency,
Wang et al., arXiv 2203.11171) and, of several, the most likely under the base, per token (GRAPE, arXiv 2502.04194): it moves the model
least. Where answers are long no two are alike, and likelihood alone decides. Where the two best were compared, the one preferred over both
orders and all judges. Or the first of those named, which needs no judge: a single answer, or the greedy one. Cheap, and done anew at every
call: only this stage's own drops, ratings and choices change, so one pool gives replay sets of every rule.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from synth.config import Config, name_of
from synth.judging.calibration import rate_answers
from synth.pool import seeds
from synth.pool.run import SynthesisRun
from synth.pool.store import CLEAN
from synth.reporting.export import export
from synth.stages.judge import pin_judge_settings
from synth.stages.respond import GREEDY
from trainer.errors import UserError

EQUAL = 1e-9  # points within which two ratings are the same
NO_ANSWER, NO_JUDGEMENT, LOW, NO_WEIGHT = "no usable answer", "no complete judgement", "below the floor", "weight 0"


class Answer(NamedTuple):
    """A usable answer, its rating (None: incomplete), and how likely each of its tokens is under the base (mean log-probability)."""

    model: str
    sample: int
    text: str
    value: float | None
    likelihood: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.model, self.sample


class Decision(NamedTuple):
    """A row of `selection`, without the item."""

    chosen: Answer
    rejected: Answer | None

    @property
    def row(self) -> tuple:
        rejected = self.rejected
        return (*self.chosen.key, self.chosen.value, *((*rejected.key, rejected.value) if rejected else (None, None, None)))


def select(run: SynthesisRun) -> None:
    judged = run.config.select.rule != "first"
    run.require("judge" if judged else "respond")
    if judged:
        pin_judge_settings(run)
    order = Among(run)
    with run.pool.transaction():
        run.pool.set("done.select", False)
        run.pool.connection.execute("DELETE FROM drops WHERE stage = 'select'")
        run.pool.connection.execute("DELETE FROM selection")
        scales = rate_answers(run) if judged else unrated(run)
        preferred = preferences(run) if run.config.judge.pairwise else {}
        chosen, dropped = [], []
        for item, weight, answers in candidates(run):
            answers = sorted(filter(order.has, answers), key=order)
            reason, detail = drop_reason(answers, weight, run.config.select.min_score if judged else None)
            if reason:
                dropped.append((item, "select", reason, detail))
            elif judged:
                chosen.append((item, *choose(run.config, item, answers, preferred.get(item)).row))
            else:
                chosen.append((item, *Decision(answers[0], None).row))
        run.pool.insert("selection", chosen)
        run.pool.insert("drops", dropped)
    tell(run)
    export(run, scales)
    run.finish("select")


def tell(run: SynthesisRun) -> None:
    kept, pairs = run.pool.select("SELECT count(*), count(rejected_model) FROM selection")[0]
    reasons = run.pool.select("SELECT reason, count(*) FROM drops WHERE stage = 'select' GROUP BY reason ORDER BY reason")
    answers, complete = run.pool.select("SELECT count(*), count(value) FROM ratings")[0]
    out = "".join(f", {count:,} {reason}" for reason, count in reasons)
    left_out = f"{answers - complete:,} of {answers:,} answers lack a judge's score and were left out" if answers else "nothing was judged"
    run.say(f"select: {kept:,} items chosen, {pairs:,} with a rejected answer{out}; {left_out}")


# ---------------------------------------------------------------- what there is to choose from


def candidates(run: SynthesisRun) -> Iterator[tuple[int, float, list[Answer]]]:
    """Every clean item with its weight and its usable answers, in the order of their keys."""
    found = run.pool.connection.execute(
        "SELECT id, t.weight, r.model, r.sample, r.text, q.value, r.base_logprob, r.base_tokens FROM items "
        "LEFT JOIN traits AS t ON t.item = id LEFT JOIN responses AS r ON r.item = id AND r.reason IS NULL "
        "LEFT JOIN ratings AS q ON q.item = id AND q.model = r.model AND q.sample = r.sample "
        f"WHERE {CLEAN} ORDER BY id, r.model, r.sample")
    for item, rows in itertools.groupby(found, key=lambda row: row[0]):
        rows = list(rows)
        weight = 1.0 if rows[0][1] is None else rows[0][1]
        yield item, weight, [Answer(model, sample, text, value, logprob / tokens if logprob is not None and tokens else None)
                             for _, _, model, sample, text, value, logprob, tokens in rows if model is not None]


class Among:
    """Which answers `select.candidates` names, and their order. UserError for a name or a number that the pool does not have."""

    def __init__(self, run: SynthesisRun):
        named, config = run.config.select.candidates, run.config
        self.models = [name_of(model) for model in (config.base, *config.responders)]
        samples = {model: list(range(config.respond.num_samples)) for model in self.models}
        if config.respond.include_greedy:
            samples[name_of(config.base)].append(GREEDY)
        every = {f"{model}:{'greedy' if k == GREEDY else k}": (model, k) for model in self.models for k in samples[model]}
        keys = []
        for name in named or self.models:
            if name not in every and name not in samples:
                raise UserError(f"select.candidates: expected names among {', '.join([*self.models, *every])}, got {name}")
            keys += [every[name]] if name in every else [(name, k) for k in samples[name]]
        self.place = {key: place for place, key in reversed(list(enumerate(keys)))}

    def has(self, answer: Answer) -> bool:
        return answer.key in self.place

    def __call__(self, answer: Answer) -> int:
        return self.place[answer.key]


def unrated(run: SynthesisRun) -> dict:
    """No ratings, and no judges' scales: nobody was asked."""
    run.pool.connection.execute("DELETE FROM ratings")
    return {}


def drop_reason(answers: Sequence[Answer], weight: float, floor: float | None) -> tuple[str | None, str | None]:
    """Why an item is out, and a figure; (None, None) where it stays. Without a floor nobody has to have judged the answers."""
    if weight <= 0:
        return NO_WEIGHT, None
    if not answers:
        return NO_ANSWER, None
    if floor is None:
        return None, None
    best = max((answer.value for answer in answers if answer.value is not None), default=None)
    if best is None:
        return NO_JUDGEMENT, None
    return (LOW, f"{best:.3f}") if best < floor - EQUAL else (None, None)


def preferences(run: SynthesisRun) -> dict[int, tuple[str, int]]:
    """By item, which of the two that were compared is preferred; none where it is even, or no judge spoke in both orders."""
    rows = run.pool.connection.execute(
        "SELECT item, judge, model, sample, other_model, other_sample, preference FROM comparisons ORDER BY item")
    found = ((item, preferred([row[1:] for row in rows])) for item, rows in itertools.groupby(rows, key=lambda row: row[0]))
    return {item: key for item, key in found if key}


def preferred(comparisons: Iterable[tuple]) -> tuple[str, int] | None:
    """The answer whose mean share, over the judges that spoke in both orders, is above one half.

    `comparisons`: (judge, model, sample, other_model, other_sample, share of the first) of one item.
    """
    shares = defaultdict(dict)
    for judge, *keys, share in comparisons:
        if share is not None:
            shares[judge][tuple(keys[:2])] = share
    both = sorted((judge, sorted(shown.items())) for judge, shown in shares.items() if len(shown) == 2)
    if not both:
        return None
    (one, _), (other, _) = both[0][1]
    mean = sum((first[1] + 1 - second[1]) / 2 for _, (first, second) in both) / len(both)
    return None if abs(mean - 0.5) < EQUAL else one if mean > 0.5 else other


# ---------------------------------------------------------------- the choice


def choose(config: Config, item: int, answers: Sequence[Answer], preferred: tuple[str, int] | None = None) -> Decision:
    """The answer that the rule takes and the one to be rejected, of answers of which at least one is rated."""
    rated = [answer for answer in answers if answer.value is not None]
    chosen = next((answer for answer in rated if answer.key == preferred), None) or by_rule(config, item, rated)
    return Decision(chosen, rejected(config, item, rated, chosen))


def by_rule(config: Config, item: int, rated: Sequence[Answer]) -> Answer:
    """best: the best. Else, of those near the best: majority: what most say, then the likeliest of it; base_likelihood: the likeliest.

    The best, where the base could read none of those. Ties by the seed.
    """
    best = max(answer.value for answer in rated)
    if config.select.rule != "best":
        near = [answer for answer in rated if answer.value >= best - config.select.margin - EQUAL]
        said = Counter(answer.text if config.select.rule == "majority" else None for answer in near)
        read = [answer for answer in near if answer.likelihood is not None]
        if read:
            return min(read, key=lambda answer: (-said[answer.text], -answer.likelihood, lot(config, item, answer)))
    return min((answer for answer in rated if answer.value >= best - EQUAL), key=lambda answer: lot(config, item, answer))


def rejected(config: Config, item: int, rated: Sequence[Answer], chosen: Answer) -> Answer | None:
    """The worst answer that reads otherwise, if it is clearly worse: by more than the points within which answers count as near."""
    others = [answer for answer in rated if answer.text != chosen.text]
    worst = min((answer.value for answer in others), default=chosen.value)
    if worst >= chosen.value - config.select.margin - EQUAL:
        return None
    return min((answer for answer in others if answer.value <= worst + EQUAL), key=lambda answer: lot(config, item, answer))


def lot(config: Config, item: int, answer: Answer) -> int:
    """What decides between equals."""
    return seeds.seed(config.seed, "select", answer.model, answer.sample, item)
