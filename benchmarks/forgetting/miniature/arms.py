"""Define the arms of the study: where the replay rows of each come from, and how it is trained.

All arms of a seed learn the same domain rows, in equally many steps of equally many tokens. With replay, five rows of six are replay rows
(the paper's 83%). The synthetic sets are selected from one pool of responses and scores, so they differ only in the selection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.forgetting import job
from benchmarks.forgetting.miniature import public
from benchmarks.forgetting.miniature.skills import GENERAL, Skill
from synth.config import Select

RATIO = 5 / 6  # of replay
SAMPLES = 3  # responses of each model to each instruction
KL = {"kl_weight": 1.0, "kl_direction": "reverse", "kl_positions": "all", "kl_reference": "cached"}
DOMAIN_KL = {"kl_sources": "domain", "kl_direction": "forward", "kl_positions": "supervised"}


@dataclass(frozen=True)
class Selection:
    """How responses are selected from a pool: the options of `synth.run --stages '[select]'`."""

    select: Select
    as_in_paper: bool = False  # judges are not calibrated, and score their own responses too


def candidates_of(base: str, *names: str) -> list[str]:
    """Return candidates for `select.candidates` in the form `base:name`."""
    return [f"{base}:{name}" for name in names]


def selections(base: str) -> dict[str, Selection]:
    """Return how each synthetic set is selected, by its name.

    `base` is the name of the base in the pool.
    """
    sampled = candidates_of(base, *map(str, range(SAMPLES)))
    return {
        "self 1x1": Selection(Select(rule="first", candidates=sampled[:1])),
        "self 1x3": Selection(Select(rule="best", statistic="mode", candidates=sampled), as_in_paper=True),
        "paper": Selection(Select(rule="best", statistic="mode", candidates=[*sampled, "tutor", "peer"]), as_in_paper=True),
        "plus": Selection(Select()),
        "greedy": Selection(Select(rule="first", candidates=candidates_of(base, "greedy"))),
    }


# Sets drawn from skills, not written by a model. The last one is the data that the base was tuned on: in practice nobody has it.
WORLD_SETS: dict[str, Callable[[], tuple[Skill, ...]]] = {
    "other style": public.other_style, "half the skills": public.half_the_skills, "real": lambda: GENERAL}


@dataclass(frozen=True)
class Arm(job.Arm):
    """One way to fine-tune, with its share of replay; `replay` is a set of `selections` or `WORLD_SETS`."""

    ratio: float = RATIO  # share of the rows that is replay
    unique_rows: int | None = None  # number of different replay rows, which are repeated; default: the whole set
    alphas: tuple[float, ...] = ()  # WiSE-FT: also evaluate at these interpolations (0: the base, 1: the trained model)

    def alpha_name(self, alpha: float) -> str:
        """Return the name of an interpolation's row in the table."""
        return f"{self.name}, WiSE-FT {alpha:g}"


ARMS = (
    Arm("domain only", alphas=(0.5,)),
    Arm("domain only, LR/10", lr_factor=0.1),
    Arm("EAFT", retention={"token_weighting": "eaft"}),
    Arm("ASFT", kl=True, retention=DOMAIN_KL | {"kl_weight": 0.05, "token_weighting": "dft"}),
    Arm("target-masked KL", kl=True, retention=DOMAIN_KL | {"kl_mask_target": True}),
    Arm("public, other style", "other style"),
    Arm("public, half the skills", "half the skills"),
    Arm("self 1x1", "self 1x1"),
    Arm("self 1x3, filtered", "self 1x3"),
    Arm("3 models x 3, filtered (the paper)", "paper"),
    Arm("plus", "plus", alphas=(0.75,)),
    Arm("self, greedy", "greedy"),
    Arm("self, greedy + KL", "greedy", kl=True),
    Arm("plus + KL", "plus", kl=True),
    Arm("real data (oracle)", "real"),
)
FULL = tuple(Arm(f"full: {name}", replay, full=True) for name, replay in (
    ("domain only", None), ("the paper", "paper"), ("plus", "plus")))
QUICK = tuple(arm for arm in ARMS if arm.name in ("domain only", "self 1x1", "3 models x 3, filtered (the paper)", "plus"))
SHARES = tuple(Arm(f"plus, {share:.0%} replay", "plus", ratio=share) for share in (0.2, 0.5))
UNIQUE = tuple(Arm(f"plus, {unique} rows", "plus", unique_rows=unique) for unique in (100, 300, 1000))
