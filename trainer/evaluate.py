"""`python -m trainer.evaluate`: what a model can do, and what it lost. Read the items, score base and model, compare, report."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import transformers

from trainer import cli
from trainer.evaluation import harness, report, vllm
from trainer.evaluation.config import Config, validate
from trainer.evaluation.items import read_files
from trainer.evaluation.models import find_models, load_each
from trainer.evaluation.results import figures_by_file, figures_by_role
from trainer.evaluation.score_items import Outcomes, score
from trainer.runtime.device import choose_device

USAGE = """\
usage: python -m trainer.evaluate --model.path MODEL --data.general FILE [--data.domain FILE] [--section.option value ...]
       python -m trainer.evaluate --config evaluation.yaml [--section.option value ...]

Scores a model on item files: exact answers, choices, answers found by a pattern, the log-prob of held-out text. Beside its base it
counts the items that were lost and gained, and measures how far the model has moved.

The commonest commands:
  python -m trainer.evaluate --adapter runs/first/adapter --data.general general.jsonl --data.domain domain.jsonl
  python -m trainer.evaluate --model.path tuned --base.path original --data.general general.jsonl
  python -m trainer.evaluate --model.path my-model --data.domain gsm8k_test.jsonl --data.regex '#### (-?[\\d,.]+)'

Tasks of lm-evaluation-harness, by name:                       add --tasks arc_easy,hellaswag

--help lists every option; --print_config prints them as YAML with their values."""


def main() -> int:
    def run(config: Config) -> None:
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        print(report.table(evaluate(config)))
        print(f"report: {Path(config.output) / 'report.html'}")

    return cli.main(run, Config, "trainer.evaluate", USAGE)


def evaluate(config: Config) -> dict:
    """The whole evaluation: its figures, as results.json holds them. Raises UserError for anything the user can mend."""
    validate(config)
    harness.require(config)
    vllm.require(config)
    output, device = Path(config.output), choose_device(config.device)
    report.refuse_used(output)
    files, models = read_files(config.data), find_models(config)
    completions = vllm.all_answers(models, files, config, device, output / "vllm.log") if config.generation.engine == "vllm" else {}
    scored: dict[str, Outcomes] = {}
    tasks: dict[str, dict] = {}
    for side in load_each(models, config, device):
        base = scored.get("base")
        scored[side.name] = score(side, files, config, base.base_states if base else None, remember=models.compared and base is None,
                                  completions=completions.get(side.name))
        tasks[side.name] = harness.run(side, config)
        print(f"scored {side.name}: {side.label}", flush=True)
    model, base = scored["model"], scored.get("base")
    results = {
        "model": model.label, "base": base.label if base else None, "confidence": config.statistics.confidence,
        "roles": figures_by_role(files, model, base, config.statistics), "files": figures_by_file(files, model, base, config.statistics),
        "tasks": harness.summarise(tasks, config), "notes": list(dict.fromkeys(note for side in scored.values() for note in side.notes)),
    }
    report.write(output, config, files, scored, tasks, results)
    return results


if __name__ == "__main__":
    sys.exit(main())
