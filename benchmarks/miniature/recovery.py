"""What a model asks when it is given nothing but the opening of a user's turn, and how far that is from the world it learnt from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.miniature.judging import is_judging
from benchmarks.miniature.skills import Skill, recognise
from benchmarks.miniature.tokenizer import BOS, USER

LONGEST = 128  # tokens of a user's turn: a question has some 30, a judging prompt 60


@torch.inference_mode()
def sample_instructions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int, temperature: float = 1.0,
                        top_p: float = 0.98, batch_size: int = 500) -> list[str]:
    """User turns that the model writes itself: one opened, nothing in it, sampled to its end."""
    model.eval()
    torch.manual_seed(seed)
    opening = torch.tensor([tokenizer.convert_tokens_to_ids([BOS, USER])], device=model.device)
    found = []
    for start in range(0, count, batch_size):
        prompts = opening.expand(min(batch_size, count - start), -1)
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=temperature, top_p=top_p,
                                top_k=0, max_new_tokens=LONGEST, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
        found += tokenizer.batch_decode(tokens[:, opening.shape[1] :], skip_special_tokens=True)
    return found


@dataclass(frozen=True)
class Recovery:
    """Sampled instructions against the world's skills and their shares."""

    instructions: tuple[str, ...]
    skills: tuple[Skill, ...]

    @property
    def counts(self) -> Counter:
        """How many instructions each skill recognises."""
        known = (recognise(text, self.skills) for text in self.instructions)
        return Counter(found[0].name for found in known if found)

    @property
    def shares(self) -> dict[str, float]:
        """Of the recognised ones, by skill."""
        counts = self.counts
        return {skill.name: counts[skill.name] / max(1, counts.total()) for skill in self.skills}

    @property
    def distance(self) -> float:
        """Total variation between those shares and the true ones."""
        return sum(abs(self.shares[skill.name] - skill.share) for skill in self.skills) / 2

    @property
    def judging(self) -> float:
        return sum(map(is_judging, self.instructions)) / len(self.instructions)

    @property
    def invalid(self) -> float:
        """Share of instructions that no skill recognises, judging prompts among them."""
        return 1 - self.counts.total() / len(self.instructions)


def recovery(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skills: Sequence[Skill], count: int = 1000,
             seed: int = 0) -> Recovery:
    return Recovery(tuple(sample_instructions(model, tokenizer, count, seed)), tuple(skills))
