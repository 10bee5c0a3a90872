"""The general skills: each has frames of instructions, random arguments and a computed right answer.

A frame is an instruction with slots, e.g. `Reverse the word {word}.`; a skill fills the slots at random and solves them. `recognise` parses
an instruction by the frames, so the right answer to any instruction is known, also to one that a model sampled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from random import Random

from benchmarks.forgetting.miniature.words import names, word

SLOTS = {"word": "[a-z]+", "number": r"\d+", "other": r"\d+", "name": "[A-Z][a-z]+", "attribute": "[a-z]+"}
Slots = dict[str, str]


@dataclass(frozen=True)
class Skill:
    name: str
    share: float  # of the mixture it belongs to
    frames: tuple[str, ...]  # used equally often
    draw: Callable[[Random], Slots]
    solve: Callable[..., str | None]  # the slots, by name -> the right answer; None: there is none
    memorised: bool = False  # answers are facts to be memorised, so that no arguments are held out

    @cached_property
    def patterns(self) -> list[re.Pattern]:
        return [_pattern(frame) for frame in self.frames]

    def read(self, instruction: str) -> Slots | None:
        """Return the slots of an instruction that has one of this skill's frames, else None."""
        matches = (pattern.fullmatch(instruction) for pattern in self.patterns)
        return next((match.groupdict() for match in matches if match), None)


def _pattern(frame: str) -> re.Pattern:
    """Return the frame as a regular expression with one named group per slot."""
    pieces = re.split(r"\{(\w+)\}", frame)  # text, slot, text, slot, ..., text
    return re.compile("".join(f"(?P<{piece}>{SLOTS[piece]})" if odd % 2 else re.escape(piece) for odd, piece in enumerate(pieces)))


def recognise(instruction: str, skills: Iterable[Skill]) -> tuple[Skill, str] | None:
    """Return an instruction's skill and right answer, or None if it has no skill or no answer."""
    for skill in skills:
        slots = skill.read(instruction)
        if slots is not None:
            answer = skill.solve(**slots)
            return None if answer is None else (skill, answer)
    return None


def one_word(rng: Random) -> Slots:
    return {"word": word(rng)}


def two_numbers(rng: Random) -> Slots:
    return {"number": str(rng.randrange(100)), "other": str(rng.randrange(10))}


def one_number(rng: Random) -> Slots:
    return {"number": str(rng.randrange(1000))}


ATTRIBUTES = ("capital", "river")
_atlas_rng = Random("atlas")
LANDS = names(40, _atlas_rng)
ATLAS = {(attribute, land): name for attribute in ATTRIBUTES for land, name in zip(LANDS, names(40, _atlas_rng), strict=True)}


def a_place(rng: Random) -> Slots:
    return {"attribute": rng.choice(ATTRIBUTES), "name": rng.choice(LANDS)}


GENERAL = (
    Skill("reverse", 0.15, ("Reverse the word {word}.", "What is {word} reversed?", "Write {word} in reverse."),
          one_word, lambda word: word[::-1]),
    Skill("sort", 0.12, ("Sort the letters of {word}.", "Put {word} in alphabetical order.", "What is {word} sorted?"),
          one_word, lambda word: "".join(sorted(word))),
    Skill("capitals", 0.10, ("Write {word} in capitals.", "Capitalise the word {word}.", "What is {word} in upper case?"),
          one_word, lambda word: word.upper()),
    Skill("spell", 0.10, ("Spell the word {word}.", "Spell out {word}.", "How do you spell {word}?"),
          one_word, lambda word: "-".join(word)),
    Skill("count", 0.10, ("How many letters are in {word}?", "Count the letters of {word}.", "How long is the word {word}?"),
          one_word, lambda word: str(len(word))),
    Skill("add", 0.15, ("What is {number} plus {other}?", "Add {number} and {other}.", "{number} + {other} = ?"),
          two_numbers, lambda number, other: str(int(number) + int(other))),
    Skill("next", 0.10, ("Which number comes after {number}?", "What follows {number}?", "Count on from {number}."),
          one_number, lambda number: str(int(number) + 1)),
    Skill("facts", 0.18, ("What is the {attribute} of {name}?", "Name the {attribute} of {name}.", "Which {attribute} does {name} have?"),
          a_place, lambda attribute, name: ATLAS.get((attribute, name)), memorised=True),
)
