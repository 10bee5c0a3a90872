"""Which instructions stay: length, repetition, language, contamination, near-duplicates. Every drop has its reason in the pool.

Rules that look at an instruction alone come first and groups of near-duplicates last, so that what is out already takes nobody's place.
An instruction is a chat's last user turn; contamination is looked for in all of the user's turns. Everything is computed anew and written
in one transaction. That is cheap, so other settings are welcome until the first answer is there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from synth.config import Clean, Config
from synth.engines.interface import Failure
from synth.filters import contamination, duplicates, language
from synth.filters.contamination import Item, Phrases
from synth.filters.language import UNTOLD
from synth.filters.repetition import repetition
from synth.pool.run import SynthesisRun, identity
from synth.pool.seeds import uniform
from synth.pool.store import Chat

RULES = ("too short", "too long", "repetition", "language", "contaminated", "near-duplicate")  # in the order in which they are applied
ANSWERED = """SELECT 1 WHERE EXISTS (SELECT 1 FROM responses)
              OR EXISTS (SELECT 1 FROM drops WHERE stage NOT IN ('instruct', 'clean'))"""
LEAST = 5  # of a group stay under a cap that is a share of all items
EMBEDDED = 256  # tokens of a text that its embedding is made from, at most
SHOWN = 80  # characters of a phrase that a detail quotes


class Drop(NamedTuple):
    reason: str  # one of RULES
    detail: str


class Found(NamedTuple):
    """What the rules say: of every item its language, of some a drop, of those that came so far a group, of those kept a weight."""

    languages: dict[int, str]
    drops: dict[int, Drop]
    groups: dict[int, int]
    weights: dict[int, float]


def clean(run: SynthesisRun) -> None:
    """Decide about every item that was sampled whole. UserError: a missing evaluation file, or other settings than the answers have."""
    run.require("instruct")
    wanted = settings(run.config)
    if run.done("clean") and run.pool.get("settings.clean") == wanted:
        return
    if run.pool.select(ANSWERED):
        run.settle("clean", wanted)
    found = judged(run)
    with run.pool.transaction():
        run.pool.connection.execute("DELETE FROM drops WHERE stage = 'clean'")
        run.pool.connection.execute("DELETE FROM traits")
        run.pool.insert("drops", ((item, "clean", *drop) for item, drop in sorted(found.drops.items())))
        run.pool.insert("traits", ((item, code, found.groups.get(item), found.weights.get(item, 0.0))
                                   for item, code in sorted(found.languages.items())))
        run.pool.set("settings.clean", wanted)
    run.finish("clean")
    _tell(run, found)


def settings(config: Config) -> dict[str, Any]:
    """What the stage's results depend on; evaluation files by their content. UserError for values that cannot be used."""
    language.check_codes("clean.languages", config.clean.languages)
    language.check_shares("instruct.languages", config.instruct.languages)
    kept = dataclasses.asdict(config.clean) | {"wanted_languages": config.instruct.languages, "seed": config.seed}
    kept["contamination"] = {path: contamination.fingerprint(path) for path in config.clean.contamination}
    if config.clean.contamination_cosine:
        kept["embeddings_of"] = identity(config.base)
    return json.loads(json.dumps(kept))


def judged(run: SynthesisRun) -> Found:
    """All rules, one after the other."""
    config = run.config
    items = [item for path in config.clean.contamination for item in contamination.read_items(path)]
    phrases = Phrases(items, config.clean.contamination_ngram) if items else None
    found, texts = Found({}, {}, {}, {}), {}
    for chat in run.pool.chats("id NOT IN (SELECT item FROM drops WHERE stage <> 'clean')"):
        found.languages[chat.item] = language.language_of(chat.instruction)
        drop = drop_alone(chat, found.languages[chat.item], config.clean, phrases)
        if drop:
            found.drops[chat.item] = drop
        else:
            texts[chat.item] = chat.instruction
    if items and config.clean.contamination_cosine and texts:
        found.drops.update(_resembling(run, items, texts))
    kept = {item: text for item, text in texts.items() if item not in found.drops}
    ids = list(kept)
    found.groups.update((item, ids[first]) for item, first in zip(ids, duplicates.group(list(kept.values()), config.clean.dedup_jaccard)))
    dropped, weights = thin(found.groups, config.clean.duplicates, config.clean.duplicate_cap, config.seed)
    found.drops.update(dropped)
    found.weights.update(balanced(weights, found.languages, config.instruct.languages))
    return found


# ---------------------------------------------------------------- rules


def drop_alone(chat: Chat, code: str, rules: Clean, phrases: Phrases | None) -> Drop | None:
    """Why an item is out whatever the others are; None where it is not."""
    text = chat.instruction
    length = len(text.strip())
    if length < rules.min_characters:
        return Drop("too short", f"{length} characters")
    if length > rules.max_characters:
        return Drop("too long", f"{length:,} characters")
    if (share := repetition(text, rules.max_repetition)) > rules.max_repetition:
        return Drop("repetition", f"{share:.2f} of it is one phrase")
    if rules.languages and code not in (*rules.languages, *UNTOLD):
        return Drop("language", code)
    asked = (message["content"] for message in chat.messages if message["role"] == "user")
    shared = next(filter(None, map(phrases.find, asked)), None) if phrases else None
    return shared and Drop("contaminated", f"{shared.place}: {shared.text[:SHOWN]}")


def _resembling(run: SynthesisRun, items: list[Item], texts: Mapping[int, str]) -> dict[int, Drop]:
    """Items that the base puts next to an evaluation item, by its own embeddings."""
    format = run.format(run.base)
    opening = format.pre_query(()).token_ids  # a text where the base writes it: in a user's first turn

    def tokens(text: str) -> tuple[int, ...]:
        return *opening, *format.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:EMBEDDED]

    with run.at_work("clean", dataclasses.replace(run.base, engine="transformers"), record=False) as worker:
        return resembling(worker.engine.embed, tokens, items, texts, run.config.clean.contamination_cosine, run.say)


def resembling(embed: contamination.Embed, tokens: Callable[[str], tuple[int, ...]], items: list[Item], texts: Mapping[int, str],
               least: float, say: Callable[[str], None]) -> dict[int, Drop]:
    """Items whose text has a cosine of `least` or more with an evaluation item. Equal texts are embedded once."""
    alike: dict[str, list[int]] = defaultdict(list)
    for item, text in texts.items():
        alike[text].append(item)
    failures = Counter()

    def counted(requests: Iterable):
        for result in embed(requests):
            failures.update([result.reason] if isinstance(result, Failure) else [])
            yield result

    near = contamination.nearest(counted, [tokens(item.text) for item in items],
                                 ((of[0], tokens(text)) for text, of in alike.items()), least)
    drops = {other: Drop("contaminated", f"{items[n].place}: cosine {cosine:.3f}")
             for item, n, cosine in near for other in alike[texts[item]]}
    for reason, count in sorted(failures.items()):
        say(f"clean: {count:,} texts have no embedding and resemble nothing: {reason}")
    return drops


def thin(groups: Mapping[int, int], rule: str, cap: float, seed: int) -> tuple[dict[int, Drop], dict[int, float]]:
    """Drops and weights by the rule for groups of near-duplicates. Who of a group stays is drawn by the run's seed."""
    members: dict[int, list[int]] = defaultdict(list)
    for item, first in groups.items():
        members[first].append(item)
    most = {"cap": most_of(cap, len(groups)), "drop": 1}.get(rule, len(groups))
    drops, weights = {}, {}
    for first, of in members.items():
        drawn = of if len(of) <= most else sorted(of, key=lambda item: (uniform(seed, "clean", "duplicates", item), item))
        weights.update(dict.fromkeys(drawn[:most], 1.0 / len(of) if rule == "weight" else 1.0))
        drops.update((item, Drop("near-duplicate", f"group {first} of {len(of):,}, {most} stay")) for item in drawn[most:])
    return drops, weights


def most_of(count: float, items: int) -> int:
    """How many of a group stay under a cap: so many, or a share of all items, but never fewer than LEAST.

    A cap that does not grow with the pool is a de-duplication where the pool is large. Total variation of the miniature's topics from those
    before the rule: cap of 5 .018, .131 and .168 for pools of 4,000, 20,000 and 100,000; cap of 0.2% .003, .000 and .000.
    """
    return int(count) if count >= 1 else max(LEAST, math.ceil(count * items))


def balanced(weights: Mapping[int, float], languages: Mapping[int, str], wanted: Mapping[str, float]) -> dict[int, float]:
    """Weights with which the languages have their wanted shares."""
    if not wanted:
        return dict(weights)
    actual: dict[str, float] = defaultdict(float)
    for item in sorted(weights):
        actual[languages[item]] += weights[item]
    factors = language.factors(actual, wanted)
    return {item: weight * factors[languages[item]] for item, weight in weights.items()}


# ---------------------------------------------------------------- words about it


def _tell(run: SynthesisRun, found: Found) -> None:
    """One line for each rule that dropped something, and what is left."""
    counts = Counter(drop.reason for drop in found.drops.values())
    total = len(found.languages)
    for rule in RULES:
        if counts[rule]:
            run.say(f"clean: {rule}: {counts[rule]:,} of {total:,} items dropped ({counts[rule] / total:.1%})")
    for code in sorted(set(run.config.instruct.languages) - {found.languages[item] for item in found.weights}):
        run.say(f"clean: instruct.languages: no item is in '{code}'; its share goes to the other languages that are listed")
    kept, groups = len(found.weights), len({*map(found.groups.get, found.weights)})
    run.say(f"clean: {kept:,} of {total:,} items stay ({kept / max(total, 1):.1%}), in {groups:,} groups")
