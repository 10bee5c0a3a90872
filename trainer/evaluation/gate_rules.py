"""Judge the figures of an evaluation by the rules of `python -m trainer.gate`.

A model passes if it keeps every rule that applies, at the confidence c of the evaluation:

    interval    a general file's accuracy is not below the base's Wilson interval
    McNemar     a general file did not lose more items than it gained, with p < 1 - c
    ended       a general file's answers do not end themselves less often than the base's, with p < 1 - c by the same test
    log-prob    a general file without right and wrong answers did not lose more than a margin: the interval of its change reaches -margin
    gain        a domain file gained more items than it lost, with p < 1 - c, or, without right and wrong answers, the interval of its
                change of log-prob is above 0

The p of McNemar and ended are Holm's (S. Holm, Scandinavian Journal of Statistics 6, 1979, p. 65): each is multiplied so that a model that
changed nothing fails one of them at most once in 1 / (1 - c) gates, however many files there are. A domain file that has to hold, not to
gain, is judged by the rules of general ones. Metrics of lm-evaluation-harness that are no marks (perplexity) are not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainer.evaluation.config import GateConfig

Rule = Literal["interval", "McNemar", "ended", "log-prob", "gain"]


@dataclass(frozen=True)
class Verdict:
    """One rule on one file or task."""

    role: str
    file: str
    rule: Rule
    passed: bool
    found: str  # the figures that decided
    p: float | None = None  # of a test that Holm's correction covers, after it


def verdicts(results: dict, config: GateConfig) -> list[Verdict]:
    """Return the verdict of each rule that applies, in the order of the files."""
    found, alpha = [], 1 - config.statistics.confidence
    for name, figures in _compared(results):
        if figures["role"] == "domain" and config.gate.domain == "gain":
            found += _gain(name, figures, alpha)
        else:
            found += _hold(name, figures, config.gate.logprob_margin)
    return _judge_tests(found, alpha)


def _compared(results: dict) -> Iterator[tuple[str, dict]]:
    """Yield name and figures of each file, and of each task's metric of marks."""
    for file in results["files"]:
        yield file["name"], file
    for task in results["tasks"]:
        if "lost" in task.get("change", {}):
            filtered = "" if task["filter"] == "none" else f", {task['filter']}"
            yield f"{task['task']} ({task['metric']}{filtered})", task


def _hold(name: str, figures: dict, margin: float) -> Iterator[Verdict]:
    base, model, change, role = figures["base"], figures["model"], figures["change"], figures["role"]
    if "lost" in change:
        low = base["accuracy_interval"][0]
        yield Verdict(role, name, "interval", model["accuracy"] >= low,
                      f"{base['accuracy']:.1%} → {model['accuracy']:.1%}, base's interval from {low:.1%}")
        yield _test(role, name, "McNemar", change, "forgotten", "gained")
    elif "logprob_interval" in change:
        low, high = change["logprob_interval"]
        yield Verdict(role, name, "log-prob", high >= -margin,
                      f"{change['logprob_per_token']:+.3f} [{low:+.3f}, {high:+.3f}] nats per token, margin {margin:g}")
    if "ended" in change:
        yield _test(role, name, "ended", change["ended"], "no longer ended", "newly ended")


def _test(role: str, name: str, rule: Rule, change: dict, lost: str, gained: str) -> Verdict:
    """Return the verdict before its test: passed unless more was lost than gained."""
    return Verdict(role, name, rule, change["lost"] <= change["gained"],
                   f"{change['lost']:,} {lost}, {change['gained']:,} {gained}", change["p"])


def _gain(name: str, figures: dict, alpha: float) -> Iterator[Verdict]:
    change, role = figures["change"], figures["role"]
    if "lost" in change:
        gained = change["gained"] > change["lost"] and change["p"] < alpha
        yield Verdict(role, name, "gain", gained, f"{change['gained']:,} gained, {change['lost']:,} forgotten, p {change['p']:.2g}")
    elif "logprob_interval" in change:
        low, high = change["logprob_interval"]
        yield Verdict(role, name, "gain", low > 0, f"{change['logprob_per_token']:+.3f} [{low:+.3f}, {high:+.3f}] nats per token")


def _judge_tests(found: Sequence[Verdict], alpha: float) -> list[Verdict]:
    """Return the verdicts with those of McNemar's tests given by Holm's p."""
    tests = sorted((i for i, verdict in enumerate(found) if verdict.p is not None), key=lambda i: found[i].p)
    judged, p = list(found), 0.0
    for rank, i in enumerate(tests):
        p = max(p, min(1.0, found[i].p * (len(tests) - rank)))
        judged[i] = replace(found[i], p=p, passed=found[i].passed or p >= alpha, found=f"{found[i].found}, p {p:.2g}")
    return judged
