"""Chats to token ids and the mask of supervised tokens, with the tokenizer's own chat template.

A chat is rendered to text, the characters of the assistant's turns are found (by the template's `{% generation %}`
markers, or as `trainer/data/turn_spans.py` derives them), and the text is tokenized once: a token is supervised if it holds a
character of those turns. The end-of-turn token is one of them. Special tokens are what the template prints, so there is
no second BOS.
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

from trainer.data.turn_spans import ASKED, Layout, Message, Span, TurnError, read_layout, split_at_marks, turn_spans
from trainer.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template raises over a chat that it does not take, and over one whose fields are not of the type it expects.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError)


class Encoded(NamedTuple):
    """One sample: n token ids, and for each whether the model learns to predict it."""

    input_ids: list[int]
    supervised: list[bool]


class ChatTemplate:
    """A tokenizer with its chat template, or with the Jinja text `template` in its place, which errors call `name`.

    A template that prints today's date prints `date` instead, where one is given.
    """

    def __init__(self, tokenizer, template: str | None = None, name: str | None = None, date: datetime.date | None = None):
        self.tokenizer = tokenizer
        self.date = date
        self.name = name or tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer of {self.name}: expected a fast tokenizer (tokenizer.json), found a slow one, "
                            "which does not tell where its tokens lie in the text; convert it")
        self._given = template

    def encode(self, messages: list[Message], train_on: str = "assistant") -> Encoded:
        """The tokens of one chat. Supervised: each "assistant" turn, the "last" of them, or "all" tokens but the first.

        UserError names the template, the turn and the reason where the chat is refused or cannot be masked.
        """
        return self.encode_batch([messages], train_on)[0]

    def encode_batch(self, chats: Sequence[list[Message]], train_on: str = "assistant",
                     names: Sequence[str] | None = None) -> list[Encoded]:
        """`encode` of each chat, with one call of the tokenizer. `names` say in errors which chat it was."""
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

    def encode_text(self, text: str) -> Encoded:
        """Plain text, with the BOS that the tokenizer adds and an EOS; supervised: every token but the first."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode_text` of each text, with one call of the tokenizer."""
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
        """The text of a sample in runs of tokens that are all supervised or all not: for showing it in two colours."""
        runs = groupby(zip(input_ids, supervised), key=lambda token: bool(token[1]))
        decode = partial(self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [(decode([int(i) for i, _ in run]), flag) for flag, run in runs]

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The chat as text. UserError gives the template's own reason and the turn at which it refuses the chat."""
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    @cached_property
    def template(self) -> str:
        """The Jinja text."""
        if self._given is None and not self.tokenizer.chat_template:
            raise UserError(f"tokenizer of {self.name}: expected a chat template, found none; "
                            "name a Jinja file as data.chat_template")
        return self._given or self.tokenizer.get_chat_template()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the tokens of a chat."""
        special = sorted(self.tokenizer.special_tokens_map.items())
        key = (self.tokenizer.backend_tokenizer.to_str(), self._given or self.tokenizer.chat_template, special)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    @cached_property
    def _marked(self) -> bool:
        """Whether the template itself says what the assistant generates."""
        return bool(GENERATION.search(self.template))

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template prints a message only if its content is a list of parts, as multimodal ones do."""
        asked = {"role": "user", "content": ASKED}

        def prints(message) -> bool:
            try:
                return ASKED in self._jinja([message])[0][0]
            except REFUSALS:
                return False

        return not prints(asked) and prints(_as_parts(asked))

    @cached_property
    def _layout(self) -> Layout:
        return read_layout(self.render, self.tokenizer.get_added_vocab())

    def _jinja(self, chat: list[Message], **options) -> tuple[list[str], list[list[Span]]]:
        special = self.tokenizer.special_tokens_map
        if self.date is not None:
            options["strftime_now"] = self.date.strftime
        return render_jinja_template([chat], chat_template=self.template, **options, **special)

    def _render(self, messages: list[Message], **options) -> tuple[str, list[Span]]:
        """The text, and the spans that the template marks where `return_assistant_tokens_mask` asks for them."""
        chat = [_as_parts(message) for message in messages] if self._in_parts else messages
        try:
            texts, spans = self._jinja(chat, **options)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template of {self.name}, line {error.lineno}: expected Jinja, found an error: {error.message}; "
                            "mend it, or name another as data.chat_template") from None
        except REFUSALS as error:
            n = self._refused_length(chat, error)
            where, reason = f"turn {n} ({messages[n - 1]['role']})", " ".join(str(error).split())
            raise UserError(f"chat template of {self.name} refuses {where}: {reason}; "
                            "mend the chat, or name another template as data.chat_template") from None
        return texts[0], spans[0] if spans else []

    def _refused_length(self, chat: list[Message], error: Exception) -> int:
        """The number of messages in the shortest beginning of `chat` that is refused with the same error."""
        for n in range(1, len(chat)):
            try:
                self._jinja(chat[:n])
            except REFUSALS as earlier:
                if str(earlier) == str(error):
                    return n
        return len(chat)

    def _unmaskable(self, error: TurnError, messages: list[Message]) -> UserError:
        turn = "" if error.turn is None else f" turn {error.turn + 1} ({messages[error.turn]['role']}):"
        return UserError(f"chat template of {self.name} cannot be masked:{turn} {error.reason}; name a template with "
                         "{% generation %} markers as data.chat_template, or set data.train_on=all")

    def _render_with_spans(self, messages: list[Message], train_on: str) -> tuple[str, list[Span]]:
        """The text of a chat and the supervised characters in it."""
        if train_on == "all":
            text = self.render(messages)
            return text, [(0, len(text))]
        if not any(message["role"] == "assistant" for message in messages):
            return self.render(messages), []
        try:
            return self._marked_spans(messages, train_on) if self._marked else self._derived_spans(messages, train_on)
        except TurnError as error:
            raise self._unmaskable(error, messages) from None

    def _marked_spans(self, messages: list[Message], train_on: str) -> tuple[str, list[Span]]:
        """The spans between `{% generation %}` markers; one turn may have several."""
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
        layout, text = self._layout, self.render(messages)
        spans = turn_spans(messages, text, self.render, layout)
        if layout.closing and messages[-1]["role"] == "assistant":
            text = text.rstrip() + layout.closing
        return text, spans[-1:] if train_on == "last" else spans


def _as_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _supervise(tokens: int, characters: int, spans: list[Span], token_at) -> list[bool]:
    """Whether each of a text's tokens holds a character of `spans`; never the first one, which nothing predicts.

    `token_at(c)` is the first token that holds character c, or None for a character that the tokenizer skips.
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
    """The Jinja text of a file, if one is named. UserError where it is not one."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"data.chat_template: expected a file with a Jinja template, found no file {path}")
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: cannot read {path}: {error}") from None
    if not template.strip():
        raise UserError(f"data.chat_template: expected a Jinja template, found nothing in {path}; leave it out to use the tokenizer's own")
    return template
