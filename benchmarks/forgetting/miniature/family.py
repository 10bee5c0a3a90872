"""Tiny Llamas of unequal strength: their shapes, the size of their training data and their folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.forgetting.miniature.skills import GENERAL, Skill

MODELS = Path(__file__).parent / "models"
BUDGET = 8_000_000  # bytes of all committed models together
HEAD_DIM = 32

# Shares of skills in the training data of the other models: the tutor has more of the hard ones, the peer many sums, and little to sort,
# count or remember.
TUTOR_SHARES = {"reverse": 0.13, "sort": 0.18, "capitals": 0.07, "spell": 0.07, "count": 0.09, "add": 0.20, "next": 0.12, "facts": 0.14}
PEER_SHARES = {"reverse": 0.20, "sort": 0.05, "capitals": 0.10, "spell": 0.10, "count": 0.06, "add": 0.26, "next": 0.15, "facts": 0.08}


@dataclass(frozen=True)
class Member:
    """One model of the family: its shape, and how much data it is trained on."""

    name: str
    width: int
    feed_forward: int
    layers: int
    chats: int  # in pre-training, for one epoch
    papers: int  # graded exam papers in pre-training, from which it learns to judge
    tuning: int = 30_000  # records of each kind (answers, grades) in instruction tuning; 0: pre-training only
    shares: dict[str, float] | None = None  # of the general skills in all its data; default: those of `GENERAL`

    @property
    def folder(self) -> Path:
        return MODELS / self.name

    @property
    def skills(self) -> tuple[Skill, ...]:
        """Return the general skills with the shares of this model's training data."""
        return tuple(replace(skill, share=self.shares[skill.name]) for skill in GENERAL) if self.shares else GENERAL

    def config(self, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
        return LlamaConfig(
            architectures=["LlamaForCausalLM"], vocab_size=len(tokenizer), hidden_size=self.width, intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers, num_attention_heads=self.width // HEAD_DIM, num_key_value_heads=self.width // HEAD_DIM,
            tie_word_embeddings=True, max_position_embeddings=tokenizer.model_max_length, initializer_range=0.06,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )


FAMILY = {member.name: member for member in (
    Member("base", width=96, feed_forward=256, layers=3, chats=120_000, papers=90_000),
    Member("tutor", width=128, feed_forward=344, layers=4, chats=140_000, papers=160_000, shares=TUTOR_SHARES),
    Member("peer", width=96, feed_forward=192, layers=4, chats=120_000, papers=80_000, shares=PEER_SHARES),
)}

# The bases of the study: `novice` answers less well than the tutor and the peer, so that their responses can improve on its own. `reader`
# is the novice without instruction tuning, which never learnt to grade.
NOVICE = Member("novice", width=96, feed_forward=256, layers=3, chats=60_000, papers=30_000, tuning=10_000)
STUDIED = {member.name: member for member in (NOVICE, replace(NOVICE, name="reader", tuning=0))}
EVERYONE = FAMILY | STUDIED


def load(folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a folder in fp32, whatever its stored dtype, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
