"""The domain: an apothecary's secret script and 40 remedies.

The script's frames are those of the general skill `reverse` with one word changed, and want another answer: learning them interferes with
`reverse`. The remedies are new facts, which conflict with no skill.
"""

from __future__ import annotations

from random import Random

from benchmarks.forgetting.miniature.skills import Skill, Slots, one_word
from benchmarks.forgetting.miniature.words import names

CONFLICTS_WITH = "reverse"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SCRIPT = str.maketrans(LETTERS, "".join(Random("script").sample(LETTERS, 26)))

_shelf_rng = Random("shelf")
REMEDIES = dict(zip(names(40, _shelf_rng), names(40, _shelf_rng), strict=True))


def a_remedy(rng: Random) -> Slots:
    return {"name": rng.choice(list(REMEDIES))}


DOMAIN = (
    Skill("script", 0.6, ("Encode the word {word}.", "What is {word} encoded?", "Write {word} in code."),
          one_word, lambda word: word.translate(SCRIPT)),
    Skill("remedies", 0.4, ("What does {name} cure?", "Which illness does {name} cure?", "Name the illness that {name} cures."),
          a_remedy, lambda name: REMEDIES.get(name), memorised=True),
)
