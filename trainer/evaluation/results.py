"""Outcomes to figures: of each file and each role, of each model, and of what changed between the two."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.config import Statistics
from trainer.evaluation.items import ItemFile
from trainer.evaluation.score_items import Outcome, Outcomes
from trainer.evaluation.scoring import NORMS
from trainer.evaluation.significance import bootstrap, chance_adjusted, mcnemar, wilson

Figures = dict


def figures_by_file(files: Sequence[ItemFile], model: Outcomes, base: Outcomes | None, settings: Statistics) -> list[Figures]:
    """One record per file: name, role, metric, items; figures of `base` and `model`; and of the change."""
    rows = []
    for f, file in enumerate(files):
        options = [len(item.choices) for item in file.items] if file.metric == "choice" else None
        own, other = model.of(f), base.of(f) if base else None
        rows.append({"name": file.name, "path": file.settings.path, "role": file.role, "metric": file.metric, "items": len(file.items),
                     **_pair(own, other, settings, options)})
    return rows


def figures_by_role(files: Sequence[ItemFile], model: Outcomes, base: Outcomes | None, settings: Statistics) -> dict[str, Figures]:
    """The same of each role, over the items of all its files: a file with more items weighs more."""
    found = {}
    for role in ("general", "domain"):
        numbers = [f for f, file in enumerate(files) if file.role == role]
        if numbers:
            own, other = ([o for f in numbers for o in outcomes.of(f)] if outcomes else None for outcomes in (model, base))
            found[role] = {"files": len(numbers), "items": len(own), **_pair(own, other, settings, None)}
    return found


def _pair(model: list[Outcome], base: list[Outcome] | None, settings: Statistics, options: list[int] | None) -> Figures:
    figures = {"model": model_figures(model, settings, options)}
    if base is not None:
        figures = {"base": model_figures(base, settings, options), **figures, "change": change_figures(base, model, settings)}
    return figures


def model_figures(outcomes: list[Outcome], settings: Statistics, options: list[int] | None = None) -> Figures:
    """Of one model: accuracy with its Wilson interval, adjusted for chance where there are choices; log-prob per token and byte in nats."""
    figures: Figures = {}
    marks = [outcome.right for outcome in outcomes if outcome.right is not None]
    if marks:
        figures |= {"right": sum(marks), "judged": len(marks), "accuracy": sum(marks) / len(marks),
                    "accuracy_interval": list(wilson(sum(marks), len(marks), settings.confidence))}
    if options:
        figures["chance_adjusted"] = chance_adjusted(figures["accuracy"], options)
        figures["accuracy_by"] = {norm: sum(outcome.picks[norm] for outcome in outcomes) / len(outcomes) for norm in NORMS}
    generated = [outcome.finished for outcome in outcomes if outcome.finished is not None]
    if generated:
        figures["unfinished"] = generated.count(False)
    measured = [outcome for outcome in outcomes if outcome.logprob is not None]
    if measured:
        total, tokens, size = (sum(getattr(o, name) for o in measured) for name in ("logprob", "tokens", "bytes"))
        figures |= {"logprob_per_token": total / tokens, "logprob_per_byte": total / size if size else None,
                    "tokens": tokens, "bytes": size}
    return figures


def change_figures(base: list[Outcome], model: list[Outcome], settings: Statistics) -> Figures:
    """Paired, item by item: lost (1 -> 0) and gained (0 -> 1), their exact McNemar p, the difference of accuracies with its bootstrap
    interval; the difference of log-probs per token, and KL(base || model) in nats per token, with theirs."""
    figures: Figures = {}
    resample = {"confidence": settings.confidence, "draws": settings.bootstrap, "seed": settings.seed}
    pairs = [(was.right, now.right) for was, now in zip(base, model, strict=True) if was.right is not None and now.right is not None]
    if pairs:
        figures |= paired_figures(pairs, resample)
    shared = [(was, now) for was, now in zip(base, model, strict=True)
              if was.logprob is not None and now.logprob is not None and was.tokens == now.tokens]
    if shared:
        moved, tokens = [now.logprob - was.logprob for was, now in shared], [now.tokens for _, now in shared]
        figures |= {"logprob_per_token": sum(moved) / sum(tokens), "logprob_interval": list(bootstrap(moved, tokens, **resample))}
    apart = [outcome for outcome in model if outcome.kl is not None]
    if apart:
        kl, tokens = [outcome.kl for outcome in apart], [outcome.tokens for outcome in apart]
        figures |= {"kl_per_token": sum(kl) / sum(tokens), "kl_interval": list(bootstrap(kl, tokens, **resample)), "kl_tokens": sum(tokens)}
    return figures


def paired_figures(pairs: Sequence[tuple[bool, bool]], resample: dict) -> Figures:
    """Of (right under the base, right under the model): `kept` is the share of those right before that still are; `retention` compares
    the numbers of right items, so gains make up for losses. (Where no item changed the bootstrap's interval of the difference is one
    point, however few items there are: the two accuracies' own intervals say what is known.)"""
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    before, after = (sum(side) for side in zip(*pairs))
    moves = [int(now) - int(was) for was, now in pairs]
    return {"lost": lost, "gained": gained, "p": mcnemar(lost, gained), "difference": (after - before) / len(pairs),
            "difference_interval": list(bootstrap(moves, **resample)), "kept": 1 - lost / before if before else None,
            "retention": after / before if before else None}
