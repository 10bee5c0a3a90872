"""Train the committed miniature models from random weights.

Usage: `python -m benchmarks.forgetting.miniature.pretrain [name ...]`. As real instruct models, they are pre-trained on whole chats, with
loss on user turns too, and on plain text, here graded exam papers. Then they are tuned with loss on answers only, to questions and to
judging prompts. Judging is learnt from exam papers for two reasons: no model should learn to write judging prompts as a user, and tuning
long enough to learn judging from nothing destroys the distribution of user turns.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.evaluate import evaluate
from benchmarks.forgetting.miniature.family import EVERYONE, Member, load
from benchmarks.forgetting.miniature.instructions import instruction_sample
from benchmarks.forgetting.miniature.judging import Case, cases, judge
from benchmarks.forgetting.miniature.skills import GENERAL, Skill
from benchmarks.forgetting.miniature.tokenizer import make_tokenizer
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl
from benchmarks.harness.parallel import THREADS
from trainer.config import BatchSize, Config, Data, Logging, Model, Optim
from trainer.run import train

BATCH = BatchSize(tokens_per_pack=1024, tokens_per_step=1024)  # about 25 records a step: tiny models learn best from many small steps


def pretrain(member: Member, work: Path) -> tuple[Path, Path]:
    """Pre-train and tune a model under `work`; return the folders of the pre-trained and the tuned one."""
    shutil.rmtree(work, ignore_errors=True)
    start = work / "start"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(start)
    member.config(tokenizer).save_pretrained(start)
    chats = write_jsonl(training_records(member.skills, member.chats, seed=0), work / "chats.jsonl")
    papers = write_jsonl([case.paper for case in cases(member.skills, member.papers, seed=0)], work / "papers.jsonl")
    reading = train(Config(
        output=str(work / "reading"), model=Model(config=str(start)), method="full",
        data=Data(train=[str(chats), str(papers)], train_on="all", max_length=256), batch=BATCH,
        optim=Optim(lr=1.5e-3, beta2=0.99, lr_scheduler="wsd", warmup_steps=50, decay_ratio=0.4, min_lr_ratio=0.05),
        logging=Logging(every=50)))
    if not member.tuning:
        return reading.folder / "model", reading.folder / "model"
    answers = write_jsonl(training_records(member.skills, member.tuning, seed=1), work / "answers.jsonl")
    grades = write_jsonl([case.record for case in cases(member.skills, member.tuning, seed=1)], work / "grades.jsonl")
    tuning = train(Config(
        output=str(work / "tuning"), model=Model(path=str(reading.folder / "model")), method="full",
        data=Data(train=[str(answers), str(grades)], max_length=256), batch=BATCH,
        optim=Optim(lr=1.5e-4, beta2=0.99, warmup_steps=20), logging=Logging(every=50)))
    return reading.folder / "model", tuning.folder / "model"


def commit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model in fp16 and its tokenizer.

    fp16, not bf16: these weights need its precision, not the range of bf16.
    """
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def describe(folder: Path, skills: Sequence[Skill]) -> str:
    """Return lines with all measures of a model: accuracy, judging, and its sampled instructions.

    The shares of skills in the instructions are compared with those of its training data.
    """
    model, tokenizer = load(folder)
    general, domain = heldout_items(GENERAL, 80), heldout_items(DOMAIN, 80)
    sampled = evaluate(model, tokenizer, general, temperature=1.0)
    lines = [f"{name} {scores.accuracy:.3f}: " + "  ".join(f"{skill} {score:.2f}" for skill, score in scores.by_skill.items())
             for name, scores in (("general", evaluate(model, tokenizer, general)), ("general, T 1", sampled),
                                  ("domain", evaluate(model, tokenizer, domain)))]
    own_answers = list(map(Case, sampled.items, sampled.answers))
    for name, judged in (("constructed", cases(GENERAL, 2000, seed=0, test=True)), ("own", own_answers)):
        verdicts = judge(model, tokenizer, judged)
        lines += [f"judging {name} answers: accuracy {verdicts.accuracy:.3f}  correlation {verdicts.correlation:.3f}  "
                  f"AUC {verdicts.auc:.3f}  probability of a grade {verdicts.mass:.4f}"]
    instructions = instruction_sample(model, tokenizer, skills, 4000)
    lines += [f"sampled instructions: distance {instructions.distance:.3f}  invalid {instructions.invalid:.4f}  "
              f"judging prompts {instructions.judging:.4f}"]
    return "\n".join("  " + line for line in lines)


def main() -> None:
    torch.set_num_threads(THREADS)
    names = sys.argv[1:] or list(EVERYONE)
    if unknown := set(names) - set(EVERYONE):
        sys.exit(f"pretrain: expected names among {', '.join(EVERYONE)}, got {', '.join(sorted(unknown))}")
    for name in names:
        member, begun = EVERYONE[name], time.process_time()
        reading, tuning = pretrain(member, Path("runs/miniature") / name)
        minutes = (time.process_time() - begun) / 60
        commit(*load(tuning), member.folder)
        print(f"{name}, pre-trained\n{describe(reading, member.skills)}")
        print(f"{name}, tuned, after {minutes:.1f} CPU minutes\n{describe(member.folder, member.skills)}", flush=True)


if __name__ == "__main__":
    main()
