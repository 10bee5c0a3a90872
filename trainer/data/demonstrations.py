"""Read chats as demonstrations: the prompt of each, without and with its answer as an example.

The samples made of them have room in place of an answer, which the model gives as it trains (trainer/on_policy).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trainer.config import Config, Source
from trainer.data.chat_template import ChatTemplate
from trainer.data.samples import Samples
from trainer.data.tokenize import chat_of
from trainer.data.turn_spans import Message
from trainer.errors import UserError


@dataclass(frozen=True)
class Demonstrations:
    """The prompts of the domain's samples, in their order, in token ids."""

    prompts: list[list[int]]  # which the model answers
    shown: list[list[int]]  # those with the chat's answer as an example, which the teacher reads

    @property
    def fingerprint(self) -> str:
        """Return a hash of what the teacher reads, in its order; that of the samples knows the prompts."""
        return hashlib.sha256(repr(self.shown).encode()).hexdigest()[:16]


def read_demonstrations(sources: Sequence[tuple[Source, Dataset]], names: Sequence[str], template: ChatTemplate,
                        config: Config) -> tuple[Samples, Demonstrations]:
    """Return a sample with room for an answer for each chat that ends with one, and the demonstrations.

    Chats whose prompts leave no room are left out and counted as dropped. Raises UserError for rows that are no such chats.
    """
    parts, all_prompts, all_shown = [], [], []
    for name, (source, records) in zip(names, sources):
        prompts, shown, weights, dropped, refused = [], [], [], 0, 0
        for number, record in enumerate(records, 1):
            try:
                asked, example = demonstration(record, template, config)
            except UserError as error:
                if config.data.on_bad_row == "error":
                    raise UserError(f"{source.path}, {record.get('place') or f'record {number}'}: {error}") from None
                refused += 1
                continue
            if max(len(asked), len(example)) >= config.data.max_length:
                dropped += 1
                continue
            prompts.append(asked)
            shown.append(example)
            weights.append(1.0 if record.get("weight") is None else record["weight"])
        if not prompts:
            raise UserError(f"{source.path}: expected chats whose prompt, with their answer as an example, has fewer than "
                            f"data.max_length = {config.data.max_length} tokens, found {dropped:,} with more; raise it")
        samples = with_room(name, prompts, shown, config)
        samples.length_report[name] |= {"dropped": dropped, "refused": refused}
        parts.append(replace(samples, weights=np.array(weights, dtype=np.float32)))
        all_prompts += prompts
        all_shown += shown
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.beside(part)
    return whole, Demonstrations(all_prompts, all_shown)


def with_room(name: str, prompts: Sequence[list[int]], shown: Sequence[list[int]], config: Config) -> Samples:
    """Return samples of these prompts, each followed by zeros in place of the longest answer it may get."""
    ids, supervised = [], []
    for prompt, example in zip(prompts, shown):
        room = min(config.on_policy.max_tokens, config.data.max_length - max(len(prompt), len(example)))
        ids.append(np.array([*prompt, *[0] * room], dtype=np.int32))
        supervised.append(np.arange(len(ids[-1])) >= len(prompt))
    return Samples.of_tokens(name, ids, supervised)


def demonstration(record: dict, template: ChatTemplate, config: Config) -> tuple[list[int], list[int]]:
    """Return the token ids of a chat's prompt, without and with its last answer as an example.

    Raises UserError for a row that is no chat of a user's turn and an answer in text.
    """
    if "text" in record:
        raise UserError("expected a chat, found plain text; give messages, or prompt and completion")
    messages, _, inputs = chat_of(record, config.data)
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    *asked, answer = messages
    for role, message in (("user", asked[-1] if asked else None), ("assistant", answer)):
        if message is None or message["role"] != role or not isinstance(message["content"], str):
            raise UserError("expected a chat that ends with a user's turn and an answer, both of text; on_policy.method sdft shows the "
                            "answer as an example")
    example = fill(config.on_policy.prompt, asked[-1]["content"], answer["content"])
    keywords = {**template.keywords, **inputs}

    def ids_of(chat: list[Message], tokenizer: PreTrainedTokenizerBase = template.tokenizer) -> list[int]:
        text = template.render(chat, add_generation_prompt=True, inputs=keywords)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return ids_of(asked), ids_of([*asked[:-1], asked[-1] | {"content": example}])


def fill(text: str, prompt: str, answer: str) -> str:
    """Return a text with {prompt} and {answer} replaced, once each place, whatever the two contain."""
    return re.sub(r"\{(prompt|answer)\}", lambda match: {"prompt": prompt, "answer": answer}[match[1]], text)
