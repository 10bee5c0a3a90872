"""Public data: replay sets with right answers to other instructions than the base was tuned on.

`other_style` has all of the base's skills, in wordings that the base never saw; `half_the_skills` has the base's wordings, of the first
four of its eight skills. The answers of both are right, and as short as the base's: only the distribution of instructions differs.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.forgetting.miniature.skills import GENERAL, Skill

FRAMES = {
    "reverse": ("Turn {word} around.", "{word} backwards:", "Read {word} from its end."),
    "sort": ("Arrange {word} from a to z.", "Order {word} by letter.", "{word} in order:"),
    "capitals": ("Make {word} big.", "Use large letters for {word}.", "{word} in majuscules:"),
    "spell": ("Go through {word} letter by letter.", "Break {word} into letters.", "{word} with hyphens:"),
    "count": ("Measure {word}.", "Tell me the size of {word}.", "{word} has this many characters:"),
    "add": ("Sum of {number} and {other}:", "Take {number} and put {other} on top.", "Increase {number} by {other}."),
    "next": ("Add one to {number}.", "{number} is followed by:", "Give the successor of {number}."),
    "facts": ("{name} has which {attribute}?", "Tell me about the {attribute} of {name}.", "{attribute} of {name}:"),
}


def other_style() -> tuple[Skill, ...]:
    """Return every general skill, in equal shares and with other wordings."""
    return tuple(replace(skill, frames=FRAMES[skill.name], share=1 / len(GENERAL)) for skill in GENERAL)


def half_the_skills() -> tuple[Skill, ...]:
    """Return the first half of the general skills, with their wordings and relative shares."""
    return GENERAL[: len(GENERAL) // 2]
