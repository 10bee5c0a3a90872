"""Run tasks of lm-evaluation-harness on the model in memory, and compare two models item by item.

The library (L. Gao et al., zenodo 10256836) is the `eval` extra and is imported only where `tasks` names some.
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


def task_names(config: Config) -> list[str]:
    """Return the names of the tasks; the option has them as a list, or as one text with commas."""
    tasks = config.tasks.split(",") if isinstance(config.tasks, str) else config.tasks
    return [name.strip() for name in tasks if name.strip()]


def require(config: Config) -> None:
    """Check that the library and the tasks are there, before a model is loaded; raise UserError if not."""
    if not task_names(config):
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks: needs the package lm-eval, which is not installed; pip install 'steadfast-sft[eval]'")
    if config.task_folder is not None and not Path(config.task_folder).is_dir():
        raise UserError(f"task_folder: expected a folder with task files (YAML), found none at {config.task_folder}")
    known = set(_task_manager(config.task_folder).all_tasks)
    if unknown := [name for name in task_names(config) if name not in known]:
        raise UserError(f"tasks: expected tasks of lm-evaluation-harness, got {', '.join(unknown)}; `lm-eval ls tasks` lists its own, and "
                        "task_folder adds others")


@functools.cache  # it reads the file of every task
def _task_manager(folder: str | None):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def run_tasks(loaded: LoadedModel, config: Config) -> Scores:
    """Return the value of every metric for every document under one model.

    Raises UserError if a task cannot be run.
    """
    if not task_names(config):
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with stock_attention(loaded.model) as base:
        try:
            model = HFLM(pretrained=base, tokenizer=loaded.template.tokenizer, batch_size=config.harness.batch)
            results = lm_eval.simple_evaluate(
                model=model, tasks=task_names(config), task_manager=_task_manager(config.task_folder),
                num_fewshot=config.harness.num_fewshot, limit=config.harness.limit,
                apply_chat_template=config.harness.chat, log_samples=True, bootstrap_iters=0)
        except (OSError, ValueError, KeyError, ImportError) as error:  # a data set that cannot be read, a wrong task file
            raise UserError(f"tasks: lm-evaluation-harness cannot run {', '.join(task_names(config))}: "
                            f"{' '.join(str(error).split())[:300]}") from error
    return collect_scores(results["samples"])


def collect_scores(samples: dict[str, list[dict[str, Any]]]) -> Scores:
    """Return the numbers in the library's records of documents, by task, filter and metric."""
    scores: Scores = {}
    for task, documents in samples.items():
        for document in documents:
            for metric in document["metrics"]:
                if isinstance(document[metric], (int, float)):  # a corpus metric (perplexity, F1) keeps tuples
                    scores.setdefault((task, document["filter"], metric), {})[document["doc_id"]] = float(document[metric])
    return scores


def task_figures(scores: dict[str, Scores], config: Config) -> list[dict]:
    """Return one record per task, filter and metric: its mean under base and model, and the change.

    `scores` has an entry for `model` and, in a comparison, one for `base`. Metrics of 0 and 1 have the figures of pairs, as items have.
    """
    rows, statistics = [], config.statistics
    for key, values in scores["model"].items():
        task, filter_name, metric = key
        row = {"task": task, "filter": filter_name, "metric": metric, "role": config.harness.role, "items": len(values),
               "model": _mean_figures(list(values.values()), statistics)}
        if key in scores.get("base", {}):
            before = scores["base"][key]
            shared = sorted(before.keys() & values.keys())
            row["base"] = _mean_figures([before[i] for i in shared], statistics)
            row["change"] = _change_figures([before[i] for i in shared], [values[i] for i in shared], statistics)
        rows.append(row)
    return rows


def _are_marks(values: list[float]) -> bool:
    return set(values) <= {0.0, 1.0}


def _mean_figures(values: list[float], statistics: Statistics) -> dict:
    """Return the mean, with Wilson's interval if all values are 0 or 1, else with the bootstrap's."""
    if _are_marks(values):
        right = int(sum(values))
        return {"accuracy": right / len(values), "accuracy_interval": list(wilson(right, len(values), statistics.confidence))}
    resampled = bootstrap(values, confidence=statistics.confidence, draws=statistics.bootstrap, seed=statistics.seed)
    return {"mean": sum(values) / len(values), "mean_interval": list(resampled)}


def _change_figures(before: list[float], after: list[float], statistics: Statistics) -> dict:
    bootstrap_options = {"confidence": statistics.confidence, "draws": statistics.bootstrap, "seed": statistics.seed}
    if _are_marks(before) and _are_marks(after):
        return paired_figures([(bool(x), bool(y)) for x, y in zip(before, after)], bootstrap_options)
    differences = [y - x for x, y in zip(before, after)]
    return {"difference": sum(differences) / len(differences),
            "difference_interval": list(bootstrap(differences, **bootstrap_options))}
