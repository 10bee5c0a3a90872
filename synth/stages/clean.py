"""Stage `clean`: filter instructions by length, repetition, language, contamination and duplicates.

Every drop has its reason in the pool. The rules that look at one instruction come first and near-duplicates last, so that a dropped
instruction takes nobody's place in its group. The instruction of a chat is its last user turn; contamination is looked for in all user
turns. The stage computes everything anew and writes it in one transaction, so its options may change until the first response is in the
pool.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from synth.config import Clean, Config
from synth.engines.interface import Failure
from synth.filters import contamination, duplicates, language
from synth.filters.contamination import EvaluationItem, NgramIndex
from synth.filters.language import UNKNOWN
from synth.filters.repetition import repetition
from synth.filters.rules import RULES, Drop
from synth.pool.seeds import uniform
from synth.pool.store import Chat
from synth.pool.synthesis_run import SynthesisRun, model_identity

MIN_SHARE_CAP = 5  # items of a group that stay at least under a cap that is a share of all items
EMBEDDED_TOKENS = 256  # of a text, at most
DETAIL_CHARACTERS = 80  # of a phrase that a drop's detail quotes

HAS_RESPONSES = """
    SELECT 1 WHERE EXISTS (SELECT 1 FROM responses) OR EXISTS (SELECT 1 FROM drops WHERE stage NOT IN ('instruct', 'clean'))"""
NOT_DROPPED_ELSEWHERE = "id NOT IN (SELECT item FROM drops WHERE stage <> 'clean')"


@dataclass
class CleanResult:
    """The findings of all rules, by item."""

    languages: dict[int, str] = field(default_factory=dict)  # of every item
    drops: dict[int, Drop] = field(default_factory=dict)
    groups: dict[int, int] = field(default_factory=dict)  # of near-duplicates: the first item of each; without earlier drops
    weights: dict[int, float] = field(default_factory=dict)  # of the items that are kept


def clean(run: SynthesisRun) -> None:
    """Run the stage.

    Raises UserError for a missing evaluation file, or where responses were made with other settings.
    """
    run.require("instruct")
    current = settings(run.config)
    if run.done("clean") and run.pool.get("settings.clean") == current:
        return
    if run.pool.select(HAS_RESPONSES):
        run.pin_settings("clean", current)
    result = apply_rules(run)
    with run.pool.transaction():
        run.pool.connection.execute("DELETE FROM drops WHERE stage = 'clean'")
        run.pool.connection.execute("DELETE FROM traits")
        run.pool.insert("drops", ((item, "clean", *drop) for item, drop in sorted(result.drops.items())))
        run.pool.insert("traits", ((item, code, result.groups.get(item), result.weights.get(item, 0.0))
                                   for item, code in sorted(result.languages.items())))
        run.pool.set("settings.clean", current)
    run.finish("clean")
    for line in summary_lines(run.config, result):
        run.say(f"clean: {line}")


def settings(config: Config) -> dict[str, Any]:
    """Return everything that the results depend on, with a hash of each evaluation file.

    Raises UserError for values that cannot be used.
    """
    language.check_codes("clean.languages", config.clean.languages)
    language.check_shares("instruct.languages", config.instruct.languages)
    kept = dataclasses.asdict(config.clean) | {"wanted_languages": config.instruct.languages, "seed": config.seed}
    kept["contamination"] = {path: contamination.fingerprint(path) for path in config.clean.contamination}
    if config.clean.contamination_cosine:
        kept["embeddings_of"] = model_identity(config.base)
    return json.loads(json.dumps(kept))


def apply_rules(run: SynthesisRun) -> CleanResult:
    """Apply all rules, one after the other."""
    options = run.config.clean
    evaluation_items = [item for path in options.contamination for item in contamination.read_items(path)]
    index = NgramIndex(evaluation_items, options.contamination_ngram) if evaluation_items else None
    result, texts = CleanResult(), {}
    for chat in run.pool.chats(NOT_DROPPED_ELSEWHERE):
        code = result.languages[chat.item] = language.language_of(chat.instruction)
        if drop := drop_by_content(chat, code, options, index):
            result.drops[chat.item] = drop
        else:
            texts[chat.item] = chat.instruction
    if evaluation_items and options.contamination_cosine and texts:
        result.drops.update(_drop_by_base_embeddings(run, evaluation_items, texts))
    texts = {item: text for item, text in texts.items() if item not in result.drops}
    items = list(texts)
    firsts = duplicates.group_near_duplicates(list(texts.values()), options.dedup_jaccard)
    result.groups.update((item, items[first]) for item, first in zip(items, firsts))
    dropped, weights = thin_groups(result.groups, options.duplicates, options.duplicate_cap, run.config.seed)
    result.drops.update(dropped)
    result.weights.update(balance_languages(weights, result.languages, run.config.instruct.languages))
    return result


# ---------------------------------------------------------------- rules


def drop_by_content(chat: Chat, code: str, options: Clean, index: NgramIndex | None) -> Drop | None:
    """Return why an item is dropped for its own content; None where it is not. `code` is its language."""
    text = chat.instruction
    length = len(text.strip())
    if length < options.min_characters:
        return Drop("too short", f"{length} characters")
    if length > options.max_characters:
        return Drop("too long", f"{length:,} characters")
    if (share := repetition(text, options.max_repetition)) > options.max_repetition:
        return Drop("repetition", f"one phrase makes up {share:.2f} of it")
    if options.languages and code not in (*options.languages, *UNKNOWN):
        return Drop("language", code)
    if index:
        for message in chat.messages:
            if message["role"] == "user" and (match := index.find(message["content"])):
                return Drop("contaminated", f"{match.place}: {match.words[:DETAIL_CHARACTERS]}")
    return None


def _drop_by_base_embeddings(run: SynthesisRun, items: list[EvaluationItem], texts: Mapping[int, str]) -> dict[int, Drop]:
    """Drop items whose embedding by the base is near that of an evaluation item."""
    format = run.format(run.base)
    prefix = format.user_prompt(()).token_ids  # a text is embedded where the base writes it: in a first user turn

    def tokens(text: str) -> tuple[int, ...]:
        return *prefix, *format.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:EMBEDDED_TOKENS]

    with run.use_engine("clean", dataclasses.replace(run.base, engine="transformers"), record=False) as writer:
        return drop_by_embeddings(writer.engine.embed, tokens, items, texts, run.config.clean.contamination_cosine, run.say)


def drop_by_embeddings(embed: contamination.Embed, tokens: Callable[[str], tuple[int, ...]], items: list[EvaluationItem],
                       texts: Mapping[int, str], min_cosine: float, say: Callable[[str], None]) -> dict[int, Drop]:
    """Drop items whose text has a cosine of at least `min_cosine` with an evaluation item.

    Equal texts are embedded once.
    """
    items_of: dict[str, list[int]] = defaultdict(list)
    for item, text in texts.items():
        items_of[text].append(item)
    failures = Counter()

    def embed_and_count_failures(requests: Iterable):
        for result in embed(requests):
            failures.update([result.reason] if isinstance(result, Failure) else [])
            yield result

    matches = contamination.find_similar(embed_and_count_failures, [tokens(item.text) for item in items],
                                         ((equal[0], tokens(text)) for text, equal in items_of.items()), min_cosine)
    drops = {item: Drop("contaminated", f"{items[match.item].place}: cosine {match.cosine:.3f}")
             for match in matches for item in items_of[texts[match.key]]}
    for reason, count in sorted(failures.items()):
        say(f"clean: contamination_cosine: {count:,} texts were not checked, they could not be embedded: {reason}")
    return drops


def thin_groups(groups: Mapping[int, int], rule: str, cap: float, seed: int) -> tuple[dict[int, Drop], dict[int, float]]:
    """Return drops and weights by the rule `clean.duplicates`.

    The seed decides which items of a group are kept.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for item, first in groups.items():
        members[first].append(item)
    max_kept = {"cap": cap_count(cap, len(groups)), "drop": 1}.get(rule, len(groups))
    drops, weights = {}, {}
    for first, group in members.items():
        if len(group) > max_kept:
            group = sorted(group, key=lambda item: (uniform(seed, "clean", "duplicates", item), item))
        weights.update(dict.fromkeys(group[:max_kept], 1.0 / len(group) if rule == "weight" else 1.0))
        detail = f"group of item {first}: {max_kept} of {len(group):,} kept"
        drops.update((item, Drop("near-duplicate", detail)) for item in group[max_kept:])
    return drops, weights


def cap_count(cap: float, items: int) -> int:
    """Return how many items of a group are kept under a cap.

    That is the cap itself, or below 1 a share of all items but at least MIN_SHARE_CAP.

    A cap that does not grow with the pool removes most duplicates of a large pool, and with them its distribution.
    """
    return int(cap) if cap >= 1 else max(MIN_SHARE_CAP, math.ceil(cap * items))


def balance_languages(weights: Mapping[int, float], languages: Mapping[int, str], shares: Mapping[str, float]) -> dict[int, float]:
    """Scale the weights so that the languages have the wanted shares."""
    if not shares:
        return dict(weights)
    actual: dict[str, float] = defaultdict(float)
    for item in sorted(weights):
        actual[languages[item]] += weights[item]
    factors = language.weight_factors(actual, shares)
    return {item: weight * factors[languages[item]] for item, weight in weights.items()}


# ---------------------------------------------------------------- console


def summary_lines(config: Config, result: CleanResult) -> list[str]:
    """Return a line for each rule that dropped something, and one about what is kept."""
    counts = Counter(drop.reason for drop in result.drops.values())
    total = len(result.languages)
    lines = [f"dropped {counts[rule]:,} of {total:,} items ({counts[rule] / total:.1%}): {rule}" for rule in RULES if counts[rule]]
    for code in sorted(set(config.instruct.languages) - {result.languages[item] for item in result.weights}):
        lines.append(f"instruct.languages: no item is in '{code}'; the other listed languages get its share")
    kept, groups = len(result.weights), len({result.groups.get(item) for item in result.weights})
    lines.append(f"kept {kept:,} of {total:,} items ({kept / max(total, 1):.1%}), in {groups:,} groups of near-duplicates")
    return lines
