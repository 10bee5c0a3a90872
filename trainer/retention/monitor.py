"""Measure forgetting during a run, and choose the state to export if there is a floor.

General and domain items with known answers are scored as `trainer.evaluate` scores them, beside the base: before the first step, every
`forgetting.every` steps and after the last. The base is scored once, before training or a checkpoint changes any weight. With r the number
of general items that are answered right, over all files, and the floor a share of the base's accuracy:

    a state holds the floor   ⟺   r(state) ≥ forgetting.floor · r(base)

Of the measured states that hold the floor, the best on the domain is exported, the later in a tie. It is the best by accuracy on the domain
items, without them by their log-prob per token, without that by eval loss, else the latest. If none holds the floor, a warning is printed,
the state nearest to it is exported, and the command ends with status 3.

A run stops after `forgetting.patience` measurements in a row, in its second half, that miss the floor and are no nearer to it than the one
before. The first half does not count, as accuracy that a high learning rate costs comes back while the rate decays (the curve of
`python -m benchmarks.run floor`).

Scoring draws no random numbers and changes no state of the model: a run's weights are bit-identical with and without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from trainer import config as training
from trainer.checksums import verify_checksum, write_checksum
from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError
from trainer.evaluation import config as evaluation
from trainer.evaluation.changed_items import changed_items
from trainer.evaluation.items import ItemFile, read_files
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.results import figures_by_role
from trainer.evaluation.score_items import Outcomes, score
from trainer.files import atomic_folder
from trainer.metrics.log import Log
from trainer.model.lora import adapted_layers, adapters_disabled
from trainer.optim.adamw import FlatAdamW, check_layout
from trainer.report.answers import Answers
from trainer.runtime import checkpoint
from trainer.runtime.distributed import Distributed

OPTION_NAMES = {  # option of trainer.evaluate -> ours
    "data.general": "forgetting.general", "data.domain": "forgetting.domain", "data.metric": "forgetting.metric",
    "data.regex": "forgetting.regex", "generation.max_tokens": "forgetting.max_tokens",
}


# ---------------------------------------------------------------- before the run


def as_evaluation(config: training.Config) -> evaluation.Config:
    """Return the options of a run as options of trainer.evaluate.

    Held-out texts longer than the model's context are truncated, with a note.
    """
    forgetting = config.forgetting
    return evaluation.Config(
        model=config.model, precision=config.precision, generation=evaluation.Generation(max_tokens=forgetting.max_tokens),
        data=evaluation.Data(general=forgetting.general, domain=forgetting.domain, metric=forgetting.metric, regex=forgetting.regex,
                             chat_template=config.data.chat_template, on_overlong="truncate"))


def read(config: training.Config) -> list[ItemFile]:
    """Read the item files, general ones first; none if none are named.

    Raises UserError, which names the file, the line and the remedy, if a file does not fit.
    """
    if not config.forgetting.general:
        return []
    try:
        evaluation_config = as_evaluation(config)
        evaluation.validate(evaluation_config)
        files = read_files(evaluation_config.data)
    except UserError as error:
        raise UserError(_with_our_option_names(str(error))) from None
    if config.forgetting.floor is not None and all(file.metric == "logprob" for file in files if file.role == "general"):
        raise UserError("forgetting.floor: expected general items whose answers are right or wrong, found only held-out text in "
                        "forgetting.general; add items with answers or choices, or remove forgetting.floor")
    return files


def _with_our_option_names(message: str) -> str:
    """Return an error message of trainer.evaluate with the option names of a run."""
    for theirs, ours in OPTION_NAMES.items():
        message = message.replace(theirs, ours)
    return message


def fingerprint(files: Sequence[ItemFile]) -> str | None:
    """Return a hash of the items for checkpoints: a run resumes only with the items it began with."""
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16] if files else None


def prepare(config: training.Config, files: Sequence[ItemFile], model: nn.Module, template: ChatTemplate,
            dist: Distributed) -> ForgettingMonitor | None:
    """Return the monitor of these items, None without items; score the base now, on rank 0."""
    monitor = unscored(config, files, model, template)
    if monitor:
        dist.on_main(monitor.score_base)
    return monitor


def unscored(config: training.Config, files: Sequence[ItemFile], model: nn.Module, template: ChatTemplate) -> ForgettingMonitor | None:
    """Return a monitor of these items that can choose and restore states but not score any.

    Returns None without items.
    """
    return ForgettingMonitor(config, Path(config.output), files, as_evaluation(config),
                             LoadedModel("model", "the trained model", model, template)) if files else None


# ---------------------------------------------------------------- during the run


@dataclass
class ForgettingMonitor:
    """The items of a run, the options to score them with, and the base's outcomes (on rank 0 only)."""

    config: training.Config
    folder: Path
    files: Sequence[ItemFile]
    evaluation_config: evaluation.Config
    loaded: LoadedModel
    base: Outcomes | None = None
    exported_outcomes: Outcomes | None = None  # of the state to export; None where this process did not score it
    remedy: str = "add replay, raise retention.kl_weight, or lower optim.lr"  # against a missed floor

    @property
    def floor(self) -> float | None:
        return self.config.forgetting.floor

    @property
    def needs_eval_loss(self) -> bool:
        """Return whether the eval loss measures the domain, as there are no domain items."""
        return all(file.role == "general" for file in self.files)

    def score_base(self) -> None:
        """Score the model before it is trained, without its adapter.

        Raises UserError if there is a floor and the base answers no general item right.
        """
        with evaluation_mode(self.loaded.model, self.config.compile), adapters_disabled(adapted_layers(self.loaded.model)):
            try:
                self.base = score(replace(self.loaded, name="base", label="the base"), self.files, self.evaluation_config, remember=True)
            except UserError as error:
                raise UserError(_with_our_option_names(str(error))) from None
        if self.config.method == "full":  # training changes the head, so a copy is kept, on the host between measurements
            self._move_base_head(torch.device("cpu"), copy=True)
        if self.floor is not None and not self._right(self.base):
            raise UserError(f"forgetting.floor: expected general items of which the base answers some right, got 0 of "
                            f"{self._judged(self.base)}; raise forgetting.max_tokens if answers are cut off, "
                            "or check forgetting.metric")

    def describe(self) -> list[str]:
        """Return the console lines at the start of a run, on rank 0."""
        forgetting = self.config.forgetting
        any_judged = any(outcome.right is not None for outcome in self.base.items.values())
        when = f"every {forgetting.every} steps" if forgetting.every else "before the first step and after the last"
        lines = [f"forgetting: {len(self.base.items):,} items, measured {when}"
                 + (f"; the base answers {self._right(self.base):,} of {self._judged(self.base):,} general items right"
                    if any_judged else "")]
        if self.floor is not None:
            lines.append(f"forgetting: exports the best state with at least {self.floor * self._right(self.base):.4g} general items right")
            if forgetting.patience:
                lines.append(f"forgetting: in its second half the run stops after {forgetting.patience} measurements in a row that miss "
                             "the floor and come no nearer to it")
        return lines + [f"forgetting: {note}" for note in self.base.notes]

    def measure(self, state: checkpoint.State, optimizer: FlatAdamW, eval_loss: float | None, total: int, log: Log) -> None:
        """Score the model into the log and `state`; keep its weights if it is the best so far. On rank 0.

        `total` is the number of the run's steps.
        """
        untrained = state.step == 0 and self.config.lora.path is None
        outcomes = self.base if untrained else self._score()
        record = self._record(state.step, outcomes, eval_loss)
        previous, state.last_measurement = state.last_measurement, record
        kept = state.kept_measurement
        best = self.floor is not None and state.step > 0 and (kept is None or _rank(record) >= _rank(kept))
        if best or self.floor is None:
            self.exported_outcomes = outcomes
        if best:
            state.kept_measurement = record
            self._keep(state.step, None if state.step == total else optimizer)
        if self.floor is not None:
            nearer = previous is not None and record["general"] > previous["general"]
            state.floor_misses = 0 if record["holds_floor"] or nearer or 2 * state.step < total else state.floor_misses + 1
        log.write(record | ({"best": best} if self.floor is not None else {}))

    def given_up(self, state: checkpoint.State) -> bool:
        patience = self.config.forgetting.patience
        return self.floor is not None and 0 < patience <= state.floor_misses

    def exported(self, state: checkpoint.State) -> dict | None:
        """Return the measurement of the state that is exported."""
        return state.last_measurement if self.floor is None else state.kept_measurement

    def changed_items(self) -> list[Answers]:
        """Return the answers to the items that the exported state forgot and gained.

        There are none where this process did not score that state.
        """
        return changed_items(self.files, self.base, self.exported_outcomes) if self.base and self.exported_outcomes else []

    # ------------------------------------------------------------ scoring

    def _score(self) -> Outcomes:
        model = self.loaded.model
        self._move_base_head(next(model.parameters()).device)
        with evaluation_mode(model, self.config.compile):
            outcomes = score(self.loaded, self.files, self.evaluation_config, self.base.base_states)
        if self.config.method == "full":
            self._move_base_head(torch.device("cpu"))
        return outcomes

    def _move_base_head(self, device: torch.device, copy: bool = False) -> None:
        """Move the base's head to a device in full fine-tuning; with an adapter it is the model's own head."""
        head = self.base.base_states.head
        if self.config.method == "full":
            weight, bias = (None if t is None else t.detach().to(device, copy=copy) for t in (head.weight, head.bias))
            self.base.base_states.head = head._replace(weight=weight, bias=bias)

    def _general_marks(self, outcomes: Outcomes) -> list[bool]:
        return [o.right for key, o in outcomes.items.items() if self.files[key.file].role == "general" and o.right is not None]

    def _right(self, outcomes: Outcomes) -> int:
        return sum(self._general_marks(outcomes))

    def _judged(self, outcomes: Outcomes) -> int:
        return len(self._general_marks(outcomes))

    def _record(self, step: int, outcomes: Outcomes, eval_loss: float | None) -> dict:
        """Return the record of a measurement.

        Of each role it has the accuracy with its interval, the number of right items over the base's, the items forgotten and gained,
        KL(base || model) and log-prob in nats per token; of each file the accuracy.
        """
        record: dict = {"kind": "forgetting", "step": step}
        for role, role_figures in figures_by_role(self.files, outcomes, self.base, self.evaluation_config.statistics).items():
            model, base, change = role_figures["model"], role_figures["base"], role_figures["change"]
            figures = {"": model.get("accuracy"), "interval": model.get("accuracy_interval"), "base": base.get("accuracy"),
                       "retained": change.get("retention"), "lost": change.get("lost"), "gained": change.get("gained"),
                       "kl": 0.0 if outcomes is self.base else change.get("kl_per_token"), "logprob": model.get("logprob_per_token")}
            record |= {f"{role}_{name}".rstrip("_"): value for name, value in figures.items() if value is not None}
        marks = {file.name: [o.right for o in outcomes.of_file(f) if o.right is not None] for f, file in enumerate(self.files)}
        record["files"] = {name: sum(of_file) / len(of_file) for name, of_file in marks.items() if of_file}
        if eval_loss is not None:
            record["heldout_loss"] = eval_loss
        if self.floor is not None:
            record |= {"floor": self.floor, "holds_floor": self._right(outcomes) >= self.floor * self._right(self.base) - 1e-9}
        return record

    # ------------------------------------------------------------ kept states

    def _place(self, step: int) -> Path:
        return self.folder / "kept" / f"step-{step:08d}"

    def _keep(self, step: int, optimizer: FlatAdamW | None) -> None:
        """Write the weights, and remove the kept states that nothing refers to.

        Without an optimizer nothing is written: the last state of a run is in memory.
        """
        if optimizer is not None:
            with atomic_folder(self._place(step)) as tmp:
                save_file({f"{i}": group.master.data for i, group in enumerate(optimizer.groups)}, tmp / "weights.safetensors")
                write_checksum(tmp / "weights.safetensors")
        self._forget_all_but(step)

    def _forget_all_but(self, *steps: int) -> None:
        checkpoint.remove_all_but(self.folder / "kept", {*steps, *checkpoint.kept_steps(self.folder / "checkpoints")})

    def restore(self, state: checkpoint.State, optimizer: FlatAdamW) -> None:
        """Load the weights to export into the model, and print which. Raises UserError if they are unreadable."""
        if self.floor is None:
            return
        print(self._chosen_line(state), flush=True)
        step = state.kept_measurement["step"]
        if step == state.step:
            return
        file = self._place(step) / "weights.safetensors"
        try:
            verify_checksum(file)
            tensors = load_file(file)
            check_layout(tensors, {f"{i}": group.master for i, group in enumerate(optimizer.groups)})
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"forgetting: cannot read {file}, the state of step {step} that was kept: {error}; restore it from a copy, "
                            "or train again in another output folder") from None
        with torch.no_grad():
            for i, group in enumerate(optimizer.groups):
                group.master.data.copy_(tensors[f"{i}"])
        optimizer.publish()

    def clean(self) -> None:
        """Remove the kept states after the export, except those that a checkpoint refers to."""
        self._forget_all_but()

    def _chosen_line(self, state: checkpoint.State) -> str:
        kept = state.kept_measurement
        figures = f"general {kept['general']:.1%}, {kept['general_retained']:.1%} of the base's"
        figures += f"; domain {kept['domain']:.1%}" if "domain" in kept else ""
        if kept["holds_floor"]:
            return f"forgetting: exporting step {kept['step']} of {state.step}, the best of those that hold the floor: {figures}"
        return (f"forgetting: WARNING: no measured state held the floor of {self.floor:.1%}; exporting step {kept['step']} of "
                f"{state.step}, the nearest to it: {figures}; to hold it, {self.remedy}")


def _rank(record: dict) -> tuple:
    """Return a sort key of measurements: by the domain if they hold the floor, else by general accuracy."""
    domain = next((record[name] for name in ("domain", "domain_logprob") if name in record), None)
    if domain is None:
        domain = -record["heldout_loss"] if "heldout_loss" in record else record["step"]
    return (1, domain, record["general"]) if record["holds_floor"] else (0, record["general"], domain)


@contextmanager
def evaluation_mode(model: nn.Module, compiled: bool) -> Iterator[None]:
    """Put the model into evaluation mode for a while, with uncompiled layers.

    Each generated token makes the key-value cache longer, which would recompile them.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.train(was_training)
