"""Items to tokens: prompts to be answered, and samples whose log-prob is measured.

Every item has one reference sample, its right answer after its prompt (or the held-out text itself); an item with choices has a sample
for each choice. In a chat answer the end of the turn counts too, as in training; a choice is its text alone, as in lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError
from trainer.evaluation.config import Config
from trainer.evaluation.items import Item, ItemFile

BATCH = 500  # texts in one call of the tokenizer


class Key(NamedTuple):
    """Which item: number of its file, and in its file."""

    file: int
    item: int


class Prompt(NamedTuple):
    key: Key
    ids: list[int]


@dataclass(frozen=True)
class Sample:
    """A text whose tokens from `start` on are scored."""

    key: Key
    choice: int | None  # None: the reference of an item without choices
    reference: bool  # the right choice is one too
    ids: np.ndarray  # int32[n]
    scored: np.ndarray  # bool[n]; never the first, which nothing predicts
    bytes: int  # of the scored tokens' text, special tokens left out

    @property
    def tokens(self) -> int:
        return int(self.scored.sum())


@dataclass
class Tokens:
    prompts: list[Prompt]
    samples: list[Sample]
    cut: int = 0  # held-out texts that were cut off
    dropped: int = 0  # held-out texts that were left out
    unmeasured: int = 0  # right answers too long to measure, of items that are answered by generating


def encode(files: Sequence[ItemFile], template: ChatTemplate, config: Config, context: int | None) -> Tokens:
    """The tokens of all items for one model, whose longest input is `context`. UserError for what does not fit it."""
    tokens = Tokens([], [])
    for f, file in enumerate(files):
        for start in range(0, len(file.items), BATCH):
            keys = [Key(f, i) for i in range(start, min(start + BATCH, len(file.items)))]
            items = [file.items[key.item] for key in keys]
            if file.metric == "logprob":
                tokens.samples += _heldout(keys, items, template)
            elif file.metric == "choice":
                tokens.samples += _choices(keys, items, template, config.data.chat)
            else:
                encoded = template.tokenizer([_asked(item, template, config.data.chat) for item in items], verbose=False,
                                             add_special_tokens=not config.data.chat)["input_ids"]
                tokens.prompts += map(Prompt, keys, encoded)
                tokens.samples += _references(keys, items, template, config.data.chat)
    _fit(files, tokens, template, config, context)
    return tokens


# ---------------------------------------------------------------- what is asked


def _asked(item: Item, template: ChatTemplate, chat: bool) -> str:
    """The text up to where the answer begins."""
    if chat:
        try:
            return template.render([dict(turn) for turn in item.prompt], add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"{item.place}: {error}") from None
    if len(item.prompt) > 1:
        raise UserError(f"{item.place}: expected one prompt where data.chat is false, found a chat of {len(item.prompt)} turns")
    return item.prompt[0]["content"]


def _references(keys: list[Key], items: list[Item], template: ChatTemplate, chat: bool) -> list[Sample]:
    if chat:
        chats = [[*map(dict, item.prompt), {"role": "assistant", "content": item.answers[0]}] for item in items]
        encoded = template.encode_chats(chats, "last", [item.place for item in items])
    else:
        encoded = _continued(template, [(_asked(item, template, False), item.answers[0]) for item in items], False)
    return [_sample(template, key, None, True, *tokens) for key, tokens in zip(keys, encoded)]


def _heldout(keys: list[Key], items: list[Item], template: ChatTemplate) -> list[Sample]:
    """Of one file, whose items are all texts or all chats."""
    if items[0].text is not None:
        encoded = template.encode_texts([item.text for item in items])
    else:
        encoded = template.encode_chats([[*map(dict, item.chat)] for item in items], "assistant", [item.place for item in items])
    return [_sample(template, key, None, True, *tokens) for key, tokens in zip(keys, encoded)]


def _choices(keys: list[Key], items: list[Item], template: ChatTemplate, chat: bool) -> list[Sample]:
    asked = [_asked(item, template, chat) for item in items]
    encoded = iter(_continued(template, [(text, choice) for text, item in zip(asked, items) for choice in item.choices], chat))
    return [_sample(template, key, c, c == item.right, *next(encoded)) for key, item in zip(keys, items) for c in range(len(item.choices))]


def _continued(template: ChatTemplate, pairs: list[tuple[str, str]], chat: bool) -> list[tuple[list[int], list[bool]]]:
    """Token ids of question and answer as they are spelt together, and which belong to the answer: from the first that holds a character
    of it. Without a chat template a space stands between them, and a token that begins with it is the answer's."""
    joined = [(asked if chat or asked[-1:].isspace() else f"{asked} ", answer) for asked, answer in pairs]
    found = template.tokenizer([asked + answer for asked, answer in joined], add_special_tokens=not chat, verbose=False)
    encoded = []
    for i, (asked, answer) in enumerate(joined):
        ids, start = found["input_ids"][i], len(asked if chat else asked.rstrip())
        places = (found.char_to_token(i, place) for place in range(start, len(asked + answer)))
        first = next((place for place in places if place is not None), len(ids))
        encoded.append((ids, [first <= place for place in range(len(ids))]))
    return encoded


def _sample(template: ChatTemplate, key: Key, choice: int | None, reference: bool, ids: list[int], scored: Sequence[bool]) -> Sample:
    flags = np.array(scored, dtype=bool)
    flags[:1] = False
    return _measured(template, Sample(key, choice, reference, np.array(ids, dtype=np.int32), flags, 0))


def _measured(template: ChatTemplate, sample: Sample) -> Sample:
    """The sample with the bytes of its scored text."""
    said = sample.ids[sample.scored].tolist()
    text = template.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return replace(sample, bytes=len(text.encode()))


# ---------------------------------------------------------------- what fits


def _fit(files: Sequence[ItemFile], tokens: Tokens, template: ChatTemplate, config: Config, context: int | None) -> None:
    """Cut or drop held-out texts that are too long, if that was asked for, and leave out right answers, which generating does not need.

    UserError for all else that is too long or empty.
    """
    limit, most = min(config.scoring.tokens_per_pack, context or 2**31), config.generation.max_tokens
    why = f"the model's context of {limit:,}" if limit == context else f"scoring.tokens_per_pack = {limit:,}"
    for prompt in tokens.prompts:
        if context is not None and len(prompt.ids) + most > context:
            raise UserError(f"{_place(files, prompt.key)}: a prompt of {len(prompt.ids):,} tokens and generation.max_tokens = {most:,} "
                            f"exceed the model's context of {context:,}; lower generation.max_tokens, or shorten the prompt")
    kept = []
    for sample in tokens.samples:
        if len(sample.ids) > limit and files[sample.key.file].metric in ("exact", "regex"):
            tokens.unmeasured += 1
            continue
        if len(sample.ids) > limit:
            heldout = files[sample.key.file].metric == "logprob"
            if not heldout or config.data.on_overlong == "error":
                remedy = "set data.on_overlong to drop or truncate" if heldout else "shorten it"
                raise UserError(f"{_place(files, sample.key)}: {len(sample.ids):,} tokens exceed {why}; {remedy}"
                                + (", or raise it" if limit != context else ""))
            if config.data.on_overlong == "drop":
                tokens.dropped += 1
                continue
            tokens.cut += 1
            sample = _measured(template, replace(sample, ids=sample.ids[:limit], scored=sample.scored[:limit]))
        if not sample.scored.any():
            raise UserError(f"{_place(files, sample.key)}: expected tokens to measure the log-prob of, found none in "
                            f"{len(sample.ids)} tokens")
        kept.append(sample)
    tokens.samples = kept


def _place(files: Sequence[ItemFile], key: Key) -> str:
    return files[key.file].items[key.item].place
