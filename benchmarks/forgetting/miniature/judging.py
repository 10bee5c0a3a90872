"""Make judging data: prompts with a question and a response, and its true grade from 1 to 5.

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
from benchmarks.forgetting.miniature.world import Item, draw_item

RUBRIC = Path(__file__).with_name("rubric.txt")
GRADES = (1, 2, 3, 4, 5)


def grade(answer: str, response: str) -> int:
    """Return 1 + four times the share of characters in place, rounded down.

    Only the right answer has grade 5.
    """
    in_place = sum(map(str.__eq__, answer, response))
    return 1 + 4 * in_place // max(len(answer), len(response))


@cache
def rubric() -> str:
    return RUBRIC.read_text(encoding="utf-8")


def is_judging(text: str) -> bool:
    """Return whether a user's turn begins as the rubric does."""
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
        """Return the case as a chat record: the prompt, and the grade as its answer."""
        return Item(self.prompt, str(self.grade), "judging").record

    @property
    def paper(self) -> dict:
        """Return the case as a plain text record, an exam paper: prompt, grade and right answer.

        It has no header of a turn, so that no model learns to write judging prompts as a user. Its last line is the right answer,
        because four papers of five have a wrong response, from which wrong answers would be learnt.
        """
        return {"text": f"{BOS}{self.prompt}\n{self.grade}\n{self.item.answer}", "source": "papers"}


# ---------------------------------------------------------------- responses to an item of given skills


def right_answer(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    return item.answer


def several_typos(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """Return the right answer with one to three typing mistakes."""
    response = item.answer
    for _ in range(rng.randint(1, 3)):
        response = typo(response, rng) or response
    return response


def typo(text: str, rng: Random) -> str:
    """Return the text with one typing mistake at a random place.

    A character is replaced by another of its kind, swapped with the next, doubled or omitted, or the text is cut there.
    """
    place = rng.randrange(len(text))
    before, at, after = text[:place], text[place], text[place + 1 :]
    kind = next((kind for kind in (string.digits, string.ascii_lowercase, string.ascii_uppercase) if at in kind), at)
    return before + rng.choice((rng.choice(kind) + after, after[:1] + at + after[1:], at + at + after, after, ""))


def near_miss(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """Return a nearly right answer: a number off by 1, 2, 10 or 100, or a word with one mistake."""
    if item.answer.isdecimal():
        return str(abs(int(item.answer) + rng.choice((-1, 1)) * rng.choice((1, 1, 2, 10, 100))))
    return typo(item.answer, rng)


def answer_to_another_question(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """Return the right answer to another question of the item's skill."""
    return draw_item(skill_of(item, skills), rng, test=False).answer


def answer_of_another_skill(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """Return the answer of another skill to the same argument, e.g. sort a word instead of reversing it."""
    right_skill = skill_of(item, skills)
    other = rng.choice([skill for skill in skills if skill.draw is right_skill.draw])
    return other.solve(**right_skill.read(item.instruction))


def unrelated_answer(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """Return the right answer to a random question of any skill."""
    return draw_item(rng.choice(skills), rng, test=False).answer


def random_characters(item: Item, skills: Sequence[Skill], rng: Random) -> str:
    """Return random characters of about an answer's length, or none."""
    return "".join(rng.choices(string.ascii_letters + string.digits + " -", k=rng.randrange(9)))


def skill_of(item: Item, skills: Sequence[Skill]) -> Skill:
    return next(skill for skill in skills if skill.name == item.skill)


# Mostly wrong by little, as models are; some are right by chance.
WRONG_RESPONSES = (near_miss, near_miss, near_miss, several_typos, several_typos, answer_to_another_question, answer_of_another_skill,
                   unrelated_answer, random_characters)


# ---------------------------------------------------------------- cases


def draw_case(skills: Sequence[Skill], wanted: int, rng: Random, test: bool) -> Case:
    """Draw a random question and a random response of the wanted grade."""
    respond = (right_answer,) if wanted == max(GRADES) else WRONG_RESPONSES
    shares = [skill.share for skill in skills]
    while True:
        item = draw_item(*rng.choices(skills, shares), rng, test)
        case = Case(item, rng.choice(respond)(item, skills, rng))
        if case.grade == wanted:
            return case


def cases(skills: Sequence[Skill], count: int, seed: int, test: bool = False) -> list[Case]:
    """Draw `count` cases with grades of equal probability, with held-out arguments if `test`."""
    rng = Random(f"judging {seed} {test}")
    return [draw_case(skills, rng.choice(GRADES), rng, test) for _ in range(count)]


# ---------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdicts:
    """A judge's probability of each grade, as the first token of its reply, for each case."""

    cases: tuple[Case, ...]
    probabilities: torch.Tensor  # (cases, 5), not renormalised

    @property
    def mass(self) -> float:
        """Return the mean probability that the reply begins with a grade."""
        return self.probabilities.sum(1).mean().item()

    @property
    def truth(self) -> torch.Tensor:
        return torch.tensor([float(case.grade) for case in self.cases])

    @property
    def expected(self) -> torch.Tensor:
        """Return the expected grade of each case under the judge's probabilities."""
        return self.probabilities @ torch.tensor(GRADES, dtype=torch.float32) / self.probabilities.sum(1)

    @property
    def accuracy(self) -> float:
        return (1 + self.probabilities.argmax(1) == self.truth).float().mean().item()

    @property
    def correlation(self) -> float:
        return torch.corrcoef(torch.stack([self.expected, self.truth]))[0, 1].item()

    @property
    def auc(self) -> float:
        """Return how often a right response has a higher expected grade than a wrong one; a tie counts half."""
        right = self.truth == max(GRADES)
        margins = self.expected[right, None] - self.expected[None, ~right]
        return ((margins.sign() + 1) / 2).mean().item()


@torch.inference_mode()
def judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], batch_size: int = 256) -> Verdicts:
    model.eval()
    grades = tokenizer.convert_tokens_to_ids([str(grade) for grade in GRADES])
    probabilities = []
    for start in range(0, len(cases), batch_size):
        prompts = chat_prompts(tokenizer, [case.prompt for case in cases[start : start + batch_size]]).to(model.device)
        logits = model(**prompts, logits_to_keep=1).logits[:, -1]
        probabilities.append(logits.float().softmax(-1)[:, grades].cpu())
    return Verdicts(tuple(cases), torch.cat(probabilities))
