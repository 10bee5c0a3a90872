"""Compute the figures of an evaluation from its outcomes: per file, per role, and per model."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.config import Statistics
from trainer.evaluation.items import ItemFile
from trainer.evaluation.score_items import Outcome, Outcomes
from trainer.evaluation.scoring import NORMS
from trainer.evaluation.significance import bootstrap, chance_adjusted, mcnemar, wilson

Figures = dict


def figures_by_file(files: Sequence[ItemFile], model: Outcomes, base: Outcomes | None, statistics: Statistics) -> list[Figures]:
    """Return one record per file: its name, role and metric, the models' figures, and their change."""
    rows = []
    for f, file in enumerate(files):
        choice_counts = [len(item.choices) for item in file.items] if file.metric == "choice" else None
        outcomes, base_outcomes = model.of_file(f), base.of_file(f) if base else None
        rows.append({"name": file.name, "path": file.options.path, "role": file.role, "metric": file.metric, "items": len(file.items),
                     **_paired_results(outcomes, base_outcomes, statistics, choice_counts)})
        if file.metric == "rules":
            rows[-1]["rules"] = rule_figures(outcomes, base_outcomes, statistics)
    return rows


def figures_by_role(files: Sequence[ItemFile], model: Outcomes, base: Outcomes | None, statistics: Statistics) -> dict[str, Figures]:
    """Return the figures of each role over the items of all its files, each item with equal weight."""
    figures = {}
    for role in ("general", "domain"):
        numbers = [f for f, file in enumerate(files) if file.role == role]
        if numbers:
            outcomes, base_outcomes = _outcomes_of(numbers, model), _outcomes_of(numbers, base) if base else None
            figures[role] = {"files": len(numbers), "items": len(outcomes), **_paired_results(outcomes, base_outcomes, statistics, None)}
    return figures


def _outcomes_of(numbers: list[int], outcomes: Outcomes) -> list[Outcome]:
    return [outcome for f in numbers for outcome in outcomes.of_file(f)]


def _paired_results(model: list[Outcome], base: list[Outcome] | None, statistics: Statistics, choice_counts: list[int] | None) -> Figures:
    figures = {"model": model_figures(model, statistics, choice_counts)}
    if base is not None:
        figures = {"base": model_figures(base, statistics, choice_counts), **figures, "change": change_figures(base, model, statistics)}
    return figures


def model_figures(outcomes: list[Outcome], statistics: Statistics, choice_counts: list[int] | None = None) -> Figures:
    """Return one model's accuracy with its Wilson interval, and its log-prob per token and byte in nats.

    With `choice_counts`, the number of choices of each item, the accuracy is also adjusted for chance, and given for each norm of the
    choices' log-probs.
    """
    figures: Figures = {}
    marks = [outcome.right for outcome in outcomes if outcome.right is not None]
    if marks:
        right = sum(marks)
        figures |= {"right": right, "judged": len(marks), "accuracy": right / len(marks),
                    "accuracy_interval": list(wilson(right, len(marks), statistics.confidence))}
    if choice_counts:
        figures["chance_adjusted"] = chance_adjusted(figures["accuracy"], choice_counts)
        figures["accuracy_by"] = {norm: sum(outcome.picks[norm] for outcome in outcomes) / len(outcomes) for norm in NORMS}
    finished = [outcome.finished for outcome in outcomes if outcome.finished is not None]
    if finished:
        figures["unfinished"] = finished.count(False)
        figures["said"] = {"ended": finished.count(True) / len(finished),
                           "repetition": sum(outcome.repetition or 0 for outcome in outcomes) / len(finished),
                           "words": sum(outcome.words or 0 for outcome in outcomes) / len(finished)}
    measured = [outcome for outcome in outcomes if outcome.logprob is not None]
    if measured:
        total, tokens, size = (sum(getattr(o, name) for o in measured) for name in ("logprob", "tokens", "bytes"))
        figures |= {"logprob_per_token": total / tokens, "logprob_per_byte": total / size if size else None,
                    "tokens": tokens, "bytes": size}
    return figures


def change_figures(base: list[Outcome], model: list[Outcome], statistics: Statistics) -> Figures:
    """Return the change from base to model, paired item by item.

    The figures are those of `paired_figures`, the same of ended answers, the difference of log-probs per token and KL(base || model), both
    in nats per token with bootstrap intervals.
    """
    figures: Figures = {}
    bootstrap_options = {"confidence": statistics.confidence, "draws": statistics.bootstrap, "seed": statistics.seed}
    pairs = [(before.right, after.right) for before, after in zip(base, model, strict=True)
             if before.right is not None and after.right is not None]
    if pairs:
        figures |= paired_figures(pairs, bootstrap_options)
    comparable = [(before, after) for before, after in zip(base, model, strict=True)
                  if before.logprob is not None and after.logprob is not None and before.tokens == after.tokens]
    if comparable:
        differences = [after.logprob - before.logprob for before, after in comparable]
        tokens = [after.tokens for _, after in comparable]
        figures |= {"logprob_per_token": sum(differences) / sum(tokens),
                    "logprob_interval": list(bootstrap(differences, tokens, **bootstrap_options))}
    ends = [(before.finished, after.finished) for before, after in zip(base, model, strict=True)
            if before.finished is not None and after.finished is not None]
    if ends:
        figures["ended"] = paired_figures(ends, bootstrap_options)
    with_kl = [outcome for outcome in model if outcome.kl is not None]
    if with_kl:
        kl, tokens = [outcome.kl for outcome in with_kl], [outcome.tokens for outcome in with_kl]
        figures |= {"kl_per_token": sum(kl) / sum(tokens), "kl_interval": list(bootstrap(kl, tokens, **bootstrap_options)),
                    "kl_tokens": sum(tokens)}
    return figures


def rule_figures(model: list[Outcome], base: list[Outcome] | None, statistics: Statistics) -> dict[str, Figures]:
    """Return the figures of answers under rules beside the file's own, which are strict and by prompt.

    They are loose by prompt, and strict and loose by instruction: the share of all rules of all items that are kept.
    """
    bootstrap_options = {"confidence": statistics.confidence, "draws": statistics.bootstrap, "seed": statistics.seed}

    def by_instruction(outcomes: list[Outcome], form: str) -> Figures:
        kept, rules = [sum(outcome.rules[form]) for outcome in outcomes], [len(outcome.rules[form]) for outcome in outcomes]
        return {"accuracy": sum(kept) / sum(rules), "accuracy_interval": list(bootstrap(kept, rules, **bootstrap_options))}

    def loose(outcomes: list[Outcome]) -> list[bool]:
        return [all(outcome.rules["loose"]) for outcome in outcomes]

    def loose_by_prompt(outcomes: list[Outcome]) -> Figures:
        right = sum(loose(outcomes))
        return {"accuracy": right / len(outcomes), "accuracy_interval": list(wilson(right, len(outcomes), statistics.confidence))}

    models = {"base": base, "model": model} if base else {"model": model}
    figures = {"loose": {name: loose_by_prompt(outcomes) for name, outcomes in models.items()}}
    if base:
        figures["loose"]["change"] = paired_figures(list(zip(loose(base), loose(model))), bootstrap_options)
    for form in ("strict", "loose"):
        figures[f"{form}, by instruction"] = {name: by_instruction(outcomes, form) for name, outcomes in models.items()}
    return figures


def paired_figures(pairs: Sequence[tuple[bool, bool]], bootstrap_options: dict) -> Figures:
    """Return the figures of pairs (right under the base, right under the model).

    They are the numbers of items forgotten (`lost`: right, then wrong) and gained (wrong, then right), their exact McNemar p, and the
    difference of accuracies with its bootstrap interval. `kept` is the share of the base's right items that are still right; `retention`
    compares the numbers of right items, so gains make up for losses. Where no item changed the interval of the difference is a single
    point, however few items there are: the intervals of the two accuracies are the ones to read.
    """
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    right_before, right_after = (sum(marks) for marks in zip(*pairs))
    differences = [int(after) - int(before) for before, after in pairs]
    return {"lost": lost, "gained": gained, "p": mcnemar(lost, gained), "difference": (right_after - right_before) / len(pairs),
            "difference_interval": list(bootstrap(differences, **bootstrap_options)),
            "kept": 1 - lost / right_before if right_before else None,
            "retention": right_after / right_before if right_before else None}
