"""Training records and test items, drawn from skills: seeded, in known shares, and disjoint where a skill can generalise."""

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
    """One question of a test, its only right answer, and the skill it tests."""

    instruction: str
    answer: str
    skill: str

    @property
    def record(self) -> dict:
        """The item as a chat record."""
        turns = [{"role": "user", "content": self.instruction}, {"role": "assistant", "content": self.answer}]
        return {"messages": turns, "source": self.skill}


def heldout(slots: Slots) -> bool:
    """Whether these arguments belong to tests: a tenth of all, by a hash, so for every skill, seed and mixture alike."""
    return zlib.crc32(" ".join(slots.values()).encode()) % 10 == 0


def draw(skill: Skill, rng: Random, test: bool) -> Item:
    """A random item of the skill, from the test's arguments or from all the others."""
    slots = skill.draw(rng)
    while not skill.memorised and heldout(slots) != test:
        slots = skill.draw(rng)
    return Item(rng.choice(skill.frames).format(**slots), skill.solve(**slots), skill.name)


def training_records(skills: Sequence[Skill], count: int, seed: int) -> list[dict]:
    """`count` chat records in the skills' shares; repeats occur, as they do in life."""
    rng = Random(f"train {seed}")
    chosen = rng.choices(skills, [skill.share for skill in skills], k=count)
    return [draw(skill, rng, test=False).record for skill in chosen]


def heldout_items(skills: Sequence[Skill], per_skill: int, seed: int = 0) -> list[Item]:
    """`per_skill` different items of each skill: equally many, so that the mean over items is the mean over skills."""
    rng = Random(f"heldout {seed}")
    items: list[Item] = []
    for skill in skills:
        own: dict[Item, None] = {}
        while len(own) < per_skill:
            own[draw(skill, rng, test=True)] = None
        items += own
    return items


def write_jsonl(records: Sequence[dict], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
