"""Greedy answers in batches, by transformers' `generate` with a key-value cache: prompts of like length together, padded on the left.

A model that runs packs cannot be given masks, so its attention is the stock one while it generates. Rows of a batch are computed
together, which may turn the choice between two tokens that are equally likely to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from trainer.data.chat_template import ChatTemplate
from trainer.data.turn_spans import TurnError, read_layout
from trainer.errors import UserError
from trainer.model.forward import unwrap_peft
from trainer.model.packed_attention import is_packed


class Answer(NamedTuple):
    text: str  # without special tokens
    tokens: int  # generated, the end included
    finished: bool  # it ended by itself, not at the limit


@torch.no_grad()
def answers(model: nn.Module, template: ChatTemplate, prompts: Sequence[Sequence[int]], max_tokens: int, batch: int) -> list[Answer]:
    """The likeliest answer to each prompt of token ids, in their order; repetition penalties and the like are off."""
    found: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the longest first: what does not fit fails at once
    with stock_attention(model) as base:
        ends = end_tokens(base.generation_config, template)
        for start in range(0, len(order), batch):
            numbers = order[start:start + batch]
            for i, ids in zip(numbers, _generate(base, template, [prompts[i] for i in numbers], max_tokens, ends)):
                found[i] = answer_of(template, ids, ends)
    return found


def _generate(base: PreTrainedModel, template: ChatTemplate, prompts: list[Sequence[int]], max_tokens: int,
              ends: list[int]) -> list[list[int]]:
    """What follows each prompt, ends and padding included."""
    width = max(map(len, prompts))
    pad = template.tokenizer.pad_token_id
    pad = pad if pad is not None else ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device)
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, use_cache=True, pad_token_id=pad, eos_token_id=ends or None)
    own, base.generation_config = base.generation_config, settings
    try:
        return base.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
    finally:
        base.generation_config = own


def answer_of(template: ChatTemplate, ids: list[int], ends: list[int]) -> Answer:
    """What was generated up to the first token that ends an answer."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = template.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text, len(ids) if end is None else end + 1, end is not None)


def stopped(answer: Answer, stops: Sequence[str]) -> Answer:
    """The answer up to the first of the stop texts that it holds."""
    places = [place for stop in stops if (place := answer.text.find(stop)) >= 0]
    return answer._replace(text=answer.text[:min(places)], finished=True) if places else answer


def end_tokens(settings: GenerationConfig | None, template: ChatTemplate) -> list[int]:
    """The tokens that end an answer: those of the model's generation settings, the tokenizer's, and what ends a turn of the template."""
    named = getattr(settings, "eos_token_id", None)
    ends = {*(named if isinstance(named, list) else [named]), template.tokenizer.eos_token_id}
    vocabulary = template.tokenizer.get_added_vocab()
    with suppress(TurnError, UserError):  # no template, one that prints nothing that ends a turn, or one that takes no such chat
        ends.add(vocabulary.get(read_layout(template.render, vocabulary).end))
    return sorted(ends - {None})


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers model, taking masks and a cache for the time being."""
    base = unwrap_peft(model)
    before, packed = base.config._attn_implementation, is_packed(base)
    if packed:  # only eager attention caps its logits, as Gemma 2 wants
        base.set_attn_implementation("eager" if getattr(base.config.get_text_config(), "attn_logit_softcapping", None) else "sdpa")
    try:
        yield base
    finally:
        if packed:
            base.set_attn_implementation(before)
