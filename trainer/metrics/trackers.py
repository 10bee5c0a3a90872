"""Open the trackers of a run's figures and texts: TensorBoard, Weights & Biases, trackio and MLflow.

A tracker is two functions. All but TensorBoard are optional packages, and read the variables of the environment that they define, such as
MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any, NamedTuple

from trainer.config import Config
from trainer.errors import UserError

LONGEST_PARAMETER = 500  # characters that every server of MLflow takes


class Tracker(NamedTuple):
    """A destination beside metrics.jsonl."""

    figures: Callable[[dict, int], object]  # by name, of a step
    texts: Callable[[str, list[dict[str, str]], int], object]  # a name, rows of equal columns, a step


def open_trackers(folder: Path, config: Config, first_step: int) -> dict[str, Tracker]:
    """Return the trackers that the options name. Raises UserError for one whose package is not installed."""
    logging, found = config.logging, {}
    if logging.tensorboard:
        found["tensorboard"] = tensorboard(folder, first_step)
    if logging.wandb_project is not None:
        found["wandb"] = _wandb(_package("wandb", "logging.wandb_project"), folder, config)
    if logging.trackio_project is not None:
        found["trackio"] = _trackio(_package("trackio", "logging.trackio_project"), folder, config)
    if logging.mlflow_experiment is not None:
        found["mlflow"] = _mlflow(_package("mlflow", "logging.mlflow_experiment"), folder, config)
    return found


def _package(name: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{option}: needs the package {name}, which is not installed; pip install {name}") from None


def tensorboard(folder: Path, first_step: int) -> Tracker:
    """Return the tracker that writes tensorboard/ in the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)

    def write_figures(figures: dict, step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def write_texts(name: str, rows: list[dict[str, str]], step: int) -> None:
        for i, row in enumerate(rows, 1):
            parts = [f"**{column}**\n\n{indent(text, ' ' * 4, lambda line: True)}" for column, text in row.items()]  # Markdown: code
            writer.add_text(f"{name}/{i}", "\n\n".join(parts), step)
        writer.flush()

    return Tracker(write_figures, write_texts)


def _wandb(wandb: ModuleType, folder: Path, config: Config) -> Tracker:
    run = wandb.init(project=config.logging.wandb_project, dir=folder, config=dataclasses.asdict(config))
    return Tracker(lambda figures, step: run.log(figures, step=step),
                   lambda name, rows, step: run.log({name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])},
                                                    step=step))


def _trackio(trackio: ModuleType, folder: Path, config: Config) -> Tracker:
    import pandas

    run = trackio.init(project=config.logging.trackio_project, name=folder.absolute().name, config=dataclasses.asdict(config), embed=False)
    return Tracker(lambda figures, step: run.log(figures, step=step),
                   lambda name, rows, step: run.log({name: trackio.Table(dataframe=pandas.DataFrame(rows))}, step=step))


def _mlflow(mlflow: ModuleType, folder: Path, config: Config) -> Tracker:
    mlflow.set_experiment(config.logging.mlflow_experiment)
    mlflow.start_run(run_name=folder.absolute().name)
    mlflow.log_params({name: str(value)[:LONGEST_PARAMETER] for name, value in _flat(dataclasses.asdict(config)).items()})
    return Tracker(lambda figures, step: mlflow.log_metrics(figures, step=step),
                   lambda name, rows, step: mlflow.log_table({column: [row[column] for row in rows] for column in rows[0]}, f"{name}.json"))


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options by dotted name."""
    found = {}
    for name, value in options.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
