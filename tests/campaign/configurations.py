"""Attack the options of every command: wrong types, infinities, odd paths, oddities of YAML."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from random import Random
from typing import Any

import yaml
from safetensors.torch import load_file

from synth.config import Config as SynthConfig
from tests.campaign.forked import Ended, complete
from tests.campaign.material import Material, without_report
from tests.campaign.odd_values import damaged, odd_number, odd_text, odd_value
from tests.campaign.oracle import Verdict, judge
from trainer.cli import known_keys
from trainer.config import Config
from trainer.evaluation.config import Config as EvaluationConfig
from trainer.evaluation.config import GateConfig
from trainer.interpolate import Interpolate

KINDS = {"trainer.run": Config, "trainer.evaluate": EvaluationConfig, "trainer.gate": GateConfig, "trainer.interpolate": Interpolate,
         "synth.run": SynthConfig}
MODULES = (*["trainer.run"] * 5, "trainer.evaluate", "trainer.gate", "trainer.interpolate", "synth.run")
SLOW = {"compile", "generation.engine", "load_in_4bit", "export.check"}  # valid values that take longer than a case may
ODDITIES = ("{key}:\n", "{key}: ~\n", "{key}: !!python/object:os.system x\n", "{key}: &a [*a]\n", "{key}: *none\n", "{key}: 1\n{key}: 2\n",
            "? [a, b]\n: 1\n", "{key}: 2024-01-01\n", "{key}: 0x1F\n", "{key}: 1_000\n", "{key}: 1:30\n", "{key}: .5\n", "{key}: yes\n",
            "{key}: !!binary aGk=\n", "{key}: !!set {{a, b}}\n", "{key}: |\n  x\n  y\n", "{key}: >-\n", "\t{key}: 1\n",
            "---\n{key}: 1\n---\n{key}: 2\n",
            "<<: {{{key}: 1}}\n", "\ufeff{key}: 1\n", "{key}: 1\r\n", "{key}: \"\\ud83d\"\n", "{key}: '\n", "{key} 1\n", "{key}: [1, 2\n",
            "{key}: {{{key}: {{{key}: 1}}}}\n", "a: &a [1]\nb: &b [*a, *a]\n{key}: [*b, *b, *b]\n", "config: {key}\n",
            "versions: 5\ncommand: [x]\n",
            "{key}: !!float nan\n", "{key}: 1e3\n", "{key}: \x00\n", "%YAML 9.9\n---\n{key}: 1\n", "null: {key}\n", "1: 2\n", "")


def attack(dice: Random, folder: Path, material: Material) -> Verdict:
    """Give a command one to three odd options, on the command line or in YAML."""
    module = dice.choice(MODULES)
    leaves = {key: kind for key, kind in known_keys(KINDS[module]).items() if not dataclasses.is_dataclass(kind) and key not in SLOW}
    trains = module == "trainer.run" and dice.random() < 0.3
    arguments = started(module, material, trains, dice.random() < 0.2)
    chosen = dice.sample(sorted(leaves), dice.choice((1, 1, 1, 2, 3)))
    if dice.random() < 0.45:
        path = folder / "options.yaml"
        path.write_bytes(yaml_of(dice, {key: value_for(dice, leaves[key]) for key in chosen}, sorted(known_keys(KINDS[module]))))
        arguments += ["--config", str(path)]
    else:
        for key in chosen:
            arguments += written(dice, key, value_for(dice, leaves[key]))
    prepare = Material.play_base if module == "synth.run" else without_report
    ended = complete(module, [argument.replace("\0", "") for argument in arguments], folder, prepare)
    return judge(ended, ruined(folder, ended), statuses=(1, 2, 3) if module == "trainer.gate" else (1, 2))


def started(module: str, material: Material, trains: bool, reports: bool) -> list[str]:
    """Return options with which a command ends well, and soon, unless it `trains` or `reports`."""
    if module == "trainer.run":
        return material.options("out", "--max_steps", "1") if trains else [*material.options("out"), "--dry_run", "true"]
    if module == "trainer.interpolate":
        return ["--model.path", str(material.model), "--adapter", str(material.adapter), "--output", "out"]
    if module == "synth.run":
        stages = "[probe, instruct, clean, respond, judge, select" + (", report]" if reports else "]")
        return ["--base.path", str(material.model), "--base.engine", "transformers", "--output", "out", "--stages", stages,
                "--probe.samples", "1", "--instruct.num_instructions", "6", "--instruct.reference_samples", "3",
                "--judge.exclude_self", "false", "--report.embeddings", "false", "--report.topics", "2"]
    return ["--model.path", str(material.model), "--adapter", str(material.adapter), "--data.general", str(material.items),
            "--output", "out", "--generation.max_tokens", "2", "--statistics.bootstrap", "100"]


def value_for(dice: Random, kind: Any) -> Any:
    """Return a value for an option: mostly of its type and extreme, else of any type."""
    kinds = {kind, *typing.get_args(kind)}
    if dice.random() < 0.35:
        return odd_value(dice)
    if kinds & {int, float}:
        return odd_number(dice)
    literals = [value for value in typing.get_args(kind) if isinstance(value, str)]
    if literals and dice.random() < 0.5:
        return dice.choice(literals)
    if list in {typing.get_origin(one) for one in kinds} | kinds:
        return [odd_value(dice, 1) for _ in range(dice.choice((0, 1, 2)))]
    return odd_text(dice)


def written(dice: Random, key: str, value: Any) -> list[str]:
    """Return an option as it may be typed."""
    text = value if isinstance(value, str) else yaml.safe_dump(plain(value), default_flow_style=True,
        width=10**9).removesuffix("\n...\n").strip()
    key = key.replace("_", "-") if dice.random() < 0.2 else key
    key = key + dice.choice(("s", "_", ".x", "=")) if dice.random() < 0.04 else key
    return dice.choice(([f"--{key}", text], [f"--{key}", text], [f"--{key}={text}"],
                        [f"--{key}"]) if dice.random() < 0.3 else ([f"--{key}", text],))


def yaml_of(dice: Random, options: dict[str, Any], keys: list[str]) -> bytes:
    """Return a YAML file of options by dotted name, in sections, sometimes with an oddity."""
    nested: dict[str, Any] = {}
    for key, value in options.items():
        *sections, last = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    if dice.random() < 0.5:
        text = yaml.safe_dump(plain(nested), allow_unicode=dice.random() < 0.5)
    else:
        key, oddity = dice.choice(keys), dice.choice(ODDITIES)
        *sections, last = key.split(".")
        indent = "  " * len(sections)
        head = "".join(f"{'  ' * i}{section}:\n" for i, section in enumerate(sections))
        text = head + "".join(indent + line for line in oddity.format(key=last).splitlines(keepends=True))
    content = text.encode("utf-8", "surrogatepass")
    return damaged(dice, content) if dice.random() < 0.1 else content


def plain(value: Any) -> Any:
    """Return a value that YAML can write: halves of surrogates as question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [plain(one) for one in value]
    return {plain(key): plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def ruined(folder: Path, ended: Ended) -> str | None:
    """Return which weights a run that ended well left that are no finite numbers."""
    for path in sorted(folder.glob("out/*/*.safetensors")) if not ended.status else ():
        for name, tensor in load_file(path).items():
            if not tensor.isfinite().all():
                return f"{path.name}: {name} is not finite"
    return None
