"""Make what cases start from: a tiny model, its data, finished and interrupted runs on them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
import yaml

from tests.campaign.forked import Ended, complete
from tests.helpers import runs, tiny
from tests.helpers.synth_fakes import BASE, FakeEngine
from trainer import cli, run
from trainer.config import Config

WORDS = "river stone engine garden violin harbour winter copper island lantern orchard thunder market canvas bridge meadow".split()
ITEMS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(3)]


class Material:
    """Folders and files under `folder`; a property is made when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}  # that each undisturbed run took

    @functools.cached_property
    def model(self) -> Path:
        return tiny.save_model(self.folder / "model", "llama")

    @functools.cached_property
    def chats(self) -> Path:
        return runs.write_chats(self.folder / "chats.jsonl", runs.QUESTIONS[:12])

    @functools.cached_property
    def items(self) -> Path:
        path = self.folder / "items.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
        return path

    @functools.cached_property
    def adapter(self) -> Path:
        return self._completed("trained", "trainer.run", self.options("out", "--max_steps", "1"), without_report) / "out" / "adapter"

    def copy_of_model(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.model, folder))

    # ---------------------------------------------------------------- training that is disturbed

    def long_options(self, *more: str) -> list[str]:
        """Return the options of a run of some seconds, with checkpoints."""
        return self.options("out", "--epochs", "4", "--batch.tokens_per_step", "256", "--checkpoint.every", "2", "--lora.dropout", "0.1",
                            "--logging.every", "1", *more)

    @functools.cached_property
    def undisturbed(self) -> Path:
        """Return the folder of a run that nothing disturbed."""
        return self._completed("undisturbed", "trainer.run", self.long_options(), without_report)

    @functools.cached_property
    def interrupted(self) -> Path:
        """Return the folder of such a run that was killed in a late step: it has checkpoints."""
        folder = self.folder / "interrupted"
        ended = complete("trainer.run", self.long_options(), folder, die_in_a_late_step)
        assert ended.status == -signal.SIGKILL, ended
        return folder

    def unlike_undisturbed(self, folder: Path) -> str | None:
        """Return how the end of a run differs from the undisturbed one's, by weights and by record."""
        if not (folder / "out" / "adapter" / "adapter_model.safetensors").exists():
            return None if "error" in (folder / "stderr").read_text() else "no adapter"
        ours, theirs = (runs.weights(place / "out") for place in (folder, self.undisturbed))
        if ours.keys() != theirs.keys() or any(not torch.equal(theirs[name], ours[name]) for name in theirs):
            return "the adapter differs from that of the undisturbed run"
        ours, theirs = ([(record["step"], record["loss"]) for record in runs.records(place / "out", "step")]
                        for place in (folder, self.undisturbed))
        if len(ours) != len(set(ours)) or not set(ours) <= set(theirs):
            return "metrics.jsonl has a step twice, or another loss"
        return None

    def _completed(self, name: str, module: str, arguments: Sequence[str | Path], prepare: Callable[[], None]) -> Path:
        """Run a command to its end in a folder of this name, note the seconds it takes, and return the folder."""
        began = time.monotonic()
        ended = complete(module, arguments, self.folder / name, prepare)
        assert not ended.status, ended.errors
        self.seconds[name] = time.monotonic() - began
        return self.folder / name

    # ---------------------------------------------------------------- synthesis

    POOL = {"base": {"path": BASE, "name": "base"}, "instruct": {"num_instructions": 8, "reference_samples": 4, "max_tokens": 64},
            "probe": {"samples": 2, "temperature": [1.0]}, "respond": {"num_samples": 2, "max_tokens": 64, "score_with_base": False},
            "select": {"rule": "best"}}
    WHOLE_POOL = POOL | {"instruct": POOL["instruct"] | {"num_instructions": 80}, "report": {"embeddings": False, "topics": 2},
                         "judge": {"exclude_self": False},
                         "stages": ["probe", "instruct", "clean", "respond", "judge", "select"]}

    def _synthesised(self, name: str, options: dict, prepare: Callable[[], None]) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(options | {"output": "out"}))
        return self._completed(name, "synth.run", ["--config", path], prepare) / "out"

    @functools.cached_property
    def pool(self) -> Path:
        """Return a pool with instructions that are cleaned, and nothing else."""
        return self._synthesised("pool", self.POOL | {"stages": ["instruct", "clean"]}, self.play_base)

    @functools.cached_property
    def judged_pool(self) -> Path:
        """Return a pool to the end of its last stage but the report."""
        return self._synthesised("judged", self.POOL | {"stages": ["instruct", "clean", "respond", "judge", "select"]}, self.play_base)

    @functools.cached_property
    def whole_pool(self) -> Path:
        """Return a larger pool that nothing disturbed, of a base that answers slowly."""
        return self._synthesised("whole", self.WHOLE_POOL, self.play_slowly)

    @staticmethod
    def play_base() -> None:
        """Let the base of a pool answer by a script in this process."""
        _install(lambda: None)

    @staticmethod
    def play_slowly() -> None:
        """Let it answer so slowly that a kill is likely to come between answers and while they are written."""
        _install(lambda: time.sleep(0.006))

    def options(self, output: Path | str = "out", *more: str | Path) -> list[str]:
        """Return the options of a small run; later ones override earlier ones."""
        return runs.arguments(self.model, self.chats, output, "--data.cache_dir", "cache", *more)

    def dry_run(self, folder: Path, *more: str | Path) -> Ended:
        """Run trainer.run as a dry run in a folder of its own."""
        return complete("trainer.run", self.options("out", *more, "--dry_run"), folder)

    def warm_up(self) -> None:
        """Load what a command loads late, so that forks have it."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            out = self.folder / "warm"
            run.train(cli.parse(Config, [*self.options(out), "--data.cache_dir", str(out / "cache"), "--dry_run"], "trainer.run"))
            shutil.rmtree(out, ignore_errors=True)


def _install(pause: Callable[[], None]) -> None:
    """Replace the engine of every local model by one that answers by the request alone."""
    from synth.config import name_of
    from synth.engines import open_engine
    from synth.pool import synthesis_run

    def text(request) -> str:
        pause()
        return f"Tell me about {' '.join(Random(request.seed).sample(WORDS, 5))}."

    def choose(request) -> list[float]:
        pause()
        return [Random(repr((request.key, at))).random() for at, _ in enumerate(request.choices)]

    def open_here(model, log):
        if model.engine == "openai":
            return open_engine(model, log)
        return FakeEngine(name_of(model), complete=text, choose=choose, likelihood=lambda request: -float(len(request.continuation)),
                          seed=time.time_ns())

    synthesis_run.open_engine = open_here


def die_in_a_late_step() -> None:
    """Let a run of trainer.run die in its seventh step, as by kill -9."""
    from trainer.training import loop

    train_step = loop.train_step

    def until(run, work, phases):
        if work.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(run, work, phases)

    loop.train_step = until
    without_report()


def without_report() -> None:
    """Let a run of trainer.run leave out its page of pictures."""
    from trainer.training import run_folder

    run_folder.write_report = lambda folder: None
