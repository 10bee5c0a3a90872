"""Define the training benchmarks' task: fine-tune a small model on 500 chats on a CPU.

Lengths are log-normal (a long tail, as in real sets), equal, or those of GSM8K. Every contender starts from the saved weights and adapter
and sees equal tokens, about a thousand a step.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.harness.model_shapes import SMALL, ModelShape
from benchmarks.harness.public_sets import gsm8k
from benchmarks.harness.smollm2 import smollm2
from benchmarks.harness.synthetic_models import (
    byte_pair_encoding,
    chat_tokenizer,
    log_normal_lengths,
    save_adapter,
    save_model,
    word_level,
    words,
)
from benchmarks.harness.timing import TokenSamples
from benchmarks.speed.baselines import Batching
from benchmarks.speed.contenders import Steadfast, from_config
from trainer import config as options
from trainer.errors import UserError

CHATS, TOKENS_PER_STEP, LEARNING_RATE = 500, 1024, 2e-4
PROMPT_TOKENS, ANSWER_TOKENS = 62, 54  # means
BATCHING = Batching(samples=8, tokens=TOKENS_PER_STEP)
DATA = ("tailed", "equal", "gsm8k")


@dataclass
class ChatTask:
    """A folder with model/, adapter/ and chats.jsonl, and the chats as tokens."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    samples: TokenSamples
    description: str  # of the data
    model: str = "Llama with random weights"
    method: str = "lora"  # lora, qlora or full


def make_task(folder: Path, data: str = "tailed", shape: ModelShape | None = SMALL, method: str = "lora", path: Path | None = None,
              count: int = CHATS, seed: int = 0) -> ChatTask:
    """Write the model, the initial adapter and the chats, and tokenize them without the trainer.

    `data`: one of `DATA`; `shape`: of a random model, None for the real one; `path`: the file of a public set.
    """
    if data == "gsm8k":
        chats, texts = gsm8k_chats(path, count, seed)
        core, description = byte_pair_encoding(texts), f"{count} problems of GSM8K"
    else:
        chats, core = synthetic_chats(data, count, seed), word_level()
        description = {"tailed": "random words, log-normal lengths", "equal": "random words, equal lengths"}[data]
    model = ChatTask.model
    if shape is None:
        source, model = smollm2()
        (folder / "model").symlink_to(source)
        save_adapter(folder, AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        tokenizer = chat_tokenizer(core)
        tokenizer.save_pretrained(folder / "model")
        save_model(folder, shape, seed)
    rows = (json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) for q, a in chats)
    (folder / "chats.jsonl").write_text("\n".join(rows) + "\n")
    return ChatTask(folder, tokenizer, [tokenized(tokenizer, *chat) for chat in chats], description, model, method)


def synthetic_chats(lengths: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Return prompts and answers of random words, their lengths log-normal or all equal to the mean."""
    rng, vocabulary = np.random.default_rng(seed), np.array(words())

    def texts(mean: int) -> list[str]:
        drawn = log_normal_lengths(count, mean, rng) if lengths == "tailed" else np.full(count, mean)
        return [" ".join(rng.choice(vocabulary, n)) for n in drawn]

    return list(zip(texts(PROMPT_TOKENS), texts(ANSWER_TOKENS), strict=True))


def gsm8k_chats(path: Path | None, count: int, seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Return a random choice of GSM8K's problems, and the texts of all of them."""
    pairs = gsm8k("train", path)
    if len(pairs) < count:
        raise UserError(f"--data: expected at least {count} lines in {path}, found {len(pairs)}")
    chosen = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
    return [pairs[i] for i in chosen], [text for pair in pairs for text in pair]


def tokenized(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a chat of the tokenizer's template in three pieces, of which the middle one is supervised.

    Returns input_ids int32[L] and supervised bool[L].
    """
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    pieces = prompt, f"{answer}<|im_end|>", "\n"
    ids = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    return np.array(sum(ids, []), np.int32), np.repeat([False, True, False], [len(piece) for piece in ids])


# ---------------------------------------------------------------- Steadfast on it


def run_options(task: ChatTask, precision: str, steps: int) -> options.Config:
    """Return the configuration of `python -m trainer.run` for this task."""
    folder = task.folder
    return options.Config(
        output=tempfile.mkdtemp(prefix="run-", dir=folder),
        model=options.Model(path=str(folder / "model")), method=task.method,
        lora=options.Lora() if task.method == "full" else options.Lora(path=str(folder / "adapter")),
        data=options.Data(train=str(folder / "chats.jsonl"), max_length=TOKENS_PER_STEP, cache_dir=str(folder / "cache"), num_proc=1),
        batch=options.BatchSize(tokens_per_pack=TOKENS_PER_STEP, tokens_per_step=TOKENS_PER_STEP),
        optim=options.Optim(lr=LEARNING_RATE, lr_scheduler="constant", warmup_ratio=0.0, weight_decay=0.0), epochs=steps, max_steps=steps,
        precision=precision, device="cpu", logging=options.Logging(tensorboard=False, progress=False))


def steadfast(task: ChatTask, precision: str, steps: int) -> Steadfast:
    """Return the trainer's run on this task."""
    return from_config(run_options(task, precision, steps), task.tokenizer)


def check_tokens(task: ChatTask) -> None:
    """Raise AssertionError unless the trainer's tokens and masks are those that the baselines get."""
    samples = steadfast(task, "fp32", 1).samples
    for i, (ids, supervised) in enumerate(task.samples):
        if not (np.array_equal(samples[i][0], ids) and np.array_equal(samples[i][1], supervised)):
            raise AssertionError(f"chat {i}: the trainer's tokens or mask differ from the ones the baselines get")
