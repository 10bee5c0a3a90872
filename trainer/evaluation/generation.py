"""Generate answers in batches, greedy or drawn, with transformers' `generate` and its key-value cache.

Prompts of similar length share a batch, padded on the left. Packed attention takes no masks, so the model has its stock attention while it
generates. The rows of a batch are computed together, which may change the choice between two tokens that are equally likely to the last
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from trainer.data.chat_template import ChatTemplate
from trainer.data.turn_spans import TurnError, read_layout
from trainer.errors import UserError
from trainer.model.forward import unwrap_peft
from trainer.model.generation_settings import end_ids
from trainer.model.grouped_queries import grouped_queries
from trainer.model.packed_attention import PACKED, decoder, is_packed, set_attention


class Completion(NamedTuple):
    """A generated answer."""

    text: str  # without special tokens
    tokens: int  # generated tokens, the end included
    finished: bool  # the model ended it before the limit


@torch.no_grad()
def generate_completions(model: nn.Module, template: ChatTemplate, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int],
                         batch_size: int) -> list[Completion]:
    """Return the greedy answer to each prompt of token ids, in their order.

    `max_tokens` has the longest answer to each. The model's own generation settings (repetition penalty and so on) are not used.
    """
    ends = end_token_ids(unwrap_peft(model).generation_config, template)
    return [decode_completion(template, ids, ends) for ids in generate(model, template, prompts, max_tokens, batch_size)]


@torch.no_grad()
def generate(model: nn.Module, template: ChatTemplate, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], batch_size: int,
             seed: int | None = None) -> list[list[int]]:
    """Return the token ids of an answer to each prompt, in their order; a token that ends it is the last.

    Answers are greedy, or drawn at temperature 1 by random numbers from `seed`.
    """
    answers: list[list[int]] = [[]] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda i: (-max_tokens[i], -len(prompts[i])))  # a lack of memory shows at once
    if seed is not None:
        torch.manual_seed(seed)
    with stock_attention(model) as base:
        ends = end_token_ids(base.generation_config, template)
        for limit, same_limit in groupby(longest_first, key=lambda i: max_tokens[i]):
            while numbers := list(islice(same_limit, batch_size)):
                drawn = _generate(base, template, [prompts[i] for i in numbers], limit, ends, temperature=0.0 if seed is None else 1.0)
                for i, ids in zip(numbers, drawn):
                    answers[i] = up_to_end(ids, ends)
    return answers


def up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return token ids up to the first that ends an answer, which is the last of them."""
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:end + 1]


@torch.no_grad()
def stream_completion(model: nn.Module, template: ChatTemplate, prompt: Sequence[int], max_tokens: int, temperature: float,
                      show: Callable[[str], None]) -> Completion:
    """Return the answer to one prompt of token ids, and call `show` with its text so far after each token.

    At temperature 0 it is the greedy one. Ctrl-C, or Stopped from `show`, ends the answer, not the program.
    """
    ids: list[int] = []
    with stock_attention(model) as base:
        ends = end_token_ids(base.generation_config, template)

        def add(new: list[int]) -> None:
            ids.extend(new)
            show(decode_completion(template, ids, ends).text.rstrip("\N{REPLACEMENT CHARACTER}"))  # half a character

        with suppress(KeyboardInterrupt, Stopped):
            _generate(base, template, [prompt], max_tokens, ends, temperature, _Stream(add))
    return decode_completion(template, ids, ends)


class Stopped(Exception):
    """Nobody reads an answer any more."""


class _Stream(BaseStreamer):
    """Passes on what `generate` gives it: the prompt, which is left out, then token after token."""

    def __init__(self, add: Callable[[list[int]], None]):
        self.add, self.begun = add, False

    def put(self, value: torch.Tensor) -> None:
        if self.begun:
            self.add(value.flatten().tolist())
        self.begun = True

    def end(self) -> None:
        self.begun = False


def _generate(base: PreTrainedModel, template: ChatTemplate, prompts: list[Sequence[int]], max_tokens: int, ends: list[int],
              temperature: float = 0.0, streamer: BaseStreamer | None = None) -> list[list[int]]:
    """Return the token ids generated after each prompt, end tokens and padding included."""
    width = max(map(len, prompts))
    pad = template.tokenizer.pad_token_id
    pad = pad if pad is not None else ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=max_tokens, use_cache=True, pad_token_id=pad, eos_token_id=ends or None, **sampling)
    before, base.generation_config = base.generation_config, settings
    try:
        return base.generate(input_ids=ids, attention_mask=mask, streamer=streamer)[:, width:].tolist()
    finally:
        base.generation_config = before


def decode_completion(template: ChatTemplate, ids: list[int], ends: list[int]) -> Completion:
    """Return the completion up to the first token that ends an answer."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = template.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Completion(text, len(ids) if end is None else end + 1, end is not None)


def cut_at_stop(completion: Completion, stops: Sequence[str]) -> Completion:
    """Return the completion up to the first stop text in it."""
    places = [place for stop in stops if (place := completion.text.find(stop)) >= 0]
    return completion._replace(text=completion.text[:min(places)], finished=True) if places else completion


def end_token_ids(settings: GenerationConfig | None, template: ChatTemplate) -> list[int]:
    """Return the tokens that end an answer.

    They are those of the model's generation settings, of the tokenizer, and of the end of a turn in the chat template. Raises UserError
    where the settings name other things than tokens.
    """
    ends = end_ids(settings) | {template.tokenizer.eos_token_id}
    vocabulary = template.tokenizer.get_added_vocab()
    with suppress(TurnError, UserError):  # no template, or one without an end of turn
        ends.add(vocabulary.get(read_layout(template.render, vocabulary).end))
    return sorted(ends - {None})


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the transformers model with stock attention, which takes masks and a cache."""
    base = unwrap_peft(model)
    packed = is_packed(base)
    if packed:  # only eager attention caps its logits, as Gemma 2 wants, and has sinks, as gpt-oss
        capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
        set_attention(base, "sdpa" if decoder(base)._supports_sdpa and not capped else "eager")
    try:
        with grouped_queries():
            yield base
    finally:
        if packed:
            set_attention(base, PACKED)
