"""`python -m benchmarks.miniature.pretrain [name ...]`: make the committed models, from random weights, with the trainer.

Like real instruct models they read whole chats first, and learn to ask as well as to answer; then they are tuned on answers only.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.miniature.domain import DOMAIN
from benchmarks.miniature.evaluate import evaluate
from benchmarks.miniature.family import FAMILY, THREADS, Member, load
from benchmarks.miniature.skills import GENERAL
from benchmarks.miniature.tokenizer import make_tokenizer
from benchmarks.miniature.world import heldout_items, training_records, write_jsonl
from trainer.config import Batch, Config, Data, Logging, Model, Optim
from trainer.run import train

TUNING_RECORDS = 24_000
BATCH = Batch(tokens_per_pack=1024, tokens_per_step=1024)  # some 30 chats a step: tiny models learn from many small steps


def pretrain(member: Member, work: Path) -> Path:
    """Both stages, under `work`; returns the folder of the finished model."""
    shutil.rmtree(work, ignore_errors=True)
    start = work / "start"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(start)
    member.config(tokenizer).save_pretrained(start)
    chats = write_jsonl(training_records(GENERAL, member.records, seed=0), work / "pretraining.jsonl")
    answers = write_jsonl(training_records(GENERAL, TUNING_RECORDS, seed=1), work / "tuning.jsonl")

    reading = train(Config(
        output=str(work / "reading"), model=Model(config=str(start)), adapter="full",
        data=Data(train=str(chats), train_on="all", max_length=256), batch=BATCH,
        optim=Optim(lr=1.5e-3, beta2=0.99, schedule="wsd", warmup=50, decay=0.4, min_lr_ratio=0.05), logging=Logging(every=50)))
    tuning = train(Config(
        output=str(work / "tuning"), model=Model(path=str(reading.folder / "model")), adapter="full",
        data=Data(train=str(answers), max_length=256), batch=BATCH,
        optim=Optim(lr=3e-4, beta2=0.99, warmup=20), logging=Logging(every=50)))
    return tuning.folder / "model"


def commit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save in half precision: half the bytes, and fp16 rather than bf16 because weights this small need its digits, not its range."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    torch.set_num_threads(THREADS)
    names = sys.argv[1:] or list(FAMILY)
    if unknown := set(names) - set(FAMILY):
        sys.exit(f"pretrain: expected names among {', '.join(FAMILY)}, got {', '.join(sorted(unknown))}")
    for name in names:
        member = FAMILY[name]
        commit(*load(pretrain(member, Path("runs/miniature") / name)), member.folder)
        model, tokenizer = load(member.folder)
        for world, skills in (("general", GENERAL), ("domain", DOMAIN)):
            scores = evaluate(model, tokenizer, heldout_items(skills, 80))
            print(f"{name}, {world}: {scores.accuracy:.3f}  " + "  ".join(f"{k} {v:.2f}" for k, v in scores.by_skill.items()))


if __name__ == "__main__":
    main()
