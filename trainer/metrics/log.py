"""Write a run's figures to metrics.jsonl, the console and trackers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from trainer.config import Config
from trainer.files import atomic_file
from trainer.metrics import trackers
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
        self.trackers = trackers.open_trackers(folder, config, first_step)
        visible = config.logging.progress and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not visible, dynamic_ncols=True)

    def write(self, record: dict) -> None:
        """Write one record everywhere."""
        if not self.path.exists():
            self._restore()
        self.file.write(json.dumps(record | {"time": round(time.time(), 3)}) + "\n")
        figures = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for tracker in self.trackers.values():
            tracker.figures(figures, record.get("step", 0))
        self._show(record)

    def write_texts(self, name: str, rows: list[dict[str, str]], step: int) -> None:
        """Write texts to the trackers, in rows of equal columns."""
        for tracker in self.trackers.values():
            tracker.texts(name, rows, step)

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
        if self.config.logging.tensorboard:
            self.trackers["tensorboard"] = trackers.tensorboard(self.path.parent, 0)

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
