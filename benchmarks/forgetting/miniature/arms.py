"""What the study compares: where the replay rows of each arm come from, and how it is trained.

All arms of one seed learn the same domain rows, in as many steps of as many tokens; with replay, five rows of six are replay rows (the
paper's 83%). Synthetic sets are chosen from one pool of answers and scores: what differs between them is the choice alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.forgetting.miniature import public
from benchmarks.forgetting.miniature.skills import GENERAL, Skill
from synth.config import Select

RATIO = 5 / 6
SAMPLES = 3  # of each model to each instruction
KL = {"kl_weight": 1.0, "kl_direction": "reverse", "kl_positions": "all", "kl_reference": "cached"}


@dataclass(frozen=True)
class Selection:
    """How answers are chosen from a pool: the options of `synth.run --stages '[select]'`."""

    select: Select
    paper: bool = False  # all judges' scores as they are, of their own answers too


def own(base: str, *names: str) -> list[str]:
    """The candidates `base:name` of `select.candidates`."""
    return [f"{base}:{name}" for name in names]


def selections(base: str) -> dict[str, Selection]:
    """The synthetic sets, by name; `base` is what the pool calls the base."""
    sampled = own(base, *map(str, range(SAMPLES)))
    return {
        "self 1x1": Selection(Select(rule="first", candidates=sampled[:1])),
        "self 1x3": Selection(Select(rule="best", statistic="mode", candidates=sampled), paper=True),
        "paper": Selection(Select(rule="best", statistic="mode", candidates=[*sampled, "tutor", "peer"]), paper=True),
        "plus": Selection(Select()),
        "greedy": Selection(Select(rule="first", candidates=own(base, "greedy"))),
    }


# Sets that no model made. The last one is what nobody has: the data that the base was tuned on.
DRAWN: dict[str, Callable[[], tuple[Skill, ...]]] = {
    "other style": public.other_style, "half the skills": public.half_the_skills, "real": lambda: GENERAL}


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune: a row of the table."""

    name: str
    replay: str | None = None  # a set of `selections` or `DRAWN`
    full: bool = False  # every weight is trained, not an adapter
    rate: float = 1.0  # times the learning rate of all others
    kl: bool = False  # held to the base by its divergence
    ratio: float = RATIO  # share of the rows that is replay
    unique: int | None = None  # so many replay rows, again and again; default: all there are
    points: tuple[float, ...] = ()  # WiSE-FT: also evaluated this far from the base, without further training

    def point(self, alpha: float) -> str:
        return f"{self.name}, WiSE-FT {alpha:g}"


ARMS = (
    Arm("domain only", points=(0.5,)),
    Arm("domain only, LR/10", rate=0.1),
    Arm("public, other style", "other style"),
    Arm("public, half the skills", "half the skills"),
    Arm("self 1x1", "self 1x1"),
    Arm("self 1x3, filtered", "self 1x3"),
    Arm("3 models x 3, filtered (the paper)", "paper"),
    Arm("plus", "plus", points=(0.75,)),
    Arm("self, greedy", "greedy"),
    Arm("self, greedy + KL", "greedy", kl=True),
    Arm("plus + KL", "plus", kl=True),
    Arm("real data (oracle)", "real"),
)
FULL = tuple(Arm(f"full: {name}", replay, full=True) for name, replay in (
    ("domain only", None), ("the paper", "paper"), ("plus", "plus")))
QUICK = tuple(arm for arm in ARMS if arm.name in ("domain only", "self 1x1", "3 models x 3, filtered (the paper)", "plus"))
SHARES = tuple(Arm(f"plus, {share:.0%} replay", "plus", ratio=share) for share in (0.2, 0.5))
UNIQUE = tuple(Arm(f"plus, {unique} rows", "plus", unique=unique) for unique in (100, 300, 1000))
