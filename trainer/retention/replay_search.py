"""Choose the least replay, and a KL weight, that hold the floor, by short probe runs.

With `replay_search.enabled` the search comes before the run. A probe run is a run of its own, in the folder `replay_search/` of the run
folder: the same data, seed and learning-rate schedule, over `replay_search.probe_fraction` of the epochs. So all probe runs see the same
domain samples, each with its share of replay, and each ends with its learning rate decayed: accuracy that a high rate costs comes back
then, so a run cut off half way says little about its end.

The more replay, the less is forgotten: for the first of `replay_search.kl_weights` the least ratio that holds the floor is found by
bisection of `replay_search.ratios`. Each further weight is tried on the ratio below the least so far, and by bisection on those below where
it holds; it is taken unless it gains less than half of what the best so far gains on the domain.

replay_search.json holds the probe runs, as they end, and the choice: a killed search goes on after its last probe run, and a resumed run
reads its choice. The choice is a forecast, as a short run learns and forgets less than a long one; so the run that follows is measured
too (monitor.py). How well probe runs foretell whole runs: the table of `python -m benchmarks.run floor` in benchmarks/README.md.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trainer.config import Config
from trainer.errors import UserError
from trainer.files import atomic_file
from trainer.metrics.records import read_records
from trainer.runtime import checkpoint
from trainer.runtime.distributed import Distributed
from trainer.runtime.result import RunResult

FILE_NAME = "replay_search.json"
FOLDER_NAME = "replay_search"  # of the probe runs' folders
KEPT_FILES = ("metrics.jsonl", "config.yaml", "data.json", "log.txt")  # of a probe run that has ended


@dataclass
class ReplaySearch:
    """The probe runs of one search, each made once: those of an earlier start are read, not run again."""

    config: Config
    run: Callable[[Config], RunResult]  # one whole probe run
    dist: Distributed
    probes: list[dict]  # records of the probe runs so far

    def probe(self, ratio: float, kl_weight: float) -> dict | RunResult:
        """Return the record of the probe run with these options, or its result if a signal stopped it."""
        for known in self.probes:
            if (known["ratio"], known["kl_weight"]) == (ratio, kl_weight):
                return known
        config, start = probe_config(self.config, ratio, kl_weight), time.perf_counter()
        folder = Path(config.output)
        self.dist.on_main(lambda: _prepare_folder(folder, self.config.resume))
        with (folder / "log.txt" if self.dist.is_main else Path(os.devnull)).open("a") as file, redirect_stdout(file):
            result = self.run(config)
        if result.signal:
            return result
        self.dist.on_main(lambda: _remove_weights(folder))
        record = {"ratio": ratio, "kl_weight": kl_weight, "steps": result.steps, "seconds": time.perf_counter() - start,
                  **_token_counts(folder),
                  **{name: value for name, value in result.forgetting.items() if name not in ("kind", "step", "files")}}
        record = self.dist.gather(record)[0]  # the clocks of ranks differ
        self.probes.append(record)
        self.dist.on_main(lambda: self.write(None))
        if self.dist.is_main:
            print(f"replay search: {probe_line(record)}", flush=True)
        _free_memory()
        return record

    def write(self, choice: dict | None) -> None:
        """Write replay_search.json atomically."""
        path = Path(self.config.output) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as tmp:
            tmp.write_text(json.dumps({"options": _options(self.config), "probes": self.probes, "choice": choice}, indent=1))


def choose(config: Config, run: Callable[[Config], RunResult], dist: Distributed) -> Config | RunResult:
    """Return the run's configuration with the chosen ratio and weight, or a stopped probe run's result.

    A probe run's result comes back where a signal stopped it. A resumed run keeps its earlier choice. Raises UserError where
    replay_search.json belongs to another configuration.
    """
    earlier: dict = {}
    dist.on_main(lambda: earlier.update(read_earlier(config)))
    earlier = dist.gather(earlier)[0]
    search, choice = ReplaySearch(config, run, dist, earlier["probes"]), earlier["choice"]
    if choice is None:
        options = config.replay_search
        found = least_replay(options.ratios, options.kl_weights, search.probe, learns_enough)
        if isinstance(found, RunResult):
            return found
        choice = found or max(search.probes, key=lambda probe: (probe["general"], probe.get("domain", 0)))
        dist.on_main(lambda: search.write(choice))
    if dist.is_main:
        print(f"replay search: {choice_line(config, search.probes, choice)}", flush=True)
    return config_with(config, choice["ratio"], choice["kl_weight"])


def least_replay(ratios: Sequence[float], kl_weights: Sequence[float], probe: Callable[[float, float], dict | RunResult],
                 learns_enough: Callable[[dict, dict], bool]) -> dict | RunResult | None:
    """Return the probe with the least of these ratios that holds the floor; None where none does.

    A RunResult from `probe` (a signal stopped it) is returned at once. `ratios` and `kl_weights` rise. A ratio is assumed to hold the floor
    where a smaller one does. `learns_enough(probe, best)` decides whether a larger weight learns the domain well enough beside the best
    probe so far.
    """
    best, end = None, len(ratios)  # ratios[end:] need no further probe
    for number, kl_weight in enumerate(kl_weights):
        low, try_largest = 0, number > 0
        while low < end:
            i = end - 1 if try_largest else (low + end) // 2
            result = probe(ratios[i], kl_weight)
            if isinstance(result, RunResult):
                return result
            if result["holds_floor"] and (best is None or kl_weight == best["kl_weight"] or learns_enough(result, best)):
                best, end = result, i
            else:
                low = i + 1
            try_largest = False
    return best


def learns_enough(probe: dict, best: dict) -> bool:
    """Return whether a probe gains on the domain at least half of what the best one gains.

    Without domain items it is True. Half is enough, as a KL slows learning more than it hinders it: a whole run catches up on most of what
    its probe run lags behind.
    """
    return "domain" not in probe or probe["domain"] - probe["domain_base"] >= 0.5 * (best["domain"] - best["domain_base"])


# ---------------------------------------------------------------- configurations


def config_with(config: Config, ratio: float, kl_weight: float) -> Config:
    """Return the configuration of a run with this replay ratio and KL weight, and without a search."""
    return replace(config, replay_search=replace(config.replay_search, enabled=False), replay=replace(config.replay, ratio=ratio),
                   retention=replace(config.retention, kl_weight=kl_weight))


def probe_config(config: Config, ratio: float, kl_weight: float) -> Config:
    """Return the configuration of a probe run.

    It has `probe_fraction` of the epochs, is measured before the first step and after the last, and saves no checkpoints.
    """
    fraction, optim = config.replay_search.probe_fraction, config.optim
    probe = config_with(config, ratio, kl_weight)
    return replace(
        probe, output=str(Path(config.output) / FOLDER_NAME / f"ratio-{ratio:g}-kl-{kl_weight:g}"), epochs=config.epochs * fraction,
        max_steps=None if config.max_steps is None else max(1, round(config.max_steps * fraction)),
        optim=replace(optim, warmup_steps=_scaled(optim.warmup_steps, fraction), decay_steps=_scaled(optim.decay_steps, fraction)),
        forgetting=replace(config.forgetting, every=0, patience=0), eval=replace(config.eval, every=0, patience=0, show=0),
        checkpoint=replace(config.checkpoint, every=0),
        logging=replace(config.logging, every=sys.maxsize, tensorboard=False, wandb_project=None,
                        trackio_project=None, mlflow_experiment=None, profile_steps=None))


def _scaled(steps: int, fraction: float) -> int:
    """Return a number of steps times `fraction`, at least 1; 0 stays 0."""
    return 0 if steps == 0 else max(1, round(steps * fraction))


def _options(config: Config) -> dict:
    return json.loads(json.dumps(checkpoint.identity(config, 0)))


# ---------------------------------------------------------------- files


def read_earlier(config: Config) -> dict:
    """Return probes and choice of replay_search.json where the run is resumed, else an empty search.

    Raises UserError if the file is damaged or of another configuration.
    """
    path = Path(config.output) / FILE_NAME
    if config.resume == "never" or not path.exists():
        shutil.rmtree(Path(config.output) / FOLDER_NAME, ignore_errors=True)
        return {"probes": [], "choice": None}
    try:
        saved = json.loads(path.read_text())
        changed = checkpoint.differences(saved["options"], _options(config))
        earlier = {"probes": saved["probes"], "choice": saved["choice"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"resume: cannot read {path}: {error}; remove it to search again") from None
    if changed:
        raise UserError(f"resume: the probe runs of {path} had another configuration: {'; '.join(changed)}; restore these options, "
                        "or start anew with another output folder")
    return earlier


def _prepare_folder(folder: Path, resume: str) -> None:
    """Make the empty folder of a probe run; keep the folder of one that resumes.

    Raises UserError if it cannot be written.
    """
    if resume == "never" or checkpoint.newest(folder / "checkpoints") is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot write the folder {folder}: {error.strerror}; choose another --output") from None


def _remove_weights(folder: Path) -> None:
    """Remove checkpoints and cached states of a probe run that has ended."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in KEPT_FILES:
            path.unlink()


def _token_counts(folder: Path) -> dict:
    *_, last = (None, *read_records(folder / "metrics.jsonl"))
    if last is None or not {"tokens", "supervised"} <= last.keys():
        raise UserError(f"retention: {folder / 'metrics.jsonl'} does not end with the record of a run: it is damaged; "
                        f"remove {folder} to run this probe again")
    return {"tokens": last["tokens"], "supervised": last["supervised"]}


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- console lines


def probe_line(probe: dict) -> str:
    """Return the console line of a probe run."""
    domain = f", domain {probe['domain']:.1%}" if "domain" in probe else ""
    return (f"replay {probe['ratio']:.0%}, KL weight {probe['kl_weight']:g}: {probe['general_retained']:.1%} of the base's general accuracy"
            f"{domain}; {'holds' if probe['holds_floor'] else 'misses'} the floor ({probe['steps']} steps, {probe['seconds']:.1f} s)")


def choice_line(config: Config, probes: Sequence[dict], choice: dict) -> str:
    """Return the console line of the choice, with the cost of the probe runs beside the run's own."""
    steps, seconds = (sum(probe[name] for probe in probes) for name in ("steps", "seconds"))
    of_run = steps * config.replay_search.probe_fraction / choice["steps"]
    chosen = f"replay.ratio {choice['ratio']:g} and retention.kl_weight {choice['kl_weight']:g}"
    cost = f"{len(probes)} probe runs took {steps} steps ({of_run:.0%} of the run's) and {seconds:.1f} s"
    if choice["holds_floor"]:
        return f"chose {chosen}, the least that held the floor; {cost}"
    return f"WARNING: no probe run held the floor of {config.forgetting.floor:.1%}; chose the nearest, {chosen}; {cost}"
