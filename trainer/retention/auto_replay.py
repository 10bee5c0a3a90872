"""`replay.auto`: short probe runs choose the least replay, and a weight of the KL to the base, that hold the floor.

A probe is a run of its own, under `auto/` in the run folder: the same data, seed and schedule, pressed into `replay.auto_part` of the
passes over the domain. So probes of all shares see the same domain rows, with the replay that goes with them, and each ends where its
learning rate has decayed: what a high rate costs comes back then, so a run cut off half way would say little about its end.

The more replay, the less is forgotten: for the first weight of `replay.auto_kl` the least share that holds the floor is found by bisection
of `replay.auto_shares`. Each further weight is tried on the share below the least so far, and by bisection on those below where it holds;
it is taken unless it gains less than half of what the best so far gains on the domain. So five to ten probes serve for 21 pairs.

The choice is written to auto.json, with every probe, as they end: a killed search goes on after the last one, and a resumed run reads what
was chosen. The choice is a forecast: a probe learns and forgets as a shorter run does, so the real run is watched too (monitor.py).
In the miniature world (`python -m benchmarks.run floor`) a longer run mends more of what it broke: with replay shares of 20, 35 and 50%
probes of a quarter kept 81, 92 and 97% of the base's accuracy, whole runs 93, 97 and 99%. No trend in their length says so: probes of an
eighth, which had learnt next to nothing of the domain, kept 78, 94 and 96%. Longer probes choose less replay and cost more: for a floor of
99%, five probes of a quarter took 69% of the run's steps and chose 83%, five of a half took 183% and chose 65%; both runs held the floor.
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
from typing import TYPE_CHECKING

import torch

from trainer.config import Config
from trainer.errors import UserError
from trainer.files import atomic_file
from trainer.runtime import checkpoint
from trainer.runtime.distributed import Distributed

if TYPE_CHECKING:
    from trainer.runtime.result import RunResult

NAME = "auto.json"
FIGURES = ("metrics.jsonl", "config.yaml", "data.json", "log.txt")  # what is left of a probe


class Stopped(Exception):
    """A signal came during a probe."""

    def __init__(self, result: RunResult):
        self.result = result


@dataclass
class Search:
    """Probes of one run, each made once: those of an earlier start are read, not run again."""

    config: Config
    run: Callable[[Config], RunResult]  # one whole probe
    dist: Distributed
    probes: list[dict]

    def probe(self, share: float, kl: float) -> dict:
        """What a probe with this share of replay and weight of the KL came to."""
        known = [found for found in self.probes if (found["share"], found["kl"]) == (share, kl)]
        if known:
            return known[0]
        settings, begun = as_probe(self.config, share, kl), time.perf_counter()
        folder = Path(settings.output)
        self.dist.on_main(lambda: _clear(folder, self.config.resume))
        with (folder / "log.txt" if self.dist.is_main else Path(os.devnull)).open("a") as file, redirect_stdout(file):
            result = self.run(settings)
        if result.signal:
            raise Stopped(result)
        self.dist.on_main(lambda: _keep_figures(folder))
        found = {"share": share, "kl": kl, "steps": result.steps, "seconds": time.perf_counter() - begun, **_end(folder),
                 **{name: value for name, value in result.retention.items() if name not in ("kind", "step", "files")}}
        found = self.dist.gather(found)[0]  # clocks differ
        self.probes.append(found)
        self.dist.on_main(lambda: self.write(None))
        if self.dist.is_main:
            print(f"auto: {line(found)}", flush=True)
        _free()
        return found

    def write(self, choice: dict | None) -> None:
        """auto.json, whole or as it was."""
        path = Path(self.config.output) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as tmp:
            tmp.write_text(json.dumps({"options": _options(self.config), "probes": self.probes, "choice": choice}, indent=1))


def choose(config: Config, run: Callable[[Config], RunResult], dist: Distributed) -> Config:
    """The configuration of the real run, with the share and weight that probes chose, or had chosen when the run began.

    Raises Stopped where a signal ends a probe, and UserError where auto.json is of another configuration.
    """
    box: list = [None]

    def look() -> None:
        box[0] = earlier(config)

    dist.on_main(look)
    found = dist.gather(box[0])[0]
    search = Search(config, run, dist, found["probes"])
    if found["choice"] is None:
        chosen = least(config.replay.auto_shares, config.replay.auto_kl, search.probe, _learns)
        choice = chosen or max(search.probes, key=lambda probe: (probe["general"], probe.get("domain", 0)))
        dist.on_main(lambda: search.write(choice))
        found["choice"] = choice
    if dist.is_main:
        print(verdict(config, search.probes, found["choice"]), flush=True)
    return decided(config, found["choice"]["share"], found["choice"]["kl"])


def least(shares: Sequence[float], weights: Sequence[float], probe: Callable[[float, float], dict],
          learns: Callable[[dict, dict], bool]) -> dict | None:
    """The probe with the least share that holds the floor, of rising `shares` and KL `weights`; None where none holds it.

    Takes it that what holds the floor at one share holds it at every larger one. `learns(probe, best)` says whether a probe with a larger
    weight learns the domain well enough beside the best so far.
    """
    best, end = None, len(shares)  # shares[end:] need no further look

    def holds(i: int, kl: float) -> bool:
        nonlocal best, end
        found = probe(shares[i], kl)
        if not found["held"] or (best is not None and kl != best["kl"] and not learns(found, best)):
            return False
        best, end = found, i
        return True

    for number, kl in enumerate(weights):
        if end == 0:
            break
        low = 0
        if number and not holds(end - 1, kl):
            continue
        while low < end:
            middle = (low + end) // 2
            if not holds(middle, kl):
                low = middle + 1
    return best


def _learns(probe: dict, best: dict) -> bool:
    """Whether it gains half of what the best gains on the domain or more; without domain items nothing speaks against it.

    No more is asked, as a divergence slows learning more than it hinders it: in the miniature world, with 65% of replay, a weight of 1
    took domain accuracy from 56.0% to 30.5% in probes of a quarter, and from 96.5% to 94.0% in whole runs.
    """
    return "domain" not in probe or probe["domain"] - probe["domain_base"] >= 0.5 * (best["domain"] - best["domain_base"])


# ---------------------------------------------------------------- configurations


def decided(config: Config, share: float, kl: float) -> Config:
    """The real run: as if these had been asked for."""
    return replace(config, replay=replace(config.replay, auto=False, ratio=share), retention=replace(config.retention, kl=kl))


def as_probe(config: Config, share: float, kl: float) -> Config:
    """A run of `auto_part` of the passes, measured at its two ends, that keeps nothing but its figures."""
    part, probe, optim = config.replay.auto_part, decided(config, share, kl), config.optim
    return replace(
        probe, output=str(Path(config.output) / "auto" / f"share-{share:g}-kl-{kl:g}"), epochs=config.epochs * part,
        max_steps=None if config.max_steps is None else max(1, round(config.max_steps * part)),
        optim=replace(optim, warmup_steps=_scaled(optim.warmup_steps, part), decay_steps=_scaled(optim.decay_steps, part)),
        retention=replace(probe.retention, every=0, patience=0), eval=replace(config.eval, every=0, patience=0),
        checkpoint=replace(config.checkpoint, every=0),
        logging=replace(config.logging, every=sys.maxsize, tensorboard=False, wandb_project=None, profile_steps=None))


def _scaled(steps: int, part: float) -> int:
    """Return this share of a number of steps, at least one; 0, where the schedule is given as a share of the run, stays 0."""
    return max(1, round(steps * part)) if steps else 0


def _options(config: Config) -> dict:
    return json.loads(json.dumps(checkpoint.identity(config, 0)))


# ---------------------------------------------------------------- what is on disk


def earlier(config: Config) -> dict:
    """What auto.json says of an earlier start, where the run goes on from one. UserError if it is damaged or of another configuration."""
    path = Path(config.output) / NAME
    if config.resume == "never" or not path.exists():
        shutil.rmtree(Path(config.output) / "auto", ignore_errors=True)
        return {"probes": [], "choice": None}
    try:
        found = json.loads(path.read_text())
        changed = checkpoint.differences(found["options"], _options(config))
        found = {"probes": found["probes"], "choice": found["choice"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"resume: cannot read {path}: {error}; remove it to probe again") from None
    if changed:
        raise UserError(f"resume: the probes of {path} were made with another configuration: {'; '.join(changed)}; restore these options, "
                        "or start anew with another output folder")
    return found


def _clear(folder: Path, resume: str) -> None:
    """Make room for a probe, unless it goes on from a checkpoint of its own."""
    if resume == "never" or checkpoint.newest(folder / "checkpoints") is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot write the folder {folder}: {error.strerror}; choose another --output") from None


def _keep_figures(folder: Path) -> None:
    """Remove the states of a probe that has ended: its checkpoints, and what its base said."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in FIGURES:
            path.unlink()


def _end(folder: Path) -> dict:
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"tokens": last["tokens"], "supervised": last["supervised"]}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- in words


def line(probe: dict) -> str:
    domain = f", domain {probe['domain']:.1%}" if "domain" in probe else ""
    return (f"replay {probe['share']:.0%}, KL {probe['kl']:g}: {probe['general_retained']:.1%} of the base's general accuracy{domain}; "
            f"{'holds' if probe['held'] else 'misses'} the floor ({probe['steps']} steps, {probe['seconds']:.1f} s)")


def verdict(config: Config, probes: Sequence[dict], choice: dict) -> str:
    """What was chosen, and what that cost beside the run that follows."""
    steps, seconds = (sum(probe[name] for probe in probes) for name in ("steps", "seconds"))
    of_run = steps * config.replay.auto_part / choice["steps"]
    cost = f"{len(probes)} probes of {steps} steps, {of_run:.0%} of the run's, took {seconds:.1f} s"
    if choice["held"]:
        return f"auto: replay.ratio {choice['share']:g} and retention.kl {choice['kl']:g}, the least that held the floor; {cost}"
    return (f"auto: WARNING: no probe held the floor of {config.retention.floor:.1%}; going on with the nearest, replay.ratio "
            f"{choice['share']:g} and retention.kl {choice['kl']:g}; {cost}")
