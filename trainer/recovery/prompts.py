"""Read the prompts of chats: their turns but a last answer, as the template opens an answer to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from trainer.config import Data, Source
from trainer.data.chat_template import ChatTemplate
from trainer.data.sources import load_sources
from trainer.data.tokenize import chat_of
from trainer.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids, in the order of their files."""

    ids: list[list[int]]
    answered: int  # chats that have an answer, which is not part of the prompt
    too_long: int  # chats left out, as they leave no room for an answer

    @property
    def fingerprint(self) -> str:
        """Return a hash of the prompts in their order."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()[:16]


def read_prompts(option: str, sources: str | list[str | Source], template: ChatTemplate, longest: int) -> Prompts:
    """Return the prompts of at most `longest` tokens of all chats in these sources.

    Raises UserError, which names the option, for rows that are no chats or that the template refuses, and where no prompt is left.
    """
    found, answered, too_long = [], 0, 0
    for source, records in load_sources(sources, option):
        for number, record in enumerate(records, 1):
            if "text" in record:
                raise UserError(f"{option}: expected chats in {source.path}, found plain text; give messages, or prompt and completion")
            messages, _, inputs = chat_of(record, Data())
            asked = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
            while asked and asked[-1]["role"] == "assistant":
                asked.pop()
            try:
                if not asked:
                    raise UserError("expected a turn before the answer, found none")
                text = template.render(asked, add_generation_prompt=True, inputs={**template.keywords, **inputs})
            except UserError as error:
                raise UserError(f"{option}: {source.path}, {record.get('place') or f'record {number}'}: {error}") from None
            answered += len(asked) < len(messages)
            ids = template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            too_long += len(ids) > longest
            found += [ids] if len(ids) <= longest else []
    if not found:
        raise UserError(f"{option}: expected prompts of at most {longest:,} tokens, found {too_long:,} that are longer and no other; "
                        "raise batch.tokens_per_pack")
    return Prompts(found, answered, too_long)
