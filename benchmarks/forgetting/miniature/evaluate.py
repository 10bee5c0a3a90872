"""Score a model's answers to held-out items by exact match, in all and by skill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.forgetting.miniature.world import Item


@dataclass(frozen=True)
class Scores:
    """A model's answer to each item."""

    items: tuple[Item, ...]
    answers: tuple[str, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        return tuple(answer == item.answer for item, answer in zip(self.items, self.answers, strict=True))

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.items)

    @property
    def by_skill(self) -> dict[str, float]:
        marks = defaultdict(list)
        for item, right in zip(self.items, self.right, strict=True):
            marks[item.skill].append(right)
        return {skill: sum(values) / len(values) for skill, values in marks.items()}


def lost(before: Scores, after: Scores) -> list[Item]:
    """Return the items that were right before and are wrong after; swap the arguments for those gained.

    Raises ValueError if the items differ.
    """
    if before.items != after.items:
        raise ValueError("lost: expected two scores of the same items in the same order")
    return [item for item, was, still in zip(before.items, before.right, after.right, strict=True) if was and not still]


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], temperature: float = 0) -> Scores:
    """Answer items and score the answers; decoding is greedy at temperature 0, else sampled."""
    # One token more than the longest right answer with its end of turn: an answer that is longer still is wrong.
    max_new_tokens = 2 + max(len(tokenizer(item.answer, add_special_tokens=False).input_ids) for item in items)
    instructions = [item.instruction for item in items]
    if temperature:
        return Scores(tuple(items), tuple(sampled_answers(model, tokenizer, instructions, max_new_tokens, temperature)))
    return Scores(tuple(items), tuple(greedy_answers(model, tokenizer, instructions, max_new_tokens)))


def greedy_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], max_new_tokens: int,
                   batch_size: int = 256) -> list[str]:
    """Return the greedily decoded answer to each instruction, without special tokens."""
    return _answers(model, tokenizer, instructions, batch_size, do_sample=False, max_new_tokens=max_new_tokens)


def sampled_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], max_new_tokens: int,
                    temperature: float = 1.0, seed: int = 0, batch_size: int = 256) -> list[str]:
    """Return an answer to each instruction, sampled from the full distribution (no top-p, no top-k)."""
    torch.manual_seed(seed)
    return _answers(model, tokenizer, instructions, batch_size, do_sample=True, temperature=temperature, top_p=1.0, top_k=0,
                    max_new_tokens=max_new_tokens)


@torch.inference_mode()
def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], batch_size: int,
             **decoding: float) -> list[str]:
    model.eval()
    answers = []
    for start in range(0, len(instructions), batch_size):
        prompts = chat_prompts(tokenizer, instructions[start : start + batch_size]).to(model.device)
        tokens = model.generate(**prompts, use_cache=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                                **decoding)
        answers += tokenizer.batch_decode(tokens[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def chat_prompts(tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str]) -> BatchEncoding:
    """Tokenize instructions as user turns with a generation prompt, padded on the left."""
    chats = [[{"role": "user", "content": text}] for text in instructions]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt",
                                         return_dict=True)
