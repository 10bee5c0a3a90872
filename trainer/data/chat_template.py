"""Tokenize chats with the tokenizer's chat template, and mask the tokens that are not supervised.

A chat is rendered to text, the spans of the assistant's turns are found (by the template's `{% generation %}` markers, or as
`trainer/data/turn_spans.py` derives them), and the text is tokenized once: a token is supervised if it holds a character of a
span, the end-of-turn token included. The template prints all special tokens and the tokenizer adds none, so there is one BOS.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.data.turn_spans import USER_WORDS, Message, Span, TurnError, TurnLayout, read_layout, split_at_marks, turn_spans
from trainer.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Raised by templates that refuse a chat, and by those that find a field of another type than they expect.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError)


class Encoded(NamedTuple):
    """The n token ids of one sample, and whether each of them is supervised."""

    input_ids: list[int]
    supervised: list[bool]


class ChatTemplate:
    """A tokenizer with its chat template, or with the Jinja text `template` in its place.

    `name` stands for the template in error messages. With `date`, a template that prints today's date prints that one instead.
    """

    def __init__(self, tokenizer, template: str | None = None, name: str | None = None, date: datetime.date | None = None):
        self.tokenizer = tokenizer
        self.date = date
        self.name = name or tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer of {self.name}: expected a fast tokenizer (tokenizer.json), found a slow one, "
                            "which does not say where its tokens lie in the text; convert it")
        self._override = template

    def encode_chats(self, chats: Sequence[list[Message]], train_on: str = "assistant",
                     names: Sequence[str] | None = None) -> list[Encoded]:
        """Encode chats with one call of the tokenizer.

        Supervised are each "assistant" turn, the "last" of them, or "all" tokens but the first. Raises UserError with the chat's
        name (of `names`), the template, the turn and the reason if a chat is refused or cannot be masked.
        """
        rendered = []
        for i, chat in enumerate(chats):
            try:
                rendered.append(self._render_with_spans(chat, train_on))
            except UserError as error:
                raise UserError(f"{names[i]}: {error}" if names else str(error)) from None
        texts = [text for text, _ in rendered]
        tokens = self.tokenizer(texts, add_special_tokens=False, verbose=False,
                                return_attention_mask=False, return_token_type_ids=False)
        return [Encoded(ids, _supervise(len(ids), len(text), spans, partial(tokens.char_to_token, i)))
                for i, (ids, (text, spans)) in enumerate(zip(tokens["input_ids"], rendered))]

    def encode_texts(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode plain texts with one call of the tokenizer.

        Each gets the BOS that the tokenizer adds, once, and an EOS. Every token but the first is supervised.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        encoded = []
        for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]:
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            if eos is not None and ids[-1:] != [eos]:
                ids = ids + [eos]
            encoded.append(Encoded(ids, [False] + [True] * (len(ids) - 1)))
        return encoded

    def segments(self, input_ids: Sequence[int], supervised: Sequence[bool]) -> list[tuple[str, bool]]:
        """Decode a sample in runs of supervised and of other tokens, in order: (text, supervised)."""
        runs = groupby(zip(input_ids, supervised), key=lambda token: bool(token[1]))
        decode = partial(self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [(decode([int(i) for i, _ in run]), flag) for flag, run in runs]

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Render a chat to text. Raises UserError with the template's own reason and the turn that it refuses."""
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    @cached_property
    def template(self) -> str:
        """Return the Jinja text. Raises UserError if there is none."""
        if self._override is None and not self.tokenizer.chat_template:
            raise UserError(f"tokenizer of {self.name}: expected a chat template, found none; set data.chat_template to a Jinja file")
        return self._override or self.tokenizer.get_chat_template()

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides the tokens of a chat."""
        special = sorted(self.tokenizer.special_tokens_map.items())
        key = (self.tokenizer.backend_tokenizer.to_str(), self._override or self.tokenizer.chat_template, special)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    @cached_property
    def _has_markers(self) -> bool:
        """Return whether the template marks what the assistant generates."""
        return bool(GENERATION.search(self.template))

    @cached_property
    def _in_parts(self) -> bool:
        """Return whether the template prints only messages whose content is a list of parts (multimodal)."""
        message = {"role": "user", "content": USER_WORDS}

        def is_printed(message: Message) -> bool:
            try:
                return USER_WORDS in self._jinja([message])[0][0]
            except REFUSALS:
                return False

        return not is_printed(message) and is_printed(_as_parts(message))

    @cached_property
    def _layout(self) -> TurnLayout:
        return read_layout(self.render, self.tokenizer.get_added_vocab())

    def _jinja(self, chat: list[Message], **options) -> tuple[list[str], list[list[Span]]]:
        special = self.tokenizer.special_tokens_map
        if self.date is not None:
            options["strftime_now"] = self.date.strftime
        return render_jinja_template([chat], chat_template=self.template, **options, **special)

    def _render(self, messages: list[Message], **options) -> tuple[str, list[Span]]:
        """Render a chat; with `return_assistant_tokens_mask`, return the spans that the template marks too."""
        chat = [_as_parts(message) for message in messages] if self._in_parts else messages
        try:
            texts, spans = self._jinja(chat, **options)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template of {self.name}, line {error.lineno}: expected Jinja, found an error: {error.message}; "
                            "correct it, or set data.chat_template to another") from None
        except REFUSALS as error:
            n = self._refused_length(chat, error)
            where, reason = f"turn {n} ({messages[n - 1]['role']})", " ".join(str(error).split())
            raise UserError(f"chat template of {self.name} refuses {where}: {reason}; "
                            "correct the chat, or set data.chat_template to another template") from None
        return texts[0], spans[0] if spans else []

    def _refused_length(self, chat: list[Message], error: Exception) -> int:
        """Return the number of messages in the shortest prefix of `chat` that is refused with the same error."""
        for n in range(1, len(chat)):
            try:
                self._jinja(chat[:n])
            except REFUSALS as earlier:
                if str(earlier) == str(error):
                    return n
        return len(chat)

    def _unmaskable(self, error: TurnError, messages: list[Message]) -> UserError:
        turn = "" if error.turn is None else f" turn {error.turn + 1} ({messages[error.turn]['role']}):"
        return UserError(f"chat template of {self.name} cannot be masked:{turn} {error.reason}; set data.chat_template "
                         "to a template with {% generation %} markers, or set data.train_on=all")

    def _render_with_spans(self, messages: list[Message], train_on: str) -> tuple[str, list[Span]]:
        """Render a chat, and return its text with the supervised spans in it."""
        if train_on == "all":
            text = self.render(messages)
            return text, [(0, len(text))]
        if not any(message["role"] == "assistant" for message in messages):
            return self.render(messages), []
        try:
            return self._marked_spans(messages, train_on) if self._has_markers else self._derived_spans(messages, train_on)
        except TurnError as error:
            raise self._unmaskable(error, messages) from None

    def _marked_spans(self, messages: list[Message], train_on: str) -> tuple[str, list[Span]]:
        """Return the text and the spans between `{% generation %}` markers; one turn may have several."""
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        if not any(text[start:end].strip() for start, end in spans):
            raise TurnError("its {% generation %} markers hold no text")
        if train_on == "last" and sum(message["role"] == "assistant" for message in messages) > 1:
            pieces, anchors = split_at_marks(messages, text, self.render)
            last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
            before = sum(anchor < last for anchor in anchors)
            spans = [span for span in spans if span[0] >= len("".join(pieces[:before]))]
        return text, spans

    def _derived_spans(self, messages: list[Message], train_on: str) -> tuple[str, list[Span]]:
        """Return the text and the span of each assistant turn, for a template without markers."""
        layout, text = self._layout, self.render(messages)
        spans = turn_spans(messages, text, self.render, layout)
        if layout.closing and messages[-1]["role"] == "assistant":
            text = text.rstrip() + layout.closing
        return text, spans[-1:] if train_on == "last" else spans


def _as_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _supervise(tokens: int, characters: int, spans: list[Span], token_at) -> list[bool]:
    """Return for each token of a text whether it holds a character of `spans`.

    The first token is never supervised: nothing predicts it. `token_at(c)` is the first token that holds character c, or None
    for a character that the tokenizer skips.
    """
    supervised = [False] * tokens
    for start, end in spans:
        inside = (token_at(c) for c in range(start, end))
        first = next((t for t in inside if t is not None), None)
        if first is None:
            continue
        last = next(t for t in (token_at(c) for c in range(end - 1, start - 1, -1)) if t is not None)
        # A character may be spread over several tokens: the ones before the next character's token are all its own.
        following = next((t for t in (token_at(c) for c in range(end, characters)) if t is not None), tokens)
        stop = max(last + 1, following)
        supervised[first:stop] = [True] * (stop - first)
    supervised[:1] = [False] * min(tokens, 1)
    return supervised


def read_template(path: str | None) -> str | None:
    """Read the Jinja text of a file; None without a path. Raises UserError if there is none to read."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"data.chat_template: expected a file with a Jinja template, found no file {path}; check the path")
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: expected a text file in UTF-8, cannot read {path}: {error}; check the file") from None
    if not template.strip():
        raise UserError(f"data.chat_template: expected a Jinja template, found nothing in {path}; "
                        "remove the option to use the tokenizer's own")
    return template
