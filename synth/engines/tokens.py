"""Check prompts, find ends of sequence, and spell choices in tokens, for all local engines."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from synth.engines.interface import EngineError

MAX_CONTEXT = 32_768  # tokens, unless max_model_len is larger
DECODED_BEFORE = 8  # tokens of the prompt that are decoded with a continuation, since sentencepiece drops a text's first space


def why_unfit(ids: Sequence[int] | None, limit: int, vocabulary: int) -> str | None:
    """Return why a prompt cannot be served, None where it can; it must leave room for one token."""
    if ids is None:
        return "a prompt without token ids, which this engine needs"
    if not ids:
        return "empty prompt"
    if len(ids) >= limit:
        return f"prompt of {len(ids):,} tokens, context of {limit:,}"
    if min(ids) < 0 or max(ids) >= vocabulary:
        return f"token id {next(i for i in ids if not 0 <= i < vocabulary)} outside the vocabulary of {vocabulary:,}"
    return None


def why_unscorable(prompt: Sequence[int] | None, continuation: Sequence[int], limit: int, vocabulary: int) -> str | None:
    """Return why a continuation's likelihood cannot be computed, None where it can."""
    if prompt and not continuation:
        return "empty continuation"
    return why_unfit(prompt, limit, vocabulary) or why_unfit((*prompt, *continuation), limit, vocabulary)


def added_text(tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that `ids` add to a prompt, with special tokens."""
    before = tuple(prompt[-DECODED_BEFORE:])
    start, whole = _before(tokenizer, before), _decode(tokenizer, (*before, *ids))
    return whole[len(start):] if whole.startswith(start) else _decode(tokenizer, ids)


@functools.lru_cache(maxsize=1_000)  # prompts of one kind end alike
def _before(tokenizer, ids: tuple[int, ...]) -> str:
    return _decode(tokenizer, ids)


def _decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def eos_ids(folder, tokenizer) -> tuple[int, ...]:
    """Return the ends of sequence: the tokenizer's, and those of generation_config.json."""
    from trainer.model.generation_settings import end_ids, read_settings

    return tuple(sorted({tokenizer.eos_token_id, *end_ids(read_settings(folder))} - {None}))


class Spellings:
    """Tokens whose text is a choice, with or without whitespace around it: "4", " 4", "\\n4"."""

    def __init__(self, tokenizer, vocabulary: int, model: str):
        self.tokenizer, self.vocabulary, self.model, self._known = tokenizer, vocabulary, model, {}

    def __call__(self, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of each choice. Raises EngineError where a choice has none."""
        if choices not in self._known:
            self._known[choices] = self._find(choices)
        return self._known[choices]

    def _find(self, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        found: dict[str, list[int]] = {choice.strip(): [] for choice in choices}
        for start in range(0, min(self.vocabulary, len(self.tokenizer)), 10_000):
            ids = range(start, min(start + 10_000, self.vocabulary, len(self.tokenizer)))
            for i, text in zip(ids, self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)):
                if (text := text.strip()) in found:
                    found[text].append(i)
        if missing := [choice for choice in choices if not found[choice.strip()]]:
            raise EngineError(f"{self.model}: expected one token for each of {', '.join(choices)}, got none for {missing[0]!r}; "
                              "use judge.scoring generated with this judge")
        return tuple(tuple(found[choice.strip()]) for choice in choices)
