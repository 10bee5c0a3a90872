"""What every stage works with: the settings, the pool, and models that answer requests.

A stage asks for what is missing and for nothing else. Requests stream into an engine, results come back in any order, and every batch
of them is one transaction together with what it cost. So a kill loses the batch in flight, and a second call goes on where the first one
ended.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from synth.config import Config, Model, name_of
from synth.engines import open_engine
from synth.engines.chat_format import ChatFormat, load_format
from synth.engines.interface import Completion, EngineInfo, Failure
from synth.pool.store import Pool
from synth.pool.writer import Worker
from trainer import config as trainer_config
from trainer.errors import UserError
from trainer.model.locate import load_tokenizer

# What a model's results depend on. The rest of its options say where it runs and how fast.
IDENTITY = ("path", "dtype", "max_model_len", "tensor_parallel_size", "batch_invariant")

MADE = {"pool": "items", "instruct": "items", "respond": "responses", "judge": "scores"}  # where what a stage makes is kept


class SynthesisRun:
    """A call of `python -m synth.run`: its settled configuration, the open pool, and where it says what it does."""

    def __init__(self, config: Config, pool: Pool, say: Callable[[str], None] = print):
        self.config, self.pool, self.say = config, pool, say
        self._formats: dict[str, ChatFormat] = {}

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def base(self) -> Model:
        return self.config.base

    def format(self, model: Model) -> ChatFormat:
        """The chat format of a model that we hold ourselves: its tokenizer, prefix and stops. UserError where none can be derived."""
        name = name_of(model)
        if name not in self._formats:
            self._formats[name] = load_format(model.path, self.tokenizer(model), self.config.date)
        return self._formats[name]

    def tokenizer(self, model: Model) -> PreTrainedTokenizerBase:
        try:
            return load_tokenizer(trainer_config.Model(path=model.path, trust_remote_code=model.trust_remote_code))
        except UserError as error:  # in the trainer's terms
            raise UserError(str(error).replace("model.path", f"path of {name_of(model)}")
                            .replace("model.tokenizer", f"tokenizer of {name_of(model)}")) from None

    # ---------------------------------------------------------------- stages

    def settle(self, stage: str, settings: dict[str, Any]) -> None:
        """Keep a stage's settings; UserError where a later call has others, once there is something that was made with them."""
        if stage in MADE and not self.pool.select(f"SELECT 1 FROM {MADE[stage]} LIMIT 1"):
            with self.pool.transaction():
                self.pool.forget(stage)
        self.pool.settle(stage, settings, "go on with those, or choose another output")

    def require(self, stage: str) -> None:
        """UserError where a stage that is needed first has not ended."""
        if not self.done(stage):
            raise UserError(f"pool {self.pool.path}: expected stage {stage} to have ended, found it unfinished; "
                            f"run it first: --stages '[{stage}]'")

    def done(self, stage: str) -> bool:
        return bool(self.pool.get(f"done.{stage}"))

    def finish(self, stage: str) -> None:
        with self.pool.transaction():
            self.pool.set(f"done.{stage}", True)

    # ---------------------------------------------------------------- models

    @contextmanager
    def at_work(self, stage: str, model: Model, record: bool = True) -> Iterator[Worker]:
        """An engine that runs `model`, started here and gone, with all its memory, at the end. It must be the model that the pool knows
        under this name; `record=False` for work beside the pool's own (embeddings for the report)."""
        began = time.monotonic()
        engine = open_engine(model, log=self.folder / "logs" / f"{stage}-{name_of(model)}")
        try:
            self.say(f"{stage}: {name_of(model)} with {engine.info.name}, up in {time.monotonic() - began:.1f} s")
            if record:
                self._recognise(model, engine.info)
            yield Worker(self.pool, self.say, stage, name_of(model), engine)
        finally:
            engine.close()

    def _recognise(self, model: Model, info: EngineInfo) -> None:
        row = (name_of(model), info.name, model.path, info.fingerprint, int(info.deterministic))
        known = self.pool.select("SELECT * FROM models WHERE name = ?", row[0])
        if not known:
            with self.pool.transaction():
                self.pool.insert("models", [row])
        for column, was, found in zip(("engine", "path", "fingerprint"), known[0][1:4] if known else (), row[1:4]):
            if was != found:
                raise UserError(f"{row[0]}: this pool was made with {column} {was}, found {found}; "
                                "go on with that, or choose another output")


def identity(model: Model) -> dict[str, Any]:
    """The options of a model that its results depend on, for a stage's settings."""
    return {key: value for key, value in dataclasses.asdict(model).items() if key in IDENTITY} | {"name": name_of(model)}


def usable(completion: Completion | Failure, leaked: str | None) -> str | None:
    """Why a generated turn cannot be used; None where it can."""
    if isinstance(completion, Failure):
        return completion.reason
    if completion.finish == "length":
        return "longer than max_tokens or the context"
    if leaked:
        return f"special token {leaked}"
    return None if completion.text.strip() else "empty"
