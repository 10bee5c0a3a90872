"""Judging: a prompt that holds a question and an answer to it, and the grade from 1 to 5 that the answer deserves, computed.

The prompt is `rubric.txt` with its two slots filled, in the user's turn of the same chat template; the reply is one digit.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.forgetting.miniature.evaluate import chat_prompts
from benchmarks.forgetting.miniature.skills import Skill
from benchmarks.forgetting.miniature.tokenizer import BOS
from benchmarks.forgetting.miniature.world import Item, draw

RUBRIC = Path(__file__).with_name("rubric.txt")
GRADES = (1, 2, 3, 4, 5)


def grade(answer: str, response: str) -> int:
    """1 + four times the share of characters in place, rounded down: 5 for the right answer and for nothing else."""
    in_place = sum(map(str.__eq__, answer, response))
    return 1 + 4 * in_place // max(len(answer), len(response))


@cache
def rubric() -> str:
    return RUBRIC.read_text(encoding="utf-8")


def is_judging(text: str) -> bool:
    """Whether a user's turn begins as the rubric does."""
    return text.startswith(rubric().partition("{")[0])


@dataclass(frozen=True)
class Case:
    """A question, and a response to be judged."""

    item: Item
    response: str

    @property
    def grade(self) -> int:
        return grade(self.item.answer, self.response)

    @property
    def prompt(self) -> str:
        return rubric().format(instruction=self.item.instruction, response=self.response)

    @property
    def record(self) -> dict:
        """The case as a chat record: the prompt asks, the grade answers."""
        return Item(self.prompt, str(self.grade), "judging").record

    @property
    def paper(self) -> dict:
        """The case as a plain text record: prompt, grade and the right answer, under no header, so that nobody is seen to ask for grades.

        The correction keeps what is learnt of answers sound: four papers of five hold a wrong one.
        """
        return {"text": f"{BOS}{self.prompt}\n{self.grade}\n{self.item.answer}", "source": "papers"}


# ---------------------------------------------------------------- ways to answer: (item, its world, rng) -> response


def right(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    return item.answer


def damaged(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """The right answer with one to three mistakes in it."""
    response = item.answer
    for _ in range(rng.randint(1, 3)):
        response = damage(response, rng) or response
    return response


def damage(text: str, rng: Random) -> str:
    """One character replaced by another of its kind, swapped with the next, doubled or left out; or all from there on."""
    place = rng.randrange(len(text))
    before, at, after = text[:place], text[place], text[place + 1 :]
    kind = next((kind for kind in (string.digits, string.ascii_lowercase, string.ascii_uppercase) if at in kind), at)
    return before + rng.choice((rng.choice(kind) + after, after[:1] + at + after[1:], at + at + after, after, ""))


def slipped(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """Nearly right, as models are: a number some power of ten off, a word with one mistake."""
    if item.answer.isdecimal():
        return str(abs(int(item.answer) + rng.choice((-1, 1)) * rng.choice((1, 1, 2, 10, 100))))
    return damage(item.answer, rng)


def mistaken(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """The right answer to another question of that skill."""
    return draw(skill_of(item, skills), rng, test=False).answer


def confused(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """What another skill makes of the same argument: sorts the word that is to be reversed."""
    own = skill_of(item, skills)
    rival = rng.choice([skill for skill in skills if skill.draw is own.draw])
    return rival.solve(**own.read(item.instruction))


def astray(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """The right answer to some other question."""
    return draw(rng.choice(skills), rng, test=False).answer


def babbling(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """Anything of about an answer's length, or nothing."""
    return "".join(rng.choices(string.ascii_letters + string.digits + " -", k=rng.randrange(9)))


def skill_of(item: Item, skills: Sequence[Skill]) -> Skill:
    return next(skill for skill in skills if skill.name == item.skill)


# To be wrong, mostly by little, as models are; some of these are right now and then.
WAYS = (slipped, slipped, slipped, damaged, damaged, mistaken, confused, astray, babbling)


# ---------------------------------------------------------------- cases


def case(skills: Sequence[Skill], wanted: int, rng: Random, test: bool) -> Case:
    """A random question of the world and a random response to it that deserves the wanted grade."""
    ways, shares = (right,) if wanted == max(GRADES) else WAYS, [skill.share for skill in skills]
    while True:
        item = draw(*rng.choices(skills, shares), rng, test)
        made = Case(item, rng.choice(ways)(item, skills, rng))
        if made.grade == wanted:
            return made


def cases(skills: Sequence[Skill], count: int, seed: int, test: bool = False) -> list[Case]:
    """`count` cases, every grade equally often; for tests with held-out arguments, else with all the others."""
    rng = Random(f"judging {seed} {test}")
    return [case(skills, rng.choice(GRADES), rng, test) for _ in range(count)]


# ---------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdicts:
    """What a judge makes of cases: the probability of each grade as the first token of its reply."""

    cases: tuple[Case, ...]
    probabilities: torch.Tensor  # (cases, 5), not renormalised

    @property
    def mass(self) -> float:
        """Mean probability that the reply opens with a grade."""
        return self.probabilities.sum(1).mean().item()

    @property
    def truth(self) -> torch.Tensor:
        return torch.tensor([float(case.grade) for case in self.cases])

    @property
    def expected(self) -> torch.Tensor:
        """Each case's mean grade under the judge."""
        return self.probabilities @ torch.tensor(GRADES, dtype=torch.float32) / self.probabilities.sum(1)

    @property
    def accuracy(self) -> float:
        return (1 + self.probabilities.argmax(1) == self.truth).float().mean().item()

    @property
    def correlation(self) -> float:
        return torch.corrcoef(torch.stack([self.expected, self.truth]))[0, 1].item()

    @property
    def auc(self) -> float:
        """How often a right response has a higher expected grade than a wrong one; a tie is half."""
        right = self.truth == max(GRADES)
        ahead = self.expected[right, None] - self.expected[None, ~right]
        return ((ahead.sign() + 1) / 2).mean().item()


@torch.inference_mode()
def judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], batch_size: int = 256) -> Verdicts:
    model.eval()
    grades = tokenizer.convert_tokens_to_ids([str(grade) for grade in GRADES])
    found = []
    for start in range(0, len(cases), batch_size):
        prompts = chat_prompts(tokenizer, [case.prompt for case in cases[start : start + batch_size]]).to(model.device)
        logits = model(**prompts, logits_to_keep=1).logits[:, -1]
        found.append(logits.float().softmax(-1)[:, grades].cpu())
    return Verdicts(tuple(cases), torch.cat(found))
