"""Pass or fail a model or an adapter against its base: `python -m trainer.gate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from trainer import cli
from trainer.errors import UserError, printable, require
from trainer.evaluate import evaluate
from trainer.evaluation import gate_report
from trainer.evaluation.config import DEFAULT_SUITE, GateConfig
from trainer.evaluation.gate_rules import Verdict, verdicts

FAILED = 3  # exit status, as of a run that missed its floor
USAGE = """\
usage: python -m trainer.gate --adapter ADAPTER [--data.general suite:NAME] [--data.domain FILE] [--section.option value ...]
       python -m trainer.gate --model.path TUNED --base.path BASE [--section.option value ...]

Scores a model and its base as trainer.evaluate does, and ends with PASS (status 0) or FAIL (status 3): no general file may lose more than
its interval or by McNemar's test, answers must end as before, and domain files must gain. Leaves gate.md for a pull request, gate.json
and gate.html.

The most common commands:
  python -m trainer.gate --adapter runs/first/adapter                                        on the bundled suite:mini, offline
  python -m trainer.gate --adapter someone/their-lora --data.general suite:core --data.domain domain.jsonl
  python -m trainer.gate --model.path merged --base.path original && cat runs/gate/gate.md >> "$GITHUB_STEP_SUMMARY"

--help lists every option; --print_config prints them as YAML with their values."""


def main() -> int:
    def run(config: GateConfig) -> int:
        results, found = judge(config)
        print(printable(gate_report.text(results, found)))
        print(f"report: {Path(config.output) / 'gate.html'}")
        return 0 if gate_report.passed(found) else FAILED

    return cli.main(run, GateConfig, "trainer.gate", USAGE)


def judge(config: GateConfig) -> tuple[dict, list[Verdict]]:
    """Evaluate a model and its base, write the verdict, and return the figures and every rule's verdict.

    Raises UserError for any mistake that the user can correct, and if no rule applies.
    """
    require(config.gate.logprob_margin >= 0, "gate.logprob_margin", "0 or more", config.gate.logprob_margin)
    require(config.adapter is not None or config.base.path is not None, "adapter, base.path", "an adapter, or a base beside model.path",
            "neither")
    if not config.data.general and not config.tasks:
        config = replace(config, data=replace(config.data, general=DEFAULT_SUITE))
    results = evaluate(config)
    found = verdicts(results, config)
    if not found:
        raise UserError("data.general: expected items whose answers are right or wrong, or texts that base and model spell alike; found "
                        "nothing that a rule judges")
    gate_report.write(Path(config.output), results, found)
    return results, found


if __name__ == "__main__":
    sys.exit(main())
