"""Share configuration, pool, chat formats and engines between the stages of a run.

Each stage requests only what the pool lacks. Requests stream into an engine, results come back in any order, and every batch of results is
one transaction together with its cost. So a kill loses only the batch in flight, and the next call resumes where the last one ended.
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
from synth.engines import kind_of, open_engine
from synth.engines.adapters import digest_of, find_adapter
from synth.engines.chat_format import ChatFormat, load_format
from synth.engines.interface import Completion, Engine, EngineInfo, Failure
from synth.pool.store import Pool
from synth.pool.writer import ResultWriter
from trainer import config as trainer_config
from trainer.errors import UserError
from trainer.model.locate import load_tokenizer
from trainer.model.saved_adapter import adapter_tokenizer

# Options that a model's results depend on. Its other options only say where it runs and how fast.
RESULT_OPTIONS = ("path", "dtype", "max_model_len", "tensor_parallel_size", "batch_invariant")

RESULT_TABLES = {"pool": "items", "instruct": "items", "respond": "responses", "judge": "scores"}  # by key of the pinned settings


class SynthesisRun:
    """One call of synth.run: its resolved configuration, the open pool, and `say`, which prints a line.

    It owns the engine of a local model; leaving its context ends that engine's processes.
    """

    def __init__(self, config: Config, pool: Pool, say: Callable[[str], None] = print):
        self.config, self.pool, self.say = config, pool, say
        self._formats: dict[str, ChatFormat] = {}
        self._loaded: tuple[Model, Engine] | None = None  # the local model whose engine is up

    def __enter__(self) -> SynthesisRun:
        return self

    def __exit__(self, *_) -> None:
        self.stop_engine()

    @property
    def folder(self) -> Path:
        """Return the output folder."""
        return Path(self.config.output)

    @property
    def base(self) -> Model:
        """Return the options of the base."""
        return self.config.base

    def format(self, model: Model) -> ChatFormat:
        """Return the chat format of a local model.

        Raises UserError where none can be derived from its chat template.
        """
        name = name_of(model)
        if name not in self._formats:
            self._formats[name] = load_format(model.path, self.tokenizer(model), self.config.date)
        return self._formats[name]

    def tokenizer(self, model: Model) -> PreTrainedTokenizerBase:
        """Load the tokenizer of a local model. Raises UserError where there is none."""
        try:
            adapter = find_adapter(model)
            return load_tokenizer(trainer_config.Model(path=model.path, tokenizer=adapter and adapter_tokenizer(Path(adapter)),
                                                       trust_remote_code=model.trust_remote_code))
        except UserError as error:  # which names the trainer's options
            raise UserError(str(error).replace("model.path", f"path of {name_of(model)}")
                            .replace("model.tokenizer", f"tokenizer of {name_of(model)}")) from None

    # ---------------------------------------------------------------- stages

    def pin_settings(self, stage: str, settings: dict[str, Any]) -> None:
        """Store a stage's settings in the pool.

        Raises UserError where the pool holds results of other settings.
        """
        if stage in RESULT_TABLES and not self.pool.select(f"SELECT 1 FROM {RESULT_TABLES[stage]} LIMIT 1"):
            with self.pool.transaction():
                self.pool.forget_settings(stage)
        self.pool.pin_settings(stage, settings, "go on with those, or choose another output")

    def require(self, stage: str) -> None:
        """Raise UserError unless `stage`, which the calling one builds on, is done."""
        if not self.done(stage):
            raise UserError(f"pool {self.pool.path}: expected stage {stage} to have ended, found it unfinished; "
                            f"run it first: --stages '[{stage}]'")

    def done(self, stage: str) -> bool:
        """Return whether a stage has been run to its end on this pool."""
        return bool(self.pool.get(f"done.{stage}"))

    def finish(self, stage: str) -> None:
        """Mark a stage as done."""
        with self.pool.transaction():
            self.pool.set(f"done.{stage}", True)

    # ---------------------------------------------------------------- models

    @contextmanager
    def use_engine(self, stage: str, model: Model, record: bool = True) -> Iterator[ResultWriter]:
        """Yield the writer that sends requests to an engine that runs `model`.

        A local model stays loaded for the next stage that uses it; another one takes its place, so that one is loaded at a time. After an
        error none is.

        With `record` the model must be the one that the pool knows under this name; False is for work outside the pool, such as embeddings
        for the report. Raises EngineError where the engine does not start, UserError where the model is another one.
        """
        is_server = kind_of(model) == "openai"
        engine = self._start(stage, model) if is_server else self._load(stage, model)
        try:
            if record:
                self._check_same_model(model, engine.info)
            yield ResultWriter(self.pool, self.say, stage, name_of(model), engine)
        except BaseException:
            self.stop_engine()
            raise
        finally:
            if is_server:
                engine.close()

    def stop_engine(self) -> None:
        """End the processes of the local model that is loaded, if there is one."""
        if self._loaded:
            (_, engine), self._loaded = self._loaded, None
            engine.close()

    def _load(self, stage: str, model: Model) -> Engine:
        """Return the engine of a local model, the one that is up where it runs this model with these options."""
        if self._loaded and self._loaded[0] == model and self._loaded[1].alive():
            self.say(f"{stage}: {name_of(model)}: {self._loaded[1].info.name} is still loaded")
        else:
            self.stop_engine()
            self._loaded = model, self._start(stage, model)
        return self._loaded[1]

    def _start(self, stage: str, model: Model) -> Engine:
        began = time.monotonic()
        engine = open_engine(model, log=self.folder / "logs" / f"{stage}-{name_of(model)}")
        self.say(f"{stage}: {name_of(model)}: started {engine.info.name} in {time.monotonic() - began:.1f} s")
        return engine

    def _check_same_model(self, model: Model, info: EngineInfo) -> None:
        """Record a model at its first use.

        Raises UserError where the pool has another engine, path or fingerprint under this name.
        """
        row = (name_of(model), info.name, model.path, info.fingerprint, int(info.deterministic))
        known = self.pool.select("SELECT * FROM models WHERE name = ?", row[0])
        if not known:
            with self.pool.transaction():
                self.pool.insert("models", [row])
            return
        for column, pinned, found in zip(("engine", "path", "fingerprint"), known[0][1:4], row[1:4], strict=True):
            if pinned != found:
                raise UserError(f"{row[0]}: this pool was made with {column} {pinned}, found {found}; "
                                "go on with that, or choose another output")


def model_identity(model: Model) -> dict[str, Any]:
    """Return the options that a model's results depend on, its name, and a digest of its adapter."""
    adapter = {} if model.adapter is None else {"adapter": digest_of(model)}
    return {key: value for key, value in dataclasses.asdict(model).items() if key in RESULT_OPTIONS} | {"name": name_of(model)} | adapter


def why_unusable(completion: Completion | Failure, leaked_token: str | None) -> str | None:
    """Return why a generated turn cannot be used, None where it can.

    `leaked_token` is a special token in its text, if there is one.
    """
    if isinstance(completion, Failure):
        return completion.reason
    if completion.finish == "length":
        return "longer than max_tokens or the context"
    if leaked_token:
        return f"special token {leaked_token}"
    return None if completion.text.strip() else "empty"
