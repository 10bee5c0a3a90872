"""Find the item files behind `suite:NAME`: known benchmarks, and the bundled mini suite.

Metrics and prompts are lm-evaluation-harness's, zero-shot, so that figures compare with published ones: prompts without a chat template,
but for IFEval and the mini suite, which ask for answers. The norm of choices is the one that is usually reported (`acc_norm` is per
character). GSM8K takes the last number of an answer (`flexible-extract`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

from trainer.config import Items
from trainer.errors import UserError
from trainer.evaluation.suites import prompts
from trainer.evaluation.suites.prompts import Row

PREFIX = "suite:"
MINI = Path(__file__).with_name("mini")
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz")


@dataclass(frozen=True)
class Suite:
    """One file of items that has a name."""

    items: Items  # where its rows are, and how they are scored
    item: Callable[[Row], Row] = prompts.as_it_is  # of a row
    other_name: str | None = None  # of its file in a folder


def _hub(name: str, path: str, subset: str | None, split: str, item: Callable[[Row], Row], other_name: str | None = None,
         metric: str = "choice", **options) -> Suite:
    chat = options.pop("chat", False)
    return Suite(Items(path, name, metric=metric, subset=subset, split=split, chat=chat, **options), item, other_name)


def _mini(part: str, metric: str, max_tokens: int, **options) -> Suite:
    return Suite(Items(str(MINI / f"{part}.jsonl"), f"mini_{part}", metric=metric, max_tokens=max_tokens, **options))


CORE = (
    _hub("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", prompts.arc),
    _hub("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", "test", prompts.arc, choice_by="characters"),
    _hub("piqa", "baber/piqa", None, "validation", prompts.piqa, choice_by="characters"),
    _hub("openbookqa", "allenai/openbookqa", "main", "test", prompts.openbookqa, "openbook_qa", choice_by="characters"),
    _hub("commonsense_qa", "tau/commonsense_qa", None, "validation", prompts.commonsense_qa),
    _hub("winogrande", "allenai/winogrande", "winogrande_xl", "validation", prompts.winogrande),
    _hub("boolq", "aps/super_glue", "boolq", "validation", prompts.boolq),
    _hub("lambada_openai", "EleutherAI/lambada_openai", "default", "test", prompts.lambada, metric="continuation"),
    _hub("gsm8k", "openai/gsm8k", "main", "test", prompts.gsm8k, "gsm8k_test", "regex", regex=r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
         answer_regex=r"#### (-?[0-9.,]+)", take="last", stop=["Question:"]),
    _hub("ifeval", "google/IFEval", None, "train", prompts.ifeval, metric="rules", chat=True, max_tokens=1280),
)
MINI_SUITE = (
    _mini("instructions", "rules", 160),
    _mini("arithmetic", "regex", 48, regex=r"(-?\d[\d,]*(?:\.\d+)?)", take="last"),
    _mini("json", "rules", 96),
    _mini("copying", "exact", 64),
    _mini("recall", "rules", 48),
    _mini("ending", "rules", 160, must_end=True),
)
SUITES = {suite.items.name: suite for suite in (*CORE, *MINI_SUITE)}
GROUPS = {"core": tuple(suite.items.name for suite in CORE), "mini": tuple(suite.items.name for suite in MINI_SUITE)}


def expand(options: Items, folder: str | None) -> list[Suite]:
    """Return the suites that `suite:NAME` names; any other path as a suite of its own.

    Options that differ from their defaults go before the suite's, files in `folder` before the hub. Raises UserError for an unknown name or
    a folder that is not there.
    """
    if not options.path.startswith(PREFIX):
        return [Suite(options)]
    name = options.path.removeprefix(PREFIX)
    if name not in GROUPS and name not in SUITES:
        raise UserError(f"{options.path}: expected a suite ({', '.join([*GROUPS, *SUITES])}), got {name or 'none'}; correct the name")
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise UserError(f"data.suite_folder: expected a folder with files of suites, such as arc_easy.jsonl, found none at {folder}")
    given = {f.name: getattr(options, f.name) for f in fields(Items) if f.name != "path" and getattr(options, f.name) != _default(f)}
    found = [SUITES[each] for each in GROUPS.get(name, (name,))]
    return [replace(suite, items=replace(suite.items, path=_path(suite, folder), **given)) for suite in found]


def _default(field):
    return field.default if field.default_factory is MISSING else field.default_factory()


def _path(suite: Suite, folder: str | None) -> str:
    """Return the suite's file in the folder if it is there, else where it is by itself."""
    names = [name for name in (suite.items.name, suite.other_name) if name] if folder else []
    paths = (Path(folder).expanduser() / f"{name}{suffix}" for name in names for suffix in (*SUFFIXES, ""))
    return next((str(path) for path in paths if path.exists()), suite.items.path)
