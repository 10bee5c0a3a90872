"""Show what training changed: the answers of base and tuned model to the same prompts (`eval.show`).

The prompts are of the eval set, and general ones. Without an eval set the domain's items stand in for it, without those rows that are
trained on; without general items rows of the replay data do. The base answers before the first step, while the model in memory is still the
base: so full fine-tuning needs no second copy, and a resumed run asks the same base again. The tuned model answers after the export, before
its weights are freed for the check. Answers are greedy: they draw no random numbers, and what is trained is the same with and without them.

Nothing here ends a run: an error is one line, and what was trained is exported by then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from torch import nn

from trainer.config import Config
from trainer.data.chat_template import ChatTemplate
from trainer.data.prepare import TrainingData
from trainer.data.samples import Samples
from trainer.data.tokenize import chat_of
from trainer.data.turn_spans import Message
from trainer.errors import UserError, one_line
from trainer.evaluation.changed_items import expected, question
from trainer.evaluation.config import Generation
from trainer.evaluation.generation import Completion, generate_completions
from trainer.evaluation.items import ItemFile
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.tokens import prompt_text
from trainer.metrics.log import Log
from trainer.model.lora import adapted_layers, adapters_disabled
from trainer.report import answers
from trainer.report.answers import Answers
from trainer.retention.monitor import ForgettingMonitor, evaluation_mode

TRIED = 50  # prompts that are tried for each that is wanted: some are too long for the model's context, or refused by its template
BEGINNING = 32  # tokens of a text without turns that are its prompt, at most


class Prompt(NamedTuple):
    """A prompt to show answers to."""

    kind: str
    source: str
    text: str  # as people read it
    expected: str | None
    ids: list[int]
    max_tokens: int  # of an answer


@dataclass
class Showing:
    """The prompts of a run, and the base's answers to them."""

    config: Config
    loaded: LoadedModel
    prompts: list[Prompt]
    base: list[Completion]
    seconds: float  # that the base took

    def describe(self) -> str:
        """Return the console line on the prompts at the start of a run."""
        kinds = [prompt.kind for prompt in self.prompts]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        none = "; no general ones: no items of forgetting.general or rows of replay.data fit"
        lacking = "" if {"general", "replay"} & set(kinds) else none
        return f"eval.show: {len(kinds)} prompts ({counts or 'none fits'}{lacking}), answered by the base in {self.seconds:.1f} s"

    def tuned(self) -> list[Answers]:
        """Return the answers of the base and of the model as it is now."""
        return [Answers(prompt.kind, prompt.source, prompt.text, before.text, after.text, before.finished, after.finished, prompt.expected)
                for prompt, before, after in zip(self.prompts, self.base, ask(self.loaded, self.prompts, self.config), strict=True)]


# ---------------------------------------------------------------- before the first step


def ask_base(config: Config, data: TrainingData, items: Sequence[ItemFile], model: nn.Module) -> Showing | None:
    """Choose the prompts, and let the base answer them.

    Returns None where none are wanted, or it fails, which is printed. `model` is still the base, but for an adapter, which is switched off
    meanwhile.
    """
    if not config.eval.show:
        return None
    begun, loaded = time.perf_counter(), LoadedModel("model", "the trained model", model, data.template)
    try:
        prompts = choose_prompts(config, data, items, loaded.context)
        with adapters_disabled(adapted_layers(model)):
            base = ask(loaded, prompts, config)
    except Exception as error:
        warn(error)
        return None
    return Showing(config, loaded, prompts, base, time.perf_counter() - begun)


def choose_prompts(config: Config, data: TrainingData, items: Sequence[ItemFile], context: int | None) -> list[Prompt]:
    """Return the prompts to show: `eval.show` of the domain, and as many general ones.

    The choice is random, and the same in every run on the same data.
    """
    roles = np.array([part.role for part in data.mixture.parts])[data.samples.sources]
    domain_items, general_items = ([file for file in items if file.role == role] for role in ("domain", "general"))
    if data.eval_set:
        domain = of_samples("held out", data.eval_set.samples, data.eval_set.records, slice(None), config, data.template)
    elif domain_items:
        domain = of_items("held out", domain_items, config, data.template)
    else:
        domain = of_samples("training", data.samples, data.records, roles == "domain", config, data.template)
    general = of_items("general", general_items, config, data.template) if general_items else \
        of_samples("replay", data.samples, data.records, roles == "replay", config, data.template)
    wanted = config.eval.show
    return [prompt for found in (domain, general) for prompt in islice(_fitting(islice(found, TRIED * wanted), context), wanted)]


def _fitting(prompts: Iterator[Prompt | None], context: int | None) -> Iterator[Prompt]:
    """Yield the prompts that leave room for an answer, which is as long as the model's context allows."""
    for prompt in filter(None, prompts):
        room = prompt.max_tokens if context is None else min(prompt.max_tokens, context - len(prompt.ids))
        if prompt.ids and room > 0:
            yield prompt._replace(max_tokens=room)


def of_samples(kind: str, samples: Samples, records: Sequence[Dataset], which: np.ndarray | slice, config: Config,
               template: ChatTemplate) -> Iterator[Prompt | None]:
    """Yield the prompts of samples in random order: a chat up to its last answer, a text's beginning.

    None stands for a record that has no prompt.
    """
    seen = set()
    for i in np.random.default_rng(0).permutation(np.arange(len(samples))[which]):
        source, number = int(samples.sources[i]), int(samples.records[i])
        if (source, number) in seen:
            continue
        seen.add((source, number))
        record, name = records[source][number], samples.names[source]
        if "text" in record:
            yield _of_text(kind, name, record["text"], config, template)
            continue
        messages, _, inputs = chat_of(record, config.data)
        chat, answer = _before_last_answer(messages)
        if chat:
            yield _of_chat(kind, name, chat, answer, {**template.keywords, **inputs}, config, template)


def _before_last_answer(messages: Sequence[Message]) -> tuple[list[Message], str | None]:
    """Return the messages up to the last answer, without their weights in the loss, and its words."""
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return messages[:last], messages[last]["content"] if last < len(messages) else None


def _of_chat(kind: str, name: str, chat: list[Message], answer: str | None, inputs: dict, config: Config,
             template: ChatTemplate) -> Prompt | None:
    """Return the prompt of a chat; None if the template refuses one that ends there."""
    try:
        text = template.render(chat, add_generation_prompt=True, inputs=inputs)
    except UserError:
        return None
    ids = template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Prompt(kind, name, question(chat), answer or None, ids, config.forgetting.max_tokens)


def _of_text(kind: str, name: str, text: str, config: Config, template: ChatTemplate) -> Prompt:
    whole = template.encode_texts([text])[0].input_ids
    ids = whole[: min(BEGINNING, len(whole) // 2)]
    beginning = template.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Prompt(kind, name, beginning, None, ids, config.forgetting.max_tokens)


def of_items(kind: str, files: Sequence[ItemFile], config: Config, template: ChatTemplate) -> Iterator[Prompt | None]:
    """Yield the prompts of items in random order, as `trainer.evaluate` renders them.

    None stands for an item that has no prompt.
    """
    numbered = [(file, i) for file in files for i in range(len(file.items))]
    for n in np.random.default_rng(0).permutation(len(numbered)):
        file, i = numbered[n]
        item = file.items[i]
        if item.text is not None:
            yield _of_text(kind, file.name, item.text, config, template)
            continue
        chat, answer = (list(item.prompt), expected(item)) if item.prompt else _before_last_answer(item.chat)
        if not chat:
            yield None
            continue
        text = prompt_text(replace(item, prompt=tuple(chat)), template, file.options.chat)
        ids = template.tokenizer(text, add_special_tokens=not file.options.chat, verbose=False)["input_ids"]
        yield Prompt(kind, file.name, question(chat), answer, ids, file.options.max_tokens or config.forgetting.max_tokens)


def ask(loaded: LoadedModel, prompts: Sequence[Prompt], config: Config) -> list[Completion]:
    """Return the model's answer to each prompt."""
    with evaluation_mode(loaded.model, config.compile):
        return generate_completions(loaded.model, loaded.template, [prompt.ids for prompt in prompts],
                                    [prompt.max_tokens for prompt in prompts], Generation().batch)


# ---------------------------------------------------------------- after the export


def show(showing: Showing | None, monitor: ForgettingMonitor | None, folder: Path, log: Log | None, step: int) -> None:
    """Write answers.jsonl, print the answers side by side and log them.

    Items that were forgotten and gained are written beside them. A failure is printed.
    """
    try:
        shown = showing.tuned() if showing else []
        changed = monitor.changed_items() if monitor else []
        if shown or changed:
            answers.write(folder, shown + changed)
        if shown:
            print(f"answers of base and tuned model, whole in {folder / answers.FILE_NAME}:")
            answers.show(shown)
        if shown and log:
            log.write_texts("answers", [{"kind": one.kind, "source": one.source, "prompt": one.prompt, "base": one.base,
                                         "tuned": one.tuned} for one in shown], step)
    except Exception as error:
        warn(error)


def warn(error: Exception) -> None:
    """Say that no answers are shown, and why."""
    print(f"WARNING: eval.show: no answers are shown: {type(error).__name__}: {one_line(str(error))}", file=sys.stderr, flush=True)
