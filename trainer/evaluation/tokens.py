"""Tokenize items: prompts to generate answers to, and samples whose log-prob is measured.

The log-prob of an item is that of one sample: its right answer after its prompt, or the held-out text. An item with choices has a sample
for each choice. An answer in a chat includes the end of its turn, as in training; a choice is only its text, as in lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError
from trainer.evaluation.config import MAX_TOKENS, Config
from trainer.evaluation.items import Item, ItemFile

TEXTS_PER_CALL = 500  # texts in one call of the tokenizer


class Key(NamedTuple):
    """The number of an item's file, and the item's number in that file."""

    file: int
    item: int


class Prompt(NamedTuple):
    """A prompt to generate an answer to."""

    key: Key
    ids: list[int]
    max_tokens: int  # of the answer


@dataclass(frozen=True)
class Sample:
    """A tokenized text, some of whose tokens are scored."""

    key: Key
    choice: int | None  # number of the choice; None: the item has no choices
    gives_logprob: bool  # its log-prob is the item's: right answer, right choice or held-out text
    ids: np.ndarray  # int32[n]
    scored: np.ndarray  # bool[n]; never the first, which has no context
    bytes: int  # of the scored tokens' text, special tokens left out
    asks_greedy: bool = False  # whether every scored token is the likeliest is measured too

    @property
    def tokens(self) -> int:
        return int(self.scored.sum())


@dataclass
class Tokens:
    """The tokenized items of an evaluation."""

    prompts: list[Prompt]
    samples: list[Sample]
    truncated: int = 0  # held-out texts
    dropped: int = 0  # held-out texts
    unmeasured: int = 0  # right answers, too long to measure, of items with generated answers


def encode(files: Sequence[ItemFile], template: ChatTemplate, config: Config, context: int | None) -> Tokens:
    """Return the tokens of all items for one model, whose longest input is `context`.

    Raises UserError if an item does not fit the model or its chat template.
    """
    tokens = Tokens([], [])
    for f, file in enumerate(files):
        chat, max_tokens = config.data.chat and file.options.chat, config.generation.max_tokens or file.options.max_tokens or MAX_TOKENS
        for start in range(0, len(file.items), TEXTS_PER_CALL):
            keys = [Key(f, i) for i in range(start, min(start + TEXTS_PER_CALL, len(file.items)))]
            items = [file.items[key.item] for key in keys]
            if file.metric == "logprob":
                tokens.samples += _heldout_samples(keys, items, template)
            elif file.metric == "choice":
                tokens.samples += _choice_samples(keys, items, template, chat)
            elif file.metric == "continuation":
                tokens.samples += [replace(sample, asks_greedy=True) for sample in _answer_samples(keys, items, template, chat)]
            else:
                encoded = template.tokenizer([prompt_text(item, template, chat) for item in items], verbose=False,
                                             add_special_tokens=not chat)["input_ids"]
                tokens.prompts += [Prompt(key, ids, max_tokens) for key, ids in zip(keys, encoded)]
                if file.metric != "rules":
                    tokens.samples += _answer_samples(keys, items, template, chat)
    _fit(files, tokens, template, config, context)
    return tokens


# ---------------------------------------------------------------- prompts and samples


def prompt_text(item: Item, template: ChatTemplate, chat: bool) -> str:
    """Return the text up to the beginning of the answer."""
    if chat:
        try:
            return template.render([dict(turn) for turn in item.prompt], add_generation_prompt=True,
                                   inputs={**template.keywords, **item.inputs})
        except UserError as error:
            raise UserError(f"{item.place}: {error}") from None
    if len(item.prompt) > 1:
        raise UserError(f"{item.place}: expected one prompt where data.chat is false, found a chat of {len(item.prompt)} turns")
    return item.prompt[0]["content"]


def _answer_samples(keys: list[Key], items: list[Item], template: ChatTemplate, chat: bool) -> list[Sample]:
    if chat:
        chats = [[*map(dict, item.prompt), {"role": "assistant", "content": item.answers[0]}] for item in items]
        encoded = template.encode_chats(chats, "last", [item.place for item in items], [item.inputs for item in items])
    else:
        encoded = _encode_pairs(template, [(prompt_text(item, template, False), item.answers[0]) for item in items], False)
    return [_make_sample(template, key, None, True, *tokens) for key, tokens in zip(keys, encoded)]


def _heldout_samples(keys: list[Key], items: list[Item], template: ChatTemplate) -> list[Sample]:
    """Return the samples of one file, whose items are all texts or all chats."""
    if items[0].text is not None:
        encoded = template.encode_texts([item.text for item in items])
    else:
        encoded = template.encode_chats([[*map(dict, item.chat)] for item in items], "assistant", [item.place for item in items],
                                        [item.inputs for item in items])
    return [_make_sample(template, key, None, True, *tokens) for key, tokens in zip(keys, encoded)]


def _choice_samples(keys: list[Key], items: list[Item], template: ChatTemplate, chat: bool) -> list[Sample]:
    """Return a sample for each choice of each item; a continuation is scored after each choice."""
    pairs = [(choice, item.continuation) if item.continuation else (prompt_text(item, template, chat), choice)
             for item in items for choice in item.choices]
    encoded = iter(_encode_pairs(template, pairs, chat))
    return [_make_sample(template, key, c, c == item.right_choice, *next(encoded))
            for key, item in zip(keys, items) for c in range(len(item.choices))]


def _encode_pairs(template: ChatTemplate, pairs: list[tuple[str, str]], chat: bool) -> list[tuple[list[int], list[bool]]]:
    """Tokenize prompts and answers together; return token ids, and a mask of the answer's tokens.

    The answer begins at the first token with a character of it. Without a chat template a space separates the two, and a token that begins
    with this space belongs to the answer.
    """
    joined = [(prompt if chat or prompt[-1:].isspace() else f"{prompt} ", answer) for prompt, answer in pairs]
    encoding = template.tokenizer([prompt + answer for prompt, answer in joined], add_special_tokens=not chat, verbose=False)
    encoded = []
    for i, (prompt, answer) in enumerate(joined):
        ids, start = encoding["input_ids"][i], len(prompt if chat else prompt.rstrip())
        tokens = (encoding.char_to_token(i, place) for place in range(start, len(prompt + answer)))
        first = next((token for token in tokens if token is not None), len(ids))
        encoded.append((ids, [first <= token for token in range(len(ids))]))
    return encoded


def _make_sample(template: ChatTemplate, key: Key, choice: int | None, gives_logprob: bool, ids: list[int],
                 scored: Sequence[bool]) -> Sample:
    mask = np.array(scored, dtype=bool)
    mask[:1] = False
    return _with_bytes(template, Sample(key, choice, gives_logprob, np.array(ids, dtype=np.int32), mask, 0))


def _with_bytes(template: ChatTemplate, sample: Sample) -> Sample:
    """Return the sample with the bytes of its scored text."""
    scored_ids = sample.ids[sample.scored].tolist()
    text = template.tokenizer.decode(scored_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return replace(sample, bytes=len(text.encode()))


# ---------------------------------------------------------------- lengths


def _fit(files: Sequence[ItemFile], tokens: Tokens, template: ChatTemplate, config: Config, context: int | None) -> None:
    """Truncate or drop held-out texts that are too long, as `data.on_overlong` says.

    Right answers that are too long are not measured; the generated ones are still judged. Raises UserError for anything else that is too
    long, and for samples without scored tokens.
    """
    limit = min(config.scoring.tokens_per_pack, context or 2**31)
    limit_name = f"the model's context of {limit:,}" if limit == context else f"scoring.tokens_per_pack = {limit:,}"
    for prompt in tokens.prompts:
        if context is not None and len(prompt.ids) + prompt.max_tokens > context:
            raise UserError(f"{_place(files, prompt.key)}: a prompt of {len(prompt.ids):,} tokens and generation.max_tokens = "
                            f"{prompt.max_tokens:,} exceed the model's context of {context:,}; lower generation.max_tokens, or shorten "
                            "the prompt")
    kept = []
    for sample in tokens.samples:
        if len(sample.ids) > limit and files[sample.key.file].metric in ("exact", "regex"):
            tokens.unmeasured += 1
            continue
        if len(sample.ids) > limit:
            heldout = files[sample.key.file].metric == "logprob"
            if not heldout or config.data.on_overlong == "error":
                remedy = "set data.on_overlong to drop or truncate" if heldout else "shorten it"
                raise UserError(f"{_place(files, sample.key)}: {len(sample.ids):,} tokens exceed {limit_name}; {remedy}"
                                + (", or raise it" if limit != context else ""))
            if config.data.on_overlong == "drop":
                tokens.dropped += 1
                continue
            tokens.truncated += 1
            sample = _with_bytes(template, replace(sample, ids=sample.ids[:limit], scored=sample.scored[:limit]))
        if not sample.scored.any():
            raise UserError(f"{_place(files, sample.key)}: expected tokens to measure the log-prob of, found none in "
                            f"{len(sample.ids)} tokens")
        kept.append(sample)
    tokens.samples = kept


def _place(files: Sequence[ItemFile], key: Key) -> str:
    return files[key.file].items[key.item].place
