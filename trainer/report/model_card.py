"""Write the README.md of an export, which is the hub's model card.

It has base, data, method, what was learnt and kept, and how to load it.
It says only what the run measured, and names no path of this machine.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError

from trainer.config import Config
from trainer.errors import one_line, printable
from trainer.files import atomic_file
from trainer.model.own_files import is_own
from trainer.model.serving import highest_rank, max_lora_rank, why_vllm_refuses
from trainer.report.page import duration, number
from trainer.report.run_page import exported_state
from trainer.report.run_records import Run

CARD = "README.md"
CACHED = re.compile(r"/models--([\w.-]+)/snapshots/")  # in paths of the hub's cache
LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Export:
    """An exported folder, and the base under it."""

    folder: Path
    base: str | None  # folder or hub name; None: it was trained from random weights
    config: Config

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    @cached_property
    def settings(self) -> dict:
        """Return an adapter's saved configuration."""
        return json.loads((self.folder / "adapter_config.json").read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        """Return its name on the hub, or else that of the run's folder."""
        return self.config.export.push_to_hub or self.folder.absolute().parent.name

    @property
    def base_name(self) -> str | None:
        """Return the base's name as a card has it: on the hub, or its folder's own, without the path."""
        return self.hub_base or (self.base and printable(Path(self.base).name))

    @property
    def hub_base(self) -> str | None:
        """Return the base's name on the hub, also of a folder in the hub's cache; None for other folders."""
        if self.base is None or not Path(self.base).exists():
            return self.base
        cached = CACHED.search(Path(self.base).absolute().as_posix())
        return cached and cached[1].replace("--", "/")


def write_card(export: Export, run: Run) -> None:
    """Write README.md into an exported folder, in the place of PEFT's. Lets an OSError through."""
    with atomic_file(export.folder / CARD) as tmp:
        tmp.write_text(card(export, run, base_metadata(export.base)), encoding="utf-8")


def base_metadata(base: str | None) -> dict:
    """Return the metadata of a base's own model card.

    They are empty where there is none, or the hub cannot be asked.
    """
    if base is None:
        return {}
    try:
        path = Path(base) / CARD if Path(base).exists() else Path(hf_hub_download(base, CARD))
        return (metadata_load(path) or {}) if is_own(path.parent, path) else {}
    except (OSError, ValueError, EntryNotFoundError, yaml.YAMLError):  # the hub's errors of connection are OSErrors
        return {}


def card(export: Export, run: Run, of_base: dict) -> str:
    """Return the text of a model card."""
    sections = [introduction(export, run, of_base), results(run), data(run), method(export, run), use(export)]
    return f"---\n{metadata(export, run, of_base)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def metadata(export: Export, run: Run, of_base: dict) -> str:
    """Return the YAML that the hub reads. The licence is the base's."""
    licence = {key: of_base[key] for key in LICENCE if isinstance(of_base.get(key), str)}
    return ModelCardData(
        base_model=export.hub_base, library_name="peft" if export.is_adapter else "transformers",
        pipeline_tag="text-generation", tags=["lora", "sft"] if export.is_adapter else ["sft"],
        language=of_base.get("language"), **licence).to_yaml()


def introduction(export: Export, run: Run, of_base: dict) -> str:
    """Return title and first paragraph."""
    kind = f"A LoRA adapter of rank {highest_rank(export.settings)}" if export.is_adapter else "A model with all its weights"
    trained = ", ".join(dict.fromkeys(printable(str(source["name"])) for source in run.sources if source.get("role") == "domain"))
    of = "trained from random weights" if export.base is None else f"fine-tuned from {_linked(export)}"
    licence = of_base.get("license")
    right = (f"It has the licence of its base: {printable(str(of_base.get('license_name') or licence))}." if licence else
             "The licence of its base applies to it too; the base's card, which would name it, could not be read." if export.base else "")
    return f"# {export.name.rpartition('/')[2]}\n\n{kind}, {of}{' on ' + trained if trained else ''}. {right}".rstrip()


def _linked(export: Export) -> str:
    return f"[{export.hub_base}](https://huggingface.co/{export.hub_base})" if export.hub_base else f"`{export.base_name}`, a local model,"


def results(run: Run) -> str:
    """Return what was learnt and what was kept, as far as the run measured it."""
    lines = []
    losses = [record for record in run.evaluations if isinstance(record.get("loss"), float)]
    if len(losses) > 1:
        lines.append(f"- Loss on held-out text: {losses[0]['loss']:.3f} nats a token before training, {losses[-1]['loss']:.3f} after "
                     f"({number(losses[-1]['tokens'])} tokens).")
    measured = exported_state(run) or (run.forgetting[-1] if run.forgetting else None)
    for role, what in (("domain", "What was learnt"), ("general", "What was kept")):
        if measured and measured.get(role) is not None and measured.get(f"{role}_base") is not None:
            low, high = measured.get(f"{role}_interval") or (None, None)
            interval = f" (95% interval {low:.1%} to {high:.1%})" if low is not None else ""
            lines.append(f"- {what}: {measured[role]:.1%} of the {role} items are right{interval}, {measured[f'{role}_base']:.1%} before. "
                         f"{number(measured[f'{role}_lost'])} were forgotten, {number(measured[f'{role}_gained'])} gained.")
    if not (measured and "general" in measured):
        lines.append("- What it forgot of the rest was not measured.")
    return "## Results\n\n" + "\n".join(lines)


def data(run: Run) -> str:
    """Return the table of sources."""
    if not run.sources:
        return ""
    rows = [f"| {_cell(source['name'])} | {source['role']} | {number(source['samples'])} | {source['share_tokens']:.1%} |"
            for source in run.sources]
    note = "\n\nReplay is general data, mixed in so that the model keeps what it could do." if any(
        source["role"] == "replay" for source in run.sources) else ""
    return "\n".join(["## Data", "", "| source | role | samples | share of tokens |", "| --- | --- | ---: | ---: |", *rows]) + note


def _cell(text: str) -> str:
    return one_line(str(text)).replace("|", "\\|")


def method(export: Export, run: Run) -> str:
    """Return how it was trained."""
    config, optim, end = export.config, export.config.optim, run.end or {}
    how = {"lora": "LoRA", "qlora": "QLoRA (the base in 4 bits)", "full": "All weights"}[config.method]
    if export.is_adapter and config.lora.path is None:
        how += f", rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    steps = f"{number(end['steps'])} steps" if "steps" in end else f"{config.epochs:g} passes"
    took = f", {duration(end['seconds'])}" if isinstance(end.get("seconds"), float) else ""
    lines = [f"- {how}; {steps} of at most {number(config.batch.tokens_per_step)} tokens, {config.epochs:g} passes over the domain "
             f"planned{took}.",
             f"- {optim.name}, peak learning rate {optim.lr:g}, schedule {optim.lr_scheduler}; "
             f"supervised: {config.data.train_on} turns; samples of at most {number(config.data.max_length)} tokens."]
    if config.retention.kl_weight:
        lines.append(f"- KL to the base, weight {config.retention.kl_weight:g}, on {config.retention.kl_sources} tokens.")
    if config.retention.token_weighting != "none":
        lines.append(f"- Token weighting: {config.retention.token_weighting}.")
    found = ", ".join(f"{name} {version}" for name, version in run.versions.items() if isinstance(version, str) and len(version) < 40)
    return "\n".join(["## Training", "", *lines, f"- Seed {config.seed}; {found or 'versions unknown'}."])


def _in_vllm(export: Export) -> str:
    """Return how vLLM serves an adapter."""
    if reason := why_vllm_refuses(export.settings):
        return f"vLLM cannot serve the adapter, as {reason}; merge it into the base first."
    return ("With vLLM, which then has the model `tuned`:\n"
            f"`vllm serve {export.base_name} --enable-lora --lora-modules tuned={export.config.export.push_to_hub or '.'} --max-lora-rank "
            f"{max_lora_rank(export.settings)}`.")


def use(export: Export) -> str:
    """Return how to load it: by its name on the hub, or in its folder."""
    name = export.config.export.push_to_hub or "."
    if not export.is_adapter:
        return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With vLLM: `vllm serve {name}`. With Ollama: `FROM .` in a Modelfile in this folder, then `ollama create NAME`."""
    return f"""## Use

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{_in_vllm(export)}

With Ollama: `FROM` the base and `ADAPTER .` in a Modelfile in this folder, then `ollama create NAME` (Llama, Mistral and Gemma)."""

