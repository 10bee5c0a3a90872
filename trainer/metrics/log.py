"""Write a run's figures to metrics.jsonl, the console, TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from tqdm import tqdm

from trainer.config import Config
from trainer.errors import UserError
from trainer.files import atomic_file
from trainer.metrics.records import read_records


class Log:
    """Writer of records, flat dicts with `kind` and `step`, to every destination; only rank 0 has one."""

    def __init__(self, folder: Path, config: Config, total_steps: int, first_step: int, open_folder: Callable[[], None]):
        """Open the run's log.

        `open_folder` writes the run folder's other files, should somebody remove it during the run.
        """
        self.path, self.config, self.open_folder = folder / "metrics.jsonl", config, open_folder
        keep_records(self.path, first_step)
        self.file = self.path.open("a+", buffering=1)
        self.sinks = {"tensorboard": _tensorboard(folder, config, first_step), "wandb": _wandb(folder, config)}
        visible = config.logging.progress and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not visible, dynamic_ncols=True)

    def write(self, record: dict) -> None:
        """Write one record everywhere."""
        if not self.path.exists():
            self._restore()
        self.file.write(json.dumps(record | {"time": round(time.time(), 3)}) + "\n")
        figures = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for sink in filter(None, self.sinks.values()):
            sink.figures(figures, record.get("step", 0))
        self._show(record)

    def write_texts(self, name: str, rows: list[dict[str, str]], step: int) -> None:
        """Write texts to TensorBoard and Weights & Biases, in rows of equal columns."""
        for sink in filter(None, self.sinks.values()):
            sink.texts(name, rows, step)

    def _restore(self) -> None:
        """Write the run folder anew, which somebody has removed; the open file still has the records."""
        print(f"output: {self.path.parent} was removed or moved during the run: settings and records are written again; the checkpoints "
              "in it, and TensorBoard's figures so far, are gone", flush=True)
        self.open_folder()
        self.file.seek(0)
        records = self.file.read()
        self.file.close()
        self.file = self.path.open("a+", buffering=1)
        self.file.write(records)
        self.sinks["tensorboard"] = _tensorboard(self.path.parent, self.config, 0)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self.bar.update()

    def close(self) -> None:
        """Close the file and the progress bar."""
        self.bar.close()
        self.file.close()

    def _show(self, record: dict) -> None:
        """Print a record's line, or put it beside the progress bar."""
        line = _LINES[record["kind"]](record)
        if self.bar.disable:
            print(line, flush=True)
        elif record["kind"] == "step":
            self.bar.set_postfix_str(line.split("  ", 1)[1])
        else:
            self.bar.write(line)


def keep_records(path: Path, first_step: int) -> None:
    """Drop the records that an interrupted run wrote after the checkpoint it resumes from."""
    if not path.exists():
        return
    if first_step == 0:
        path.unlink()
        return
    lost = 0
    with atomic_file(path) as tmp, tmp.open("w") as file:
        for record in read_records(path):
            lost += record is None
            if record and record["step"] <= first_step and record["kind"] != "end":
                file.write(json.dumps(record) + "\n")
    if lost:
        print(f"resume: left out {lost:,} lines of {path} that hold no record: cut short by a kill, or damaged", flush=True)


def _step_line(r: dict) -> str:
    mfu = f"  mfu {r['mfu']:.0%}" if r["mfu"] is not None else ""
    terms = "".join(f"  {name.replace('_', ' ')} {r[name]:.4f}" for name in ("kl", "router_aux_loss") if name in r)
    return (f"step {r['step']}  loss {r['loss']:.4f}{terms}  lr {r['lr']:.2e}  norm {r['grad_norm']:.3f}  "
            f"{r['tokens_per_s']:,.0f} tok/s  {r['supervised_per_s']:,.0f} supervised/s{mfu}  {r['memory_gb']:.2f} GB")


def _forgetting_line(r: dict) -> str:
    parts = [f"step {r['step']}"]
    for role in ("general", "domain"):
        if role in r:
            change = f", forgotten {r[f'{role}_lost']:,}, gained {r[f'{role}_gained']:,}"
            parts.append(f"{role} {r[role]:.1%} (base {r[f'{role}_base']:.1%}{change})")
        elif f"{role}_logprob" in r:
            parts.append(f"{role} log-prob {r[f'{role}_logprob']:.4f}")
        parts[-1] += f", KL {r[f'{role}_kl']:.4f}" if f"{role}_kl" in r else ""
    if "holds_floor" in r:
        verb, best = "holds" if r["holds_floor"] else "misses", "; the best so far" if r["best"] else ""
        parts.append(f"{verb} the floor of {r['floor']:.1%}{best}")
    return "  ".join(parts)


_LINES = {
    "forgetting": _forgetting_line,
    "step": _step_line,
    "eval": lambda r: f"step {r['step']}  eval loss {r['loss']:.4f} over {r['tokens']:,} supervised tokens",
    "end": lambda r: (f"{r['reason']} after {r['steps']} steps, {r['seconds']:.1f} s, {r['tokens']:,} tokens "
                      f"at {r['tokens_per_s']:,.0f} a second, peak memory {r['peak_memory_gb']:.2f} GB"),
}


class Sink(NamedTuple):
    """A destination beside metrics.jsonl."""

    figures: Callable[[dict, int], object]  # by name, of a step
    texts: Callable[[str, list[dict[str, str]], int], object]  # a name, rows of equal columns, a step


def _tensorboard(folder: Path, config: Config, first_step: int) -> Sink | None:
    if not config.logging.tensorboard:
        return None
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

    return Sink(write_figures, write_texts)


def _wandb(folder: Path, config: Config) -> Sink | None:
    if config.logging.wandb_project is None:
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError("logging.wandb_project: needs the package wandb, which is not installed; "
                        "pip install 'steadfast-sft[logging]'") from None
    run = wandb.init(project=config.logging.wandb_project, dir=folder, config=dataclasses.asdict(config))
    return Sink(lambda figures, step: run.log(figures, step=step),
                lambda name, rows, step: run.log({name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])},
                                                 step=step))
