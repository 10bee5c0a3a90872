"""Derive prompts and stops for a user's or an assistant's turn from a model's chat template.

A chat whose last user turn is one sentinel character is rendered; the text before the sentinel is the pre-query template, and a model that
continues it writes user turns like those it was tuned on (Magpie, arXiv 2406.08464). The system prompt that a template adds by itself is
part of that text. Stops are tokens: the special tokens with which the template ends the turn or begins another one, and the model's own
ends of sequence. Only a template that ends a user's turn in plain text ("[/INST]") has that text as a stop.

Prompts are token ids. A prompt is cut back to the tokens that it shares with every continuation: where the template's last character could
be one token with the first characters of the user's turn (a space before a word), the model writes that character itself.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from trainer.data.chat_template import ChatTemplate
from trainer.data.turn_spans import ASSISTANT_WORDS, REASONING, USER_WORDS, Message
from trainer.errors import UserError
from trainer.model.generation_settings import end_ids, read_settings

# Beginnings of turns, of different scripts and kinds: tokens that a prompt shares with all of them do not depend on the turn.
FIRST_WORDS = ("What", "how", " the", "1", "Привет", "写", "`", "\n", "É", "(")


class UserPrompt(NamedTuple):
    """A prompt after which the model writes a user's turn."""

    token_ids: tuple[int, ...]
    rest: str  # the end of the template's text, not part of the tokens; the model may write it first: remove it


class ChoicePrompt(NamedTuple):
    """A prompt directly after which the model's answer begins."""

    token_ids: tuple[int, ...]
    rest: str  # the end of the template's text, one token with what follows: an answer begins with it


class Stops(NamedTuple):
    """Tokens and texts that end a turn."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()  # only where the template ends the turn in plain text


class TemplateParts(NamedTuple):
    """Texts that a chat template prints around the messages of a chat with two questions and two answers."""

    before_question: str  # before the first question
    before_answer: str  # between a question and its answer
    after_answer: str  # between the first answer and the second question
    after_last_answer: str


@dataclass(frozen=True)
class ChatFormat:
    """A model's chat format, as prompts and stops.

    Raises UserError at construction where no prompt or no stop can be derived.
    """

    template: ChatTemplate
    eos_ids: tuple[int, ...] = ()  # ends of sequence of the model's generation config, besides the tokenizer's

    def __post_init__(self):
        self.user_prompt([])
        if not (self.user_stops.ids or self.user_stops.texts):
            raise self._template_error("nothing ends a user's turn")
        if not self.response_stops.ids:
            raise self._template_error("no special token ends an assistant's turn, and there is no end of sequence")

    # ---------------------------------------------------------------- prompts

    def user_prompt(self, history: Sequence[Message], system: str | None = None) -> UserPrompt:
        """Return the prompt for a user's turn after `history` (whole turns, the last one the assistant's)."""
        chat = [*_system(system), *history, {"role": "user", "content": USER_WORDS}]
        before, found, _ = self.template.render(chat).rpartition(USER_WORDS)
        if not found or not before:
            raise self._template_error("it does not print a user's words, or prints nothing before them")
        for word in ("x", "Some words."):
            if not self.template.render([*chat[:-1], {"role": "user", "content": word}]).startswith(before):
                raise self._template_error("what it prints before a user's words depends on them")
        ids = self._ids(before)
        shared = min(_common_length(ids, self._ids(before + word)) for word in FIRST_WORDS)
        kept = self._text(ids[:shared])
        if not before.startswith(kept):
            raise self._template_error(f"its text changes when it is tokenized and decoded: {before[:60]!r} becomes {kept[:60]!r}")
        return UserPrompt(tuple(ids[:shared]), before[len(kept):])

    def response_prompt(self, messages: Sequence[Message], system: str | None = None) -> tuple[int, ...]:
        """Return the prompt for an answer to a chat that ends with a user's turn.

        It includes the opening of the model's reasoning.
        """
        return tuple(self._ids(self.template.render([*_system(system), *messages], add_generation_prompt=True)))

    def choice_prompt(self, messages: Sequence[Message], answers: Sequence[str], system: str | None = None) -> ChoicePrompt:
        """Return the prompt after which the first token of one of `answers` comes.

        That is past the reasoning and the channel mark before an answer.

        Reasoning is closed as the template prints a last turn without any; where it prints none, by an empty line and </think>.
        """
        opened, closed = self._answer_opening
        text = self.template.render([*_system(system), *messages], add_generation_prompt=True)
        ids, (cut, rest) = self._ids(text[:len(text) - len(opened)] + closed), self._shared_with(tuple(answers))
        return ChoicePrompt(tuple(ids[:len(ids) - cut]), rest)

    @functools.cached_property
    def _answer_opening(self) -> tuple[str, str]:
        """Return the text that `choice_prompt` removes from a response prompt, and the text that it appends."""
        user, assistant = {"role": "user", "content": USER_WORDS}, {"role": "assistant", "content": ASSISTANT_WORDS}
        last = self.template.render([user, assistant, user, assistant]).rpartition(USER_WORDS)[2].partition(ASSISTANT_WORDS)[0]
        shared = len(commonprefix([self._prompt, last]))
        opened, closed = self._prompt[shared:], last[shared:]
        if opened and "</think>" not in closed:  # the template prints no reasoning, or drops it
            opened, closed = "", "\n</think>\n\n" if self._opens_reasoning else ""
        return opened, closed

    def _shared_with(self, answers: tuple[str, ...]) -> tuple[int, str]:
        """Return how many of the prompt's last tokens change when one of `answers` follows, and their text."""
        if answers not in self._cuts:
            opened, closed = self._answer_opening
            text = self._prompt[:len(self._prompt) - len(opened)] + closed
            ids = self._ids(text)
            kept = min(_common_length(ids, self._ids(text + answer)) for answer in answers)
            before = self._text(ids[:kept])
            self._cuts[answers] = len(ids) - kept, text[len(before):] if text.startswith(before) else ""
        return self._cuts[answers]

    @functools.cached_property
    def _cuts(self) -> dict[tuple[str, ...], tuple[int, str]]:
        return {}

    def continuation_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of an answer and the end of its turn, to follow `response_prompt`.

        The opening of reasoning, which that prompt ends with, is not repeated.
        """
        end = self._first_special(self._parts.after_last_answer)
        opened = REASONING if self._opens_reasoning else ""
        return (*self._ids(text.removeprefix(opened)), self.response_stops.ids[0] if end is None else end)

    # ---------------------------------------------------------------- stops

    @functools.cached_property
    def user_stops(self) -> Stops:
        """Return the stops of a user's turn.

        These are the first special token after it, those that begin any turn, and ends of sequence.
        """
        after = self._parts.before_answer
        ending = self._first_special(after)
        ids = {ending, *self._openers, *self._eos} - {None}
        marker = after.strip().split("\n")[0] if ending is None or not self._starts_with_special(after) else ""
        # plain text is a stop only if it cannot be a word
        return Stops(tuple(sorted(ids)), (marker,) if re.search(r"[^\w\s]", marker) else ())

    @functools.cached_property
    def response_stops(self) -> Stops:
        """Return the stops of an assistant's turn.

        These are the first special tokens after a last turn and after an earlier one, and ends of sequence.

        An assistant that writes in channels (gpt-oss) ends each channel as templates end earlier turns: then only the last one counts.
        """
        ids = {self._first_special(self._parts.after_last_answer), *self._eos} - {None}
        if not self._special_ids(self._written) or not self._special_ids(self._parts.after_last_answer):
            ids |= {self._first_special(self._parts.after_answer)} - {None}
        return Stops(tuple(sorted(ids)))

    def final_answer(self, text: str) -> str | None:
        """Return the answer in a generated turn, with its reasoning.

        That is all of the turn or, for a model with channels, what follows the mark of the final channel; None where that is missing.
        """
        mark = re.sub(r"</?think>", "", self._written).strip()
        answer = text
        if mark:
            _, found, answer = text.rpartition(mark)
            if not found:
                return None
        return (REASONING if self._opens_reasoning else "") + answer

    @functools.cached_property
    def _opens_reasoning(self) -> bool:
        """Return whether the prompt for an answer ends inside the model's reasoning."""
        _, opened, thoughts = self._prompt.rpartition(REASONING)
        return bool(opened) and "</think>" not in thoughts

    @functools.cached_property
    def _prompt(self) -> str:
        """Return what the template prints between a question and a generated answer."""
        return self.template.render([{"role": "user", "content": USER_WORDS}], add_generation_prompt=True).rpartition(USER_WORDS)[2]

    @functools.cached_property
    def _written(self) -> str:
        """Return the text before an answer that the generation prompt lacks, so that the model writes it."""
        between = self._parts.before_answer
        return between[len(commonprefix([self._prompt, between])):]

    @functools.cached_property
    def _parts(self) -> TemplateParts:
        """Return the template's texts around the messages of a plain chat."""
        user, assistant = {"role": "user", "content": USER_WORDS}, {"role": "assistant", "content": ASSISTANT_WORDS}
        pieces = re.split(f"[{USER_WORDS}{ASSISTANT_WORDS}]", self.template.render([user, assistant, user, assistant]))
        if len(pieces) != 5:
            raise self._template_error("it does not print each message of a plain chat once")
        return TemplateParts(pieces[0], pieces[1], pieces[2], pieces[4])

    @property
    def _user_opening(self) -> str:
        """Return the end of the text before a first question that is also before a second one."""
        return commonprefix([self._parts.before_question[::-1], self._parts.after_answer[::-1]])[::-1]

    @functools.cached_property
    def _openers(self) -> set[int]:
        """Return the special tokens that begin a turn of any role."""
        opening = self._first_special(self._user_opening)
        between = self._special_ids(self._parts.before_answer)
        return {opening, *between} - {None}

    @functools.cached_property
    def _eos(self) -> set[int]:
        return {*self.eos_ids, self.tokenizer.eos_token_id} - {None}

    # ---------------------------------------------------------------- tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.template.tokenizer

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def special(self) -> dict[int, str]:
        """Return the tokens that the tokenizer flags as special, by id."""
        added = self.tokenizer.added_tokens_decoder
        return {i: token.content for i, token in added.items() if token.special or token.content in self.tokenizer.all_special_tokens}

    def _special_ids(self, text: str) -> list[int]:
        return [i for i in self._ids(text) if i in self.special]

    def _first_special(self, text: str) -> int | None:
        return next(iter(self._special_ids(text)), None)

    def _starts_with_special(self, text: str) -> bool:
        return any(text.lstrip().startswith(token) for token in self.special.values())

    def leaked_token(self, text: str) -> str | None:
        """Return a special token that occurs in `text`, None where there is none."""
        return next((token for token in self.special.values() if token in text), None)

    def _template_error(self, reason: str) -> UserError:
        return UserError(f"chat template of {self.template.name}: cannot be used to sample instructions: {reason}")


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def load_format(path: str, tokenizer: PreTrainedTokenizerBase, date: str) -> ChatFormat:
    """Return the chat format of the model at `path`; `date` (YYYY-MM-DD) is today for its template."""
    return ChatFormat(ChatTemplate(tokenizer, name=path, date=datetime.date.fromisoformat(date)), tuple(sorted(_generation_eos(path))))


def _generation_eos(path: str) -> set[int]:
    """Return the ends of sequence of generation_config.json, which often has more than the tokenizer."""
    return end_ids(read_settings(path)) if Path(path).is_dir() or "/" in path else set()
