"""Hold the conversations with a tuned model and its base, of which one model is in memory.

The base is the tuned model with its adapter switched off. Each of the two has a conversation of its own, with its own answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from trainer.data.turn_spans import Message
from trainer.errors import UserError
from trainer.evaluation.generation import stream_completion
from trainer.evaluation.models import LoadedModel
from trainer.model.lora import adapted_layers, adapters_disabled

SHOWN = {"both": ("base", "tuned"), "base": ("base",), "tuned": ("tuned",)}


class Display(contextlib.AbstractContextManager, Protocol):
    """Shows answers while they are written."""

    def update(self, name: str, text: str) -> None: ...


class Conversations:
    """The models' conversations, and who answers; `names` are those of the models that there are."""

    def __init__(self, loaded: LoadedModel, names: Sequence[str], system: str | None, max_tokens: int, temperature: float):
        self.loaded, self.names, self.max_tokens, self.temperature = loaded, tuple(names), max_tokens, temperature
        self.shown = self.names
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Begin anew."""
        self.system = system
        opening = [{"role": "system", "content": system}] if system else []
        self.chats: dict[str, list[Message]] = {name: [*opening] for name in self.names}

    def say(self, text: str, display: Callable[[Sequence[str]], Display]) -> None:
        """Let the models that are shown answer a message, in a display of their names.

        Raises UserError if one cannot be asked, and forgets the message.
        """
        prompts = {name: self._prompt([*self.chats[name], {"role": "user", "content": text}]) for name in self.shown}
        with display(self.shown) as shown:
            for name, ids in prompts.items():
                with adapters_disabled(adapted_layers(self.loaded.model)) if name == "base" else contextlib.nullcontext():
                    answer = stream_completion(self.loaded.model, self.loaded.template, ids, self._room(ids), self.temperature,
                                               partial(shown.update, name))
                self.chats[name] += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]

    def _prompt(self, chat: list[Message]) -> list[int]:
        """Return the token ids of a conversation up to the answer.

        Raises UserError if it leaves no room for one.
        """
        text = self.loaded.template.render(chat, add_generation_prompt=True)
        ids = self.loaded.template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if self._room(ids) < 1:
            raise UserError(f"the conversation: expected fewer than the {self.loaded.context:,} tokens of the model's context, "
                            f"got {len(ids):,}; /reset begins anew")
        return ids

    def _room(self, ids: Sequence[int]) -> int:
        context = self.loaded.context
        return self.max_tokens if context is None else min(self.max_tokens, context - len(ids))

    def record(self) -> dict:
        """Return the conversation of the model that is shown, the tuned one of both, as a record to train on.

        Raises UserError if there is none.
        """
        chat = self.chats[self.shown[-1]]
        if not any(message["role"] == "assistant" for message in chat):
            raise UserError("/save: expected an answer to save, got none")
        return {"messages": chat}

    def show(self, who: str) -> None:
        """Choose who answers: base, tuned or both. Raises UserError for a model that is not there."""
        if not set(SHOWN[who]) <= {*self.names}:
            raise UserError(f"/{who}: expected an adapter, whose base can be asked, got a whole model")
        self.shown = SHOWN[who]
