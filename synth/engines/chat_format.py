"""What a model is shown so that it writes the user's next turn, or answers it, and where it is stopped: read from its chat template.

A chat whose last user turn holds one sentinel character is rendered; the text before the sentinel is the pre-query prefix, and a model
that continues it writes what users wrote in the chats it was tuned on (Magpie, arXiv 2406.08464). The system prompt that a template adds
by itself is part of that text. Whoever writes a turn is stopped by tokens, never by words: the special tokens with which the template ends
that turn or opens another one, and the model's own end of sequence. A template that ends a user's turn in plain text ("[/INST]") has that
text as a stop instead.

Prompts are token ids. The prefix is cut back to the tokens that it shares with every continuation: where the template's last character
would be one token with the user's first ones (a space before a word), the model writes that character itself.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from trainer.data.chat_template import ChatTemplate
from trainer.data.turn_spans import ASKED, REASONING, SAID, Message
from trainer.errors import UserError

# First words of different scripts and kinds; what all of them leave of the prefix's tokens is safe to prompt with.
OPENINGS = ("What", "how", " the", "1", "Привет", "写", "`", "\n", "É", "(")


class UserPrompt(NamedTuple):
    """A prompt after which the model writes a user's turn."""

    token_ids: tuple[int, ...]
    rest: str  # the end of the template's text, which the tokens do not hold and the model may write first: remove it


class Answering(NamedTuple):
    """A prompt after which the model's answer begins, with nothing between."""

    token_ids: tuple[int, ...]
    rest: str  # the end of the template's text, which is one token with what follows: an answer begins with it


class Stops(NamedTuple):
    """What ends a turn."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()  # only where the template ends the turn in plain text


@dataclass(frozen=True)
class ChatFormat:
    """A model's chat format, as prompts and stops. UserError at construction where no prefix or no stop can be derived."""

    template: ChatTemplate
    eos_ids: tuple[int, ...] = ()  # ends of sequence that the model's generation config names beside the tokenizer's

    def __post_init__(self):
        self.pre_query([])
        if not (self.user_stops.ids or self.user_stops.texts):
            raise self._unfit("nothing ends a user's turn")
        if not self.response_stops.ids:
            raise self._unfit("no special token ends an assistant's turn, and there is no end of sequence")

    # ---------------------------------------------------------------- prompts

    def pre_query(self, history: Sequence[Message], system: str | None = None) -> UserPrompt:
        """The prompt for a user's turn after `history` (whole turns, the last one the assistant's)."""
        chat = [*_system(system), *history, {"role": "user", "content": ASKED}]
        before, found, _ = self.template.render(chat).rpartition(ASKED)
        if not found or not before:
            raise self._unfit("it prints a user's words not at all, or with nothing before them")
        for word in ("x", "Some words."):
            if not self.template.render([*chat[:-1], {"role": "user", "content": word}]).startswith(before):
                raise self._unfit("what it prints before a user's words depends on them")
        ids = self._ids(before)
        shared = min(_common_length(ids, self._ids(before + opening)) for opening in OPENINGS)
        kept = self._text(ids[:shared])
        if not before.startswith(kept):
            raise self._unfit(f"its text changes when it is tokenized and decoded: {before[:60]!r} becomes {kept[:60]!r}")
        return UserPrompt(tuple(ids[:shared]), before[len(kept):])

    def response(self, messages: Sequence[Message], system: str | None = None) -> tuple[int, ...]:
        """The prompt for an answer to a chat that ends with a user's turn, with whatever opens the model's reasoning."""
        return tuple(self._ids(self.template.render([*_system(system), *messages], add_generation_prompt=True)))

    def answering(self, messages: Sequence[Message], answers: Sequence[str], system: str | None = None) -> Answering:
        """The prompt after which the first token of one of `answers` comes: past the reasoning and the channel's mark that precede it.

        Reasoning is closed in the template's own way, as it prints a last turn without any; where it has none, after an empty line.
        """
        opened, closed = self._answer_opening
        text = self.template.render([*_system(system), *messages], add_generation_prompt=True)
        ids, (cut, rest) = self._ids(text[:len(text) - len(opened)] + closed), self._shared_with(tuple(answers))
        return Answering(tuple(ids[:len(ids) - cut]), rest)

    @functools.cached_property
    def _answer_opening(self) -> tuple[str, str]:
        """How `answering` ends the prompt for a response: the text to take off it, and the text to put there."""
        user, assistant = {"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}
        last = self.template.render([user, assistant, user, assistant]).rpartition(ASKED)[2].partition(SAID)[0]
        shared = len(commonprefix([self._prompt, last]))
        opened, closed = self._prompt[shared:], last[shared:]
        if opened and "</think>" not in closed:  # the template prints no reasoning, or forgets it
            opened, closed = "", "\n</think>\n\n" if self._opens_reasoning else ""
        return opened, closed

    def _shared_with(self, answers: tuple[str, ...]) -> tuple[int, str]:
        """How many of the prompt's last tokens are others once one of `answers` follows, and the text of those."""
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

    def continuation(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer, and of the end of its turn, as what follows `response`; what that opens already is not said again."""
        end = self._first_special(self._parts[3])
        opened = REASONING if self._opens_reasoning else ""
        return (*self._ids(text.removeprefix(opened)), self.response_stops.ids[0] if end is None else end)

    # ---------------------------------------------------------------- stops

    @functools.cached_property
    def user_stops(self) -> Stops:
        """Ends of a user's turn: the first special token after it, those that open any turn, and ends of sequence."""
        after = self._parts[1]
        ending = self._first_special(after)
        ids = {ending, *self._openers, *self._eos} - {None}
        marker = after.strip().split("\n")[0] if ending is None or not self._starts_with_special(after) else ""
        # plain text stops a turn only if it could not be a word
        return Stops(tuple(sorted(ids)), (marker,) if re.search(r"[^\w\s]", marker) else ())

    @functools.cached_property
    def response_stops(self) -> Stops:
        """Ends of an assistant's turn: the first special token after the last one and after an earlier one, and ends of sequence.

        An assistant that writes in channels (gpt-oss) ends each of them as templates end its earlier turns: then only the last counts.
        """
        _, _, following, tail = self._parts
        ids = {self._first_special(tail), *self._eos} - {None}
        if not self._special_ids(self._written) or not self._special_ids(tail):
            ids |= {self._first_special(following)} - {None}
        return Stops(tuple(sorted(ids)))

    def answer(self, text: str) -> str | None:
        """What a generated turn says, reasoning included: all of it, or what follows the mark of the final channel; None without one."""
        mark = re.sub(r"</?think>", "", self._written).strip()
        _, found, said = text.rpartition(mark) if mark else ("", REASONING, text)
        opened = REASONING if self._opens_reasoning else ""
        return opened + said if found else None

    @functools.cached_property
    def _opens_reasoning(self) -> bool:
        """Whether the prompt for an answer ends inside the model's thoughts."""
        _, opened, thoughts = self._prompt.rpartition(REASONING)
        return bool(opened) and "</think>" not in thoughts

    @functools.cached_property
    def _prompt(self) -> str:
        """What the template prints after a question for an answer to follow."""
        return self.template.render([{"role": "user", "content": ASKED}], add_generation_prompt=True).rpartition(ASKED)[2]

    @functools.cached_property
    def _written(self) -> str:
        """What the template prints before an answer that its generation prompt does not: the assistant writes it itself."""
        between = self._parts[1]
        return between[len(commonprefix([self._prompt, between])):]

    @functools.cached_property
    def _parts(self) -> tuple[str, str, str, str]:
        """The text before a user's words, between them and the answer, between that and the next question, and after the last answer."""
        user, assistant = {"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}
        pieces = re.split(f"[{ASKED}{SAID}]", self.template.render([user, assistant, user, assistant]))
        if len(pieces) != 5:
            raise self._unfit("it does not print each message of a plain chat once")
        return pieces[0], pieces[1], pieces[2], pieces[4]

    @property
    def _user_opening(self) -> str:
        """The end of what stands before a first question that also stands before a second one."""
        first, _, following, _ = self._parts
        return commonprefix([first[::-1], following[::-1]])[::-1]

    @functools.cached_property
    def _openers(self) -> set[int]:
        """Special tokens that open a turn of any role."""
        opening = self._first_special(self._user_opening)
        between = self._special_ids(self._parts[1])
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
        """The tokens that are no text: those that the tokenizer flags as special."""
        added = self.tokenizer.added_tokens_decoder
        return {i: token.content for i, token in added.items() if token.special or token.content in self.tokenizer.all_special_tokens}

    def _special_ids(self, text: str) -> list[int]:
        return [i for i in self._ids(text) if i in self.special]

    def _first_special(self, text: str) -> int | None:
        return next(iter(self._special_ids(text)), None)

    def _starts_with_special(self, text: str) -> bool:
        return any(text.lstrip().startswith(token) for token in self.special.values())

    def leaked(self, text: str) -> str | None:
        """A special token that stands in a text which should have none."""
        return next((token for token in self.special.values() if token in text), None)

    def _unfit(self, reason: str) -> UserError:
        return UserError(f"chat template of {self.template.name}: cannot be sampled for instructions: {reason}")


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def load_format(path: str, tokenizer: PreTrainedTokenizerBase, date: str) -> ChatFormat:
    """The format of the model at `path`, whose template is told that today is `date` (YYYY-MM-DD)."""
    return ChatFormat(ChatTemplate(tokenizer, name=path, date=datetime.date.fromisoformat(date)), tuple(sorted(_generation_eos(path))))


def _generation_eos(path: str) -> Iterable[int]:
    """Ends of sequence of the model's generation_config.json, which often knows more of them than its tokenizer does."""
    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id if Path(path).is_dir() or "/" in path else None
    except OSError:  # a model without the file
        return ()
    return () if found is None else found if isinstance(found, list) else (found,)
