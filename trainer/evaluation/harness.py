"""Tasks of lm-evaluation-harness by name, run by its own library on the model that is in memory, and compared item by item.

The library (L. Gao et al., zenodo 10256836) is the `eval` extra and is imported only where tasks are asked for.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.evaluation.config import Config, Statistics
from trainer.evaluation.generation import stock_attention
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.results import paired_figures
from trainer.evaluation.significance import bootstrap, wilson

Scores = dict[tuple[str, str, str], dict[int, float]]  # (task, filter, metric) -> document -> value


def names(config: Config) -> list[str]:
    """The tasks asked for: a list, or names with commas between."""
    given = config.tasks.split(",") if isinstance(config.tasks, str) else config.tasks
    return [name.strip() for name in given if name.strip()]


def require(config: Config) -> None:
    """UserError, before anything is loaded, where the library or a task is not there."""
    if not names(config):
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks: needs the package lm-eval, which is not installed; pip install 'steadfast-sft[eval]'")
    if config.task_folder is not None and not Path(config.task_folder).is_dir():
        raise UserError(f"task_folder: expected a folder with task files (YAML), found none at {config.task_folder}")
    known = set(_manager(config.task_folder).all_tasks)
    if unknown := [name for name in names(config) if name not in known]:
        raise UserError(f"tasks: lm-evaluation-harness knows no {', '.join(unknown)}; `lm-eval ls tasks` lists its own, and task_folder "
                        "adds others")


@functools.cache  # it reads some ten thousand files
def _manager(folder: str | None):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def run(side: LoadedModel, config: Config) -> Scores:
    """The value of every metric for every document, under one model. UserError where a task cannot be run."""
    if not names(config):
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with stock_attention(side.model) as base:
        try:
            model = HFLM(pretrained=base, tokenizer=side.template.tokenizer, batch_size=config.harness.batch)
            found = lm_eval.simple_evaluate(
                model=model, tasks=names(config), task_manager=_manager(config.task_folder), num_fewshot=config.harness.num_fewshot,
                limit=config.harness.limit, apply_chat_template=config.harness.chat, log_samples=True, bootstrap_iters=0)
        except (OSError, ValueError, KeyError, ImportError) as error:  # a data set that is not to be had, a task file that is wrong
            raise UserError(f"tasks: lm-evaluation-harness could not run {', '.join(names(config))}: "
                            f"{' '.join(str(error).split())[:300]}") from error
    return _scores(found["samples"])


def _scores(samples: dict[str, list[dict[str, Any]]]) -> Scores:
    scores: Scores = {}
    for task, documents in samples.items():
        for document in documents:
            for metric in document["metrics"]:
                if isinstance(document[metric], (int, float)):  # a corpus metric (perplexity, F1) keeps tuples
                    scores.setdefault((task, document["filter"], metric), {})[document["doc_id"]] = float(document[metric])
    return scores


def summarise(found: dict[str, Scores], config: Config) -> list[dict]:
    """One record per task, filter and metric: its mean under base and model with an interval; of marks of 0 and 1 what was lost."""
    rows, settings = [], config.statistics
    for key, values in found["model"].items():
        task, filter_name, metric = key
        row = {"task": task, "filter": filter_name, "metric": metric, "role": config.harness.role, "items": len(values),
               "model": _mean(list(values.values()), settings)}
        if key in found.get("base", {}):
            before = found["base"][key]
            shared = sorted(before.keys() & values.keys())
            row["base"] = _mean([before[i] for i in shared], settings)
            row["change"] = _change([before[i] for i in shared], [values[i] for i in shared], settings)
        rows.append(row)
    return rows


def _is_mark(values: list[float]) -> bool:
    return set(values) <= {0.0, 1.0}


def _mean(values: list[float], settings: Statistics) -> dict:
    """Of marks with Wilson's interval, of anything else with the bootstrap's."""
    if _is_mark(values):
        right = int(sum(values))
        return {"accuracy": right / len(values), "accuracy_interval": list(wilson(right, len(values), settings.confidence))}
    resampled = bootstrap(values, confidence=settings.confidence, draws=settings.bootstrap, seed=settings.seed)
    return {"mean": sum(values) / len(values), "mean_interval": list(resampled)}


def _change(before: list[float], after: list[float], settings: Statistics) -> dict:
    resample = {"confidence": settings.confidence, "draws": settings.bootstrap, "seed": settings.seed}
    if _is_mark(before) and _is_mark(after):
        return paired_figures([(bool(was), bool(now)) for was, now in zip(before, after)], resample)
    moves = [now - was for was, now in zip(before, after)]
    return {"difference": sum(moves) / len(moves), "difference_interval": list(bootstrap(moves, **resample))}
