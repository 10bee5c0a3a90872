"""Score a model on item files, compare it with its base, and report: `python -m trainer.evaluate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from trainer import cli
from trainer.errors import one_line, printable
from trainer.evaluation import base_results, harness, report, vllm
from trainer.evaluation.config import Config, validate, with_default_suite
from trainer.evaluation.items import read_files
from trainer.evaluation.models import find_models, load_each
from trainer.evaluation.results import figures_by_file, figures_by_role
from trainer.evaluation.score_items import Outcomes, score
from trainer.files import sole_owner
from trainer.runtime.device import choose_device

USAGE = """\
usage: python -m trainer.evaluate --model.path MODEL --data.general FILE [--data.domain FILE] [--section.option value ...]
       python -m trainer.evaluate --config evaluation.yaml [--section.option value ...]

Scores a model on item files and suites: exact answers, choices, answers found by a pattern or judged by rules, log-probs of text.
Compared with its base it counts the items that were forgotten and gained, and measures the KL between the two.

The most common commands:
  python -m trainer.evaluate --adapter runs/first/adapter --data.general general.jsonl --data.domain domain.jsonl
  python -m trainer.evaluate --model.path tuned --base.path original --data.general general.jsonl
  python -m trainer.evaluate --adapter runs/first/adapter --data.general suite:core          benchmarks that papers report
  python -m trainer.evaluate --adapter runs/first/adapter                                    the bundled suite:mini, offline
  python -m trainer.evaluate --adapter runs/second/adapter --base.results runs/evaluation    the base's figures of an earlier evaluation
  python -m trainer.evaluate --model.path my-model --data.domain gsm8k_test.jsonl --data.regex '#### (-?[\\d,.]+)'

Tasks of lm-evaluation-harness, by name:                       add --tasks arc_easy,hellaswag

--help lists every option; --print_config prints them as YAML with their values."""


def main() -> int:
    def run(config: Config) -> None:
        print(printable(report.table(evaluate(config))))
        print(f"report: {Path(config.output) / 'report.html'}")

    return cli.main(run, Config, "trainer.evaluate", USAGE)


def evaluate(config: Config) -> dict:
    """Run the whole evaluation and return its figures, as in results.json.

    Raises UserError for any mistake that the user can correct.
    """
    config = with_default_suite(config)
    validate(config)
    harness.require(config)
    vllm.require(config)
    output, device = Path(config.output), choose_device(config.device)
    with sole_owner(output, "evaluation"):
        report.refuse_used(output)
        return _evaluate(config, output, device)


def _evaluate(config: Config, output: Path, device: torch.device) -> dict:
    """Score the models on the items and write the figures."""
    files, models = read_files(config.data), find_models(config)
    known = base_results.read_base(files, (models.base or models.model).path, config) if config.base.results else None
    use_vllm = config.generation.engine == "vllm"
    to_generate = replace(models, base=None, base_is_adapter_off=False) if known else models
    completions = vllm.generate_all(to_generate, files, config, device, output / "vllm.log") if use_vllm else {}
    scored: dict[str, Outcomes] = {}
    tasks: dict[str, dict] = {}
    for loaded in load_each(models, config, device):
        base = scored.get("base")
        if known and base is None:
            scored[loaded.name] = base_results.recall(loaded, files, config, known)
            continue
        scored[loaded.name] = score(loaded, files, config, base.base_states if base else None, remember=models.compared and base is None,
                                    completions=completions.get(loaded.name))
        tasks[loaded.name] = harness.run_tasks(loaded, config)
        print(f"scored {loaded.name}: {one_line(loaded.label)}", flush=True)
    model, base = scored["model"], scored.get("base")
    results = {
        "model": model.label, "base": base.label if base else None, "confidence": config.statistics.confidence,
        "roles": figures_by_role(files, model, base, config.statistics), "files": figures_by_file(files, model, base, config.statistics),
        "tasks": harness.task_figures(tasks, config),
        "notes": list(dict.fromkeys(note for outcomes in scored.values() for note in outcomes.notes)),
    }
    report.write(output, config, files, scored, tasks, results)
    return results


if __name__ == "__main__":
    sys.exit(main())
