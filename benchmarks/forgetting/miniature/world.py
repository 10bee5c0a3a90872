"""Draw training records and test items from skills.

They are seeded, have the shares of the skills, and are disjoint unless a skill's answers are memorised facts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.forgetting.miniature.skills import Skill, Slots


@dataclass(frozen=True)
class Item:
    """A question, its only right answer and its skill."""

    instruction: str
    answer: str
    skill: str

    @property
    def record(self) -> dict:
        """Return the item as a chat record."""
        turns = [{"role": "user", "content": self.instruction}, {"role": "assistant", "content": self.answer}]
        return {"messages": turns, "source": self.skill}


def is_heldout(slots: Slots) -> bool:
    """Return whether arguments are held out for tests.

    A tenth of all is, by a hash, so that the answer is the same for every skill, seed and mixture.
    """
    return zlib.crc32(" ".join(slots.values()).encode()) % 10 == 0


def draw_item(skill: Skill, rng: Random, test: bool) -> Item:
    """Draw a random item of a skill, with held-out arguments if `test`, else with all others."""
    slots = skill.draw(rng)
    while not skill.memorised and is_heldout(slots) != test:
        slots = skill.draw(rng)
    return Item(rng.choice(skill.frames).format(**slots), skill.solve(**slots), skill.name)


def training_records(skills: Sequence[Skill], count: int, seed: int) -> list[dict]:
    """Draw `count` chat records in the skills' shares; duplicates can occur."""
    rng = Random(f"train {seed}")
    chosen = rng.choices(skills, [skill.share for skill in skills], k=count)
    return [draw_item(skill, rng, test=False).record for skill in chosen]


def heldout_items(skills: Sequence[Skill], per_skill: int, seed: int = 0) -> list[Item]:
    """Draw `per_skill` different held-out items of each skill.

    All skills have equally many, so the mean over items is the mean over skills.
    """
    rng = Random(f"heldout {seed}")
    items: list[Item] = []
    for skill in skills:
        distinct: dict[Item, None] = {}  # a set that keeps its order
        while len(distinct) < per_skill:
            distinct[draw_item(skill, rng, test=True)] = None
        items += distinct
    return items


def write_jsonl(records: Sequence[dict], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
