"""Measure forgetting during a run, and choose the state to export where there is a floor to the accuracy that must remain.

General and domain items with known answers are scored as `trainer.evaluate` scores them, beside the base: before the first step, every
`forgetting.every` steps and after the last. The base is scored once, before training or a checkpoint changes any weight. With r the number
of general items that are answered right, over all files,

    a state holds the floor   ⟺   r(state) ≥ forgetting.floor · r(base)

Of the measured states that hold it the best on the domain is exported, the later of equals: by accuracy on the domain items, else by their
log-prob per token, else by held-out loss, else the latest. Where none holds it that is said, the one nearest to it is exported, and the
command ends with status 3.

A run stops after `forgetting.patience` measurements in a row, in its second half, that missed the floor and came no nearer to it than the
one before. The first half does not count, as accuracy that a high learning rate costs comes back while the rate decays (the curve of
`python -m benchmarks.run floor`).

Scoring draws no random number and leaves the model as it was: measured or not, a run computes the same weights.
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
from trainer.data.chat_template import ChatTemplate
from trainer.errors import UserError
from trainer.evaluation import config as evaluation
from trainer.evaluation.items import ItemFile, read_files
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.results import figures_by_role
from trainer.evaluation.score_items import Outcomes, score
from trainer.files import atomic_folder
from trainer.metrics.log import Log
from trainer.model.lora import adapted_layers, adapters_disabled
from trainer.optim.adamw import FlatAdamW
from trainer.runtime import checkpoint
from trainer.runtime.distributed import Distributed

HERE = {"data.general": "forgetting.general", "data.domain": "forgetting.domain", "data.metric": "forgetting.metric",
        "data.regex": "forgetting.regex", "generation.max_tokens": "forgetting.max_tokens"}  # options of trainer.evaluate -> ours


# ---------------------------------------------------------------- before the run


def as_evaluation(config: training.Config) -> evaluation.Config:
    """The options of a run, as trainer.evaluate has them. Held-out texts longer than the model's context are cut off, and it is said."""
    forgetting = config.forgetting
    return evaluation.Config(
        model=config.model, precision=config.precision, generation=evaluation.Generation(max_tokens=forgetting.max_tokens),
        data=evaluation.Data(general=forgetting.general, domain=forgetting.domain, metric=forgetting.metric, regex=forgetting.regex,
                             chat_template=config.data.chat_template, on_overlong="truncate"))


def read(config: training.Config) -> list[ItemFile]:
    """The item files, general ones first; none where none are named. UserError names the file, line and remedy."""
    if not config.forgetting.general:
        return []
    try:
        how = as_evaluation(config)
        evaluation.validate(how)
        files = read_files(how.data)
    except UserError as error:
        raise UserError(_named_as_here(str(error))) from None
    if config.forgetting.floor is not None and all(file.metric == "logprob" for file in files if file.role == "general"):
        raise UserError("forgetting.floor: expected general items whose answers are right or wrong, found held-out text alone in "
                        "forgetting.general; add items with answers or choices, or leave the floor out")
    return files


def _named_as_here(message: str) -> str:
    for theirs, ours in HERE.items():
        message = message.replace(theirs, ours)
    return message


def fingerprint(files: Sequence[ItemFile]) -> str | None:
    """What tells these items from others, for checkpoints: a run goes on only with the items it began with."""
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16] if files else None


def prepare(config: training.Config, files: Sequence[ItemFile], model: nn.Module, template: ChatTemplate,
            dist: Distributed) -> ForgettingMonitor | None:
    """What scores these items during a run; the base is scored now, on rank 0. None without items."""
    if not files:
        return None
    watch = ForgettingMonitor(config, Path(config.output), files, as_evaluation(config),
                              LoadedModel("model", "the trained model", model, template))
    dist.on_main(watch.score_base)
    return watch


# ---------------------------------------------------------------- during the run


@dataclass
class ForgettingMonitor:
    """The items of a run, how they are scored, and what the base made of them. Rank 0 alone has a base."""

    config: training.Config
    folder: Path
    files: Sequence[ItemFile]
    how: evaluation.Config
    side: LoadedModel
    base: Outcomes | None = None

    @property
    def floor(self) -> float | None:
        return self.config.forgetting.floor

    @property
    def wants_loss(self) -> bool:
        """Whether the held-out loss stands for the domain, as no items do."""
        return all(file.role == "general" for file in self.files)

    def score_base(self) -> None:
        """Score the model before it is trained, without its adapter. UserError where that leaves a floor nothing to hold."""
        with at_rest(self.side.model, self.config.compile), adapters_disabled(adapted_layers(self.side.model)):
            try:
                self.base = score(replace(self.side, name="base", label="the base"), self.files, self.how, remember=True)
            except UserError as error:
                raise UserError(_named_as_here(str(error))) from None
        if self.config.method == "full":  # the head is trained, so its values are kept, on the host between measurements
            self._head_on(torch.device("cpu"), copy=True)
        if self.floor is not None and not self._right(self.base):
            raise UserError(f"forgetting.floor: expected general items of which the base answers some right, got 0 of "
                            f"{self._judged(self.base)}; raise forgetting.max_tokens if answers are cut off, or see how items are scored")

    def describe(self) -> list[str]:
        """What a run says of it when it starts, on rank 0."""
        forgetting, marks = self.config.forgetting, [o.right for o in self.base.items.values() if o.right is not None]
        when = f"every {forgetting.every} steps" if forgetting.every else "before the first step and after the last"
        lines = [f"forgetting: {len(self.base.items):,} items, measured {when}"
                 + (f"; the base answers {self._right(self.base):,} of {self._judged(self.base):,} general ones right" if marks else "")]
        if self.floor is not None:
            lines.append(f"forgetting: the best state with {self.floor * self._right(self.base):.4g} right ones or more is exported")
            if forgetting.patience:
                lines.append(f"forgetting: in its second half the run stops after {forgetting.patience} measurements in a row that miss "
                             "the floor and come no nearer to it")
        return lines + [f"forgetting: {note}" for note in self.base.notes]

    def measure(self, state: checkpoint.State, optimizer: FlatAdamW, heldout_loss: float | None, total: int, log: Log) -> None:
        """Score the model into the log and `state`, of `total` steps; its weights are kept where it is the best so far. On rank 0."""
        untrained = state.step == 0 and self.config.lora.path is None
        record = self._record(state.step, self.base if untrained else self._score(), heldout_loss)
        before, state.last_measurement = state.last_measurement, record
        kept = state.kept_measurement
        best = self.floor is not None and state.step > 0 and (kept is None or _rank(record) >= _rank(kept))
        if best:
            state.kept_measurement = record
            self._keep(state.step, None if state.step == total else optimizer)
        if self.floor is not None:
            nearer = before is not None and record["general"] > before["general"]
            state.floor_misses = 0 if record["holds_floor"] or nearer or 2 * state.step < total else state.floor_misses + 1
        log.write(record | ({"best": best} if self.floor is not None else {}))

    def given_up(self, state: checkpoint.State) -> bool:
        patience = self.config.forgetting.patience
        return self.floor is not None and 0 < patience <= state.floor_misses

    def exported(self, state: checkpoint.State) -> dict | None:
        """The measurement of the state that a run leaves."""
        return state.last_measurement if self.floor is None else state.kept_measurement

    # ------------------------------------------------------------ scoring

    def _score(self) -> Outcomes:
        model = self.side.model
        self._head_on(next(model.parameters()).device)
        with at_rest(model, self.config.compile):
            found = score(self.side, self.files, self.how, self.base.base_states)
        if self.config.method == "full":
            self._head_on(torch.device("cpu"))
        return found

    def _head_on(self, device: torch.device, copy: bool = False) -> None:
        """Move the base's head, where the run has a copy of it. (An adapter's base has the very head of the model.)"""
        head = self.base.base_states.head
        if self.config.method == "full":
            weight, bias = (None if t is None else t.detach().to(device, copy=copy) for t in (head.weight, head.bias))
            self.base.base_states.head = head._replace(weight=weight, bias=bias)

    def _general(self, outcomes: Outcomes) -> list[bool]:
        return [o.right for key, o in outcomes.items.items() if self.files[key.file].role == "general" and o.right is not None]

    def _right(self, outcomes: Outcomes) -> int:
        return sum(self._general(outcomes))

    def _judged(self, outcomes: Outcomes) -> int:
        return len(self._general(outcomes))

    def _record(self, step: int, outcomes: Outcomes, heldout_loss: float | None) -> dict:
        """A flat record: of each role accuracy with its interval, the share of the base's right answers that it comes to, items lost and
        gained, KL(base || model) and log-prob in nats per token; of each file its accuracy.
        """
        record: dict = {"kind": "forgetting", "step": step}
        for role, found in figures_by_role(self.files, outcomes, self.base, self.how.statistics).items():
            model, base, change = found["model"], found["base"], found["change"]
            figures = {"": model.get("accuracy"), "interval": model.get("accuracy_interval"), "base": base.get("accuracy"),
                       "retained": change.get("retention"), "lost": change.get("lost"), "gained": change.get("gained"),
                       "kl": 0.0 if outcomes is self.base else change.get("kl_per_token"), "logprob": model.get("logprob_per_token")}
            record |= {f"{role}_{name}".rstrip("_"): value for name, value in figures.items() if value is not None}
        marks = {file.name: [o.right for o in outcomes.of(f) if o.right is not None] for f, file in enumerate(self.files)}
        record["files"] = {name: sum(own) / len(own) for name, own in marks.items() if own}
        if heldout_loss is not None:
            record["heldout_loss"] = heldout_loss
        if self.floor is not None:
            record |= {"floor": self.floor, "holds_floor": self._right(outcomes) >= self.floor * self._right(self.base) - 1e-9}
        return record

    # ------------------------------------------------------------ the state that is kept

    def _place(self, step: int) -> Path:
        return self.folder / "kept" / f"step-{step:08d}"

    def _keep(self, step: int, optimizer: FlatAdamW | None) -> None:
        """Write the weights (none need be written of a run's last state), and forget those that nothing goes back to."""
        if optimizer is not None:
            with atomic_folder(self._place(step)) as aside:
                save_file({f"{i}": group.master.data for i, group in enumerate(optimizer.groups)}, aside / "weights.safetensors")
        self._forget_all_but(step)

    def _forget_all_but(self, *steps: int) -> None:
        checkpoint.remove_all_but(self.folder / "kept", {*steps, *checkpoint.kept_steps(self.folder / "checkpoints")})

    def restore(self, state: checkpoint.State, optimizer: FlatAdamW) -> None:
        """Put the weights back that are exported, and say which. UserError where they cannot be read."""
        if self.floor is None:
            return
        print(self._chosen_line(state), flush=True)
        step = state.kept_measurement["step"]
        if step == state.step:
            return
        file = self._place(step) / "weights.safetensors"
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"forgetting: cannot read {file}, the state of step {step} that was kept: {error}") from None
        with torch.no_grad():
            for i, group in enumerate(optimizer.groups):
                group.master.data.copy_(tensors[f"{i}"])
        optimizer.publish()

    def clean(self) -> None:
        """Remove the kept states once one of them is exported, but for those that a checkpoint refers to."""
        self._forget_all_but()

    def _chosen_line(self, state: checkpoint.State) -> str:
        kept = state.kept_measurement
        figures = f"general {kept['general']:.1%}, {kept['general_retained']:.1%} of the base's"
        figures += f"; domain {kept['domain']:.1%}" if "domain" in kept else ""
        if kept["holds_floor"]:
            return f"forgetting: exporting step {kept['step']} of {state.step}, the best of those that hold the floor: {figures}"
        return (f"forgetting: WARNING: no measured state held the floor of {self.floor:.1%}; exporting step {kept['step']} of "
                f"{state.step}, the nearest to it: {figures}; what holds it: more replay, retention.kl_weight, a lower optim.lr")


def _rank(record: dict) -> tuple:
    """Orders measurements: what holds the floor by the domain, what does not by how near it is."""
    domain = next((record[name] for name in ("domain", "domain_logprob") if name in record), None)
    if domain is None:
        domain = -record["heldout_loss"] if "heldout_loss" in record else record["step"]
    return (1, domain, record["general"]) if record["holds_floor"] else (0, record["general"], domain)


@contextmanager
def at_rest(model: nn.Module, compiled: bool) -> Iterator[None]:
    """The model in evaluation mode for a while, and its layers as they are uncompiled: a cache grows by every token."""
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        model.train(training)
