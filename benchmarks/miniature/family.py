"""The models that live in the world: tiny Llamas, their shapes, and where their committed weights lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

MODELS = Path(__file__).parent / "models"
BUDGET = 8_000_000  # bytes of all committed models together
HEAD_DIM = 32
# Matrices this small gain little from a second thread, and wait for it where cores are shared: there a demo of 10 s took 218 s on two.
THREADS = 1


@dataclass(frozen=True)
class Member:
    """One model of the family: its shape, and how long it went to school."""

    name: str
    width: int
    feed_forward: int
    layers: int
    records: int  # chat records of its pre-training, each seen once

    @property
    def folder(self) -> Path:
        return MODELS / self.name

    def config(self, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
        return LlamaConfig(
            architectures=["LlamaForCausalLM"], vocab_size=len(tokenizer), hidden_size=self.width, intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers, num_attention_heads=self.width // HEAD_DIM, num_key_value_heads=self.width // HEAD_DIM,
            tie_word_embeddings=True, max_position_embeddings=tokenizer.model_max_length, initializer_range=0.06,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )


FAMILY = {member.name: member for member in (
    Member("base", width=96, feed_forward=256, layers=3, records=120_000),
)}


def load(folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model folder, in fp32 whatever its weights are stored as, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
