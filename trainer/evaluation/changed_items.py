"""Find the items that were forgotten and gained, with the answers of both models, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.turn_spans import Message
from trainer.evaluation.items import Item, ItemFile
from trainer.evaluation.score_items import Outcomes
from trainer.report.answers import Answers


def changed_items(files: Sequence[ItemFile], base: Outcomes, model: Outcomes) -> list[Answers]:
    """Return the answers to each item that one of the two answers right, the forgotten ones first.

    Items without an answer in words, of which only log-probs are measured, are left out.
    """
    found: dict[str, list[Answers]] = {"forgotten": [], "gained": []}
    for f, file in enumerate(files):
        for item, before, after in zip(file.items, base.of_file(f), model.of_file(f), strict=True):
            if None not in (before.right, after.right, before.prediction, after.prediction) and before.right != after.right:
                kind = "forgotten" if before.right else "gained"
                found[kind].append(Answers(kind, file.name, question(item.prompt), before.prediction, after.prediction,
                                           before.finished, after.finished, expected(item)))
    return found["forgotten"] + found["gained"]


def question(messages: Sequence[Message]) -> str:
    """Return the words of a prompt: those of its only turn, or of all turns, each after its role."""
    if len(messages) == 1:
        return messages[0]["content"] or ""
    return "\n\n".join(f"{message['role']}: {message['content'] or ''}" for message in messages)


def expected(item: Item) -> str | None:
    """Return the right answer, the first of several, or the names of the rules that an answer has to keep."""
    return item.answers[0] if item.answers else ", ".join(rule.name for rule in item.rules) or None
