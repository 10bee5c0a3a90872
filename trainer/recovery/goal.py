"""Decide whether an adapter has recovered, by its accuracy on general and on domain items."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.evaluation.score_items import score
from trainer.retention.monitor import ForgettingMonitor, evaluation_mode


@dataclass(frozen=True)
class Goal:
    """The share of both accuracies that is enough, and the adapter's own on the domain items."""

    floor: float
    domain: float | None  # of the adapter as it came; None without domain items

    def reached(self, measurement: dict | None) -> bool:
        """Return whether a measurement of the forgetting monitor holds the floor for both kinds of items."""
        if measurement is None or not measurement["holds_floor"]:
            return False
        return self.domain is None or measurement["domain"] >= self.floor * self.domain - 1e-9


def goal_of(monitor: ForgettingMonitor) -> Goal:
    """Return the goal for the model as it is now, the adapter as it came; its domain items are scored."""
    files = [file for file in monitor.files if file.role == "domain" and file.metric != "logprob"]
    if not files:
        return Goal(monitor.floor, None)
    with evaluation_mode(monitor.loaded.model, compiled=False):
        marks = [outcome.right for outcome in score(monitor.loaded, files, monitor.evaluation_config).items.values()]
    return Goal(monitor.floor, sum(map(bool, marks)) / len(marks))
