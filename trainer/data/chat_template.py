"""Tokenize chats with the tokenizer's chat template, and mask the tokens that are not supervised.

A chat is rendered to text, the spans of the assistant's turns are found (by the template's `{% generation %}` markers, or as
`trainer/data/turn_spans.py` derives them), and the text is tokenized once: a token is supervised if it holds a character of a
span, the end-of-turn token included. The template prints all special tokens and the tokenizer adds none, so there is one BOS.

Beside its messages a chat may have inputs: tools, documents and the template's own keywords, such as enable_thinking.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta

from trainer.data import bounded_render
from trainer.data.bounded_render import LimitError, RefusedError
from trainer.data.message_forms import MessageForms
from trainer.data.turn_spans import (
    TWO_IN_A_ROW,
    Message,
    Span,
    TurnError,
    TurnLayout,
    read_layout,
    split_at_marks,
    turn_spans,
)
from trainer.errors import UserError

GENERATION_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
OPTIONAL_NAME = re.compile(r"\b(\w+)\s*(?=is\s+(?:not\s+)?defined|\|\s*default)")
# Variables of a template that are no keywords: the chat, what renders it, and functions.
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "range", "namespace", "dict"}
# Reasoning without words, as templates print it before an answer that has none.
EMPTY_REASONING = re.compile(r"\s*(<think>\s*</think>|<\|channel>thought\s*<channel\|>|\[THINK\]\s*\[/THINK\])\s*")

WORDS_AROUND = 20  # characters on each side of a special token that is shown


class Encoded(NamedTuple):
    """The n token ids of one sample, and whether each of them is supervised."""

    input_ids: list[int]
    supervised: list[bool]


class Rendered(NamedTuple):
    """The text of a chat, its supervised spans, and the weight of each."""

    text: str
    spans: list[Span]
    weights: list[float]


class ChatTemplate:
    """A tokenizer with its chat template, or with the Jinja text `template` in its place.

    `name` stands for the template in error messages. With `date`, a template that prints today's date prints that one instead. `keywords`
    are given to the template with every chat, such as {"enable_thinking": False}. With `mask_empty_reasoning`, reasoning without words,
    which templates print before an answer that has none, is not supervised.
    """

    def __init__(self, tokenizer, template: str | None = None, name: str | None = None, date: datetime.date | None = None,
                 keywords: Mapping[str, Any] | None = None, mask_empty_reasoning: bool = False):
        self.tokenizer = tokenizer
        self.date = date
        self.keywords = dict(keywords or {})
        self.mask_empty_reasoning = mask_empty_reasoning
        self._layouts: dict[str, TurnLayout] = {}
        self.name = name or tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer of {self.name}: expected a fast tokenizer (tokenizer.json), found a slow one, "
                            "which does not say where its tokens lie in the text; convert it")
        self._override = template

    def encode_chats(self, chats: Sequence[list[Message]], train_on: str = "assistant",
                     names: Sequence[str] | None = None, inputs: Sequence[Mapping[str, Any]] | None = None) -> list[Encoded]:
        """Encode chats, each with its inputs, with one call of the tokenizer.

        Supervised are each "assistant" turn, the "last" of them, or "all" tokens but the first. Raises UserError with the chat's
        name (of `names`), the template, the turn and the reason if a chat is refused or cannot be masked.
        """
        rendered = []
        for i, chat in enumerate(chats):
            try:
                rendered.append(self.render_chat(chat, train_on, inputs[i] if inputs else None))
            except UserError as error:
                raise UserError(f"{names[i]}: {error}" if names else str(error)) from None
        return [encoded for encoded, _ in self.encode(rendered)]

    def render_chat(self, messages: list[Message], train_on: str = "assistant", inputs: Mapping[str, Any] | None = None,
                    weights: Sequence[float | None] | None = None) -> Rendered:
        """Render a chat with its inputs, and find its supervised spans.

        `weights` are those of the messages in the loss; None is 1. Raises UserError with the template, the turn and the reason if the chat
        is refused or cannot be masked.
        """
        inputs = {**self.keywords, **(inputs or {})}
        messages = self.forms.spell(messages)
        weights = [1.0 if weight is None else weight for weight in weights or [None] * len(messages)]
        try:
            text, spans, of_spans = self._render_with_spans(messages, train_on, inputs, weights)
        except TurnError as error:
            raise self._unmaskable(error, messages) from None
        if self.mask_empty_reasoning and train_on != "all":
            spans = [(match.end() if (match := EMPTY_REASONING.match(text, start, end)) else start, end) for start, end in spans]
        if min(of_spans, default=1) > 0:
            return Rendered(text, spans, of_spans)
        kept = [(span, weight) for span, weight in zip(spans, of_spans) if weight > 0]
        return Rendered(text, [span for span, _ in kept], [weight for _, weight in kept])

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[Encoded, list[float] | None]]:
        """Encode rendered chats with one call of the tokenizer.

        Return for each its tokens, and the weight of each token in the loss; None where each supervised token weighs 1.
        """
        if not rendered:
            return []
        tokens = self.tokenizer([chat.text for chat in rendered], add_special_tokens=False, verbose=False,
                                return_attention_mask=False, return_token_type_ids=False)
        return [_encoded(ids, chat, one.char_to_token) for ids, chat, one in zip(tokens["input_ids"], rendered, tokens.encodings)]

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

    def render(self, messages: list[Message], add_generation_prompt: bool = False, inputs: Mapping[str, Any] | None = None) -> str:
        """Render a chat to text. Raises UserError with the template's own reason and the turn that it refuses."""
        inputs = self.keywords if inputs is None else inputs
        return self._render(self.forms.spell(messages), inputs, add_generation_prompt=add_generation_prompt)[0]

    def check_keywords(self) -> None:
        """Raise UserError for a keyword that the template does not read."""
        for name in self.keywords:
            if name not in self.variables or name in GIVEN:
                read = sorted({*OPTIONAL_NAME.findall(self.template)} & self.variables - GIVEN)
                raise UserError(f"data.template_kwargs: expected keywords that the chat template of {self.name} reads "
                                f"({', '.join(read) or 'it reads none'}), got {name}; correct or remove it")

    @cached_property
    def forms(self) -> MessageForms:
        """Return the forms of messages that the template prints."""
        return MessageForms(self._render_plainly)

    def _render_plainly(self, chat: list[Message], asked: Mapping[str, Any] | None = None, **options) -> str:
        """Render messages as they stand, with the usual keywords and those that are asked for."""
        return self._jinja(chat, self.keywords | dict(asked or {}), **options)[0]

    def mentions(self, name: str) -> bool:
        """Return whether the template's text has a name, such as a key of messages or a keyword."""
        return name in self._words

    def special_token_in(self, texts: Iterable[str]) -> str | None:
        """Return a special token that stands in words, with the words around it; None if none does."""
        if self._special_tokens is None:
            return None
        for text in texts:
            if found := self._special_tokens.search(text):
                return text[max(0, found.start() - WORDS_AROUND):found.end() + WORDS_AROUND]
        return None

    @cached_property
    def _special_tokens(self) -> re.Pattern | None:
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special and token.content.strip()]
        names = sorted(name for name in special if "think" not in name.lower())  # data may hold reasoning in its tags
        return None if not names or self.tokenizer.split_special_tokens else re.compile("|".join(map(re.escape, names[::-1])))

    @cached_property
    def _words(self) -> set[str]:
        return {*re.findall(r"\w+", self.template)}

    @cached_property
    def template(self) -> str:
        """Return the Jinja text of chats without tools. Raises UserError if there is none."""
        return self.template_text({})

    def template_text(self, inputs: Mapping[str, Any]) -> str:
        """Return the Jinja text of a chat with these inputs: some tokenizers have another for tools.

        Raises UserError if there is none.
        """
        template = self._override or self.tokenizer.chat_template
        if not template:
            raise UserError(f"tokenizer of {self.name}: expected a chat template, found none; set data.chat_template to a Jinja file")
        return template if isinstance(template, str) else self.tokenizer.get_chat_template(tools=inputs.get("tools"))

    @cached_property
    def variables(self) -> set[str]:
        """Return the names that the template reads: its keywords, beside messages and tools."""
        try:
            return jinja2.meta.find_undeclared_variables(jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                GENERATION_TAGS.sub("", self.template)))
        except (jinja2.TemplateError, RecursionError):
            return set(self.keywords)  # a render says what is wrong with it

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides the tokens of a chat."""
        special = sorted(self._special_tokens_map.items())
        options = json.dumps(self.keywords, sort_keys=True, default=str), self.mask_empty_reasoning
        key = (self.tokenizer.backend_tokenizer.to_str(), self._override or self.tokenizer.chat_template, special, options)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    @cached_property
    def _special_tokens_map(self) -> dict[str, Any]:
        return self.tokenizer.special_tokens_map

    @cached_property
    def _has_markers(self) -> bool:
        """Return whether the template marks what the assistant generates."""
        return bool(GENERATION.search(self.template))

    def _layout(self, inputs: Mapping[str, Any]) -> TurnLayout:
        """Return the layout of turns under the keywords of `inputs`."""
        left_out = ("documents", "tools") if self.template_text(inputs) == self.template else ("documents",)
        keywords = {name: value for name, value in inputs.items() if name not in left_out}
        key = json.dumps(keywords, sort_keys=True, default=str) if keywords else ""
        if key not in self._layouts:
            self._layouts[key] = read_layout(partial(self.render, inputs=keywords), self.tokenizer.get_added_vocab())
        return self._layouts[key]

    def _jinja(self, chat: list[Message], inputs: Mapping[str, Any], **options) -> tuple[str, list[Span]]:
        """Render messages as they are.

        Raises RefusedError for a chat that the template refuses, and UserError for a template that is none or breaks its limits.
        """
        given = {**inputs, **self._special_tokens_map, **options}
        if self.date is not None:
            given["strftime_now"] = self.date.strftime
        try:
            return bounded_render.render(self.template_text(inputs), chat, given)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template of {self.name}, line {error.lineno}: expected Jinja, found an error: {error.message}; "
                            "correct it, or set data.chat_template to another") from None
        except LimitError as error:
            raise UserError(f"chat template of {self.name}: expected a text about as long as the chat, in some milliseconds, got {error}; "
                            "set data.chat_template to another") from None

    def _render(self, messages: list[Message], inputs: Mapping[str, Any], **options) -> tuple[str, list[Span]]:
        """Render a chat; with `return_assistant_tokens_mask`, return the spans that the template marks too."""
        chat = self.forms.shape(messages)
        try:
            return self._jinja(chat, inputs, **options)
        except RefusedError as error:
            n = self._refused_length(chat, inputs, error)
            where, reason = f"turn {n} ({messages[n - 1]['role']})", " ".join(str(error).split())
            raise UserError(f"chat template of {self.name} refuses {where}: {reason}; correct the chat, or set data.chat_template to "
                            "another template, or data.on_bad_row=skip to leave such chats out") from None

    def _refused_length(self, chat: list[Message], inputs: Mapping[str, Any], error: Exception) -> int:
        """Return the number of messages in the shortest prefix of `chat` that is refused with the same error."""
        for n in range(1, len(chat)):
            try:
                self._jinja(chat[:n], inputs)
            except RefusedError as earlier:
                if str(earlier) == str(error):
                    return n
        return len(chat)

    def _unmaskable(self, error: TurnError, messages: list[Message]) -> UserError:
        turn = "" if error.turn is None else f" turn {error.turn + 1} ({messages[error.turn]['role']}):"
        leave_out = "" if error.turn is None else "leave the chat out by data.on_bad_row=skip, "
        return UserError(f"chat template of {self.name} cannot be masked:{turn} {error.reason}; {leave_out}set data.chat_template "
                         "to a template with {% generation %} markers, or set data.train_on=all")

    def _render_with_spans(self, messages: list[Message], train_on: str, inputs: Mapping[str, Any],
                           weights: list[float]) -> tuple[str, list[Span], list[float]]:
        """Render a chat, and return its text with the supervised spans in it and their weights."""
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        plain = all(weights[turn] == 1 for turn in turns)
        if train_on == "all":
            text = self._render(messages, inputs)[0]
            if not any(weights):
                return text, [], []
            if others := [turn for turn, weight in enumerate(weights) if weight != 1 and turn not in turns]:
                raise TurnError("only the weight of an assistant's turn can be read beside data.train_on=all", others[0])
            if plain:
                return text, [(0, len(text))], [1.0]
            _, spans, of_spans = self._render_with_spans(messages, "assistant", inputs, weights)
            return text, *_around(spans, of_spans, len(text))
        if not turns:
            return self._render(messages, inputs)[0], [], []

        def render(chat: list[Message]) -> str:
            return self._render(chat, inputs)[0]

        if self._has_markers:
            text, spans = self._render(messages, inputs, return_assistant_tokens_mask=True)
            if not any(text[start:end].strip() for start, end in spans):
                raise TurnError("its {% generation %} markers hold no text")
            if plain and (train_on != "last" or len(turns) == 1):
                return text, spans, [1.0] * len(spans)
            of_spans = _turns_of(spans, turns, messages, text, render, weights)
        else:
            text, layout = render(messages), self._layout(inputs)
            spans, of_spans = turn_spans(messages, text, render, layout), turns
            if messages[-1]["role"] == "assistant" and (closing := layout.closing_of(messages[-1])):
                text = text.rstrip() + closing
        if train_on == "last":
            spans, of_spans = zip(*((span, turn) for span, turn in zip(spans, of_spans) if turn == turns[-1]))
        return text, [*spans], [weights[turn] for turn in of_spans]


def _turns_of(spans: list[Span], turns: list[int], messages: list[Message], text: str, render: Callable[..., str],
              weights: list[float]) -> list[int]:
    """Return the assistant turn that each marked span is in."""
    pieces, anchors = split_at_marks(messages, text, render)
    ends = list(accumulate(len(piece) for piece in pieces))
    within_piece = defaultdict(list)
    for turn in turns:
        within_piece[bisect_left(anchors, turn)].append(turn)
    found = []
    for start, _ in spans:
        within = within_piece[min(bisect_right(ends, start), len(ends) - 1)]
        if len({weights[turn] for turn in within}) != 1:
            raise TurnError(TWO_IN_A_ROW, within[-1] if within else None)
        found.append(within[-1])
    return found


def _around(spans: list[Span], weights: list[float], length: int) -> tuple[list[Span], list[float]]:
    """Return spans that cover a whole text, those between the given ones with a weight of 1."""
    bounds = [0, *(bound for span in spans for bound in span), length]
    between = [(start, end) for start, end in zip(bounds[::2], bounds[1::2])]
    return [*between, *spans], [1.0] * len(between) + weights


def _encoded(ids: list[int], chat: Rendered, token_at: Callable[[int], int | None]) -> tuple[Encoded, list[float] | None]:
    """Return the tokens of a text, whether each is supervised, and their weights.

    A token is supervised if it holds a character of the supervised spans. The first token is never supervised: nothing predicts it.
    `token_at(c)` is the first token that holds character c, or None for a character that the tokenizer skips.
    """
    characters, tokens = len(chat.text), len(ids)
    supervised, weights = [False] * tokens, None if all(weight == 1 for weight in chat.weights) else [0.0] * tokens
    for (start, end), weight in zip(chat.spans, chat.weights):
        first = next((t for c in range(start, end) if (t := token_at(c)) is not None), None)
        if first is None:
            continue
        last = next(t for c in range(end - 1, start - 1, -1) if (t := token_at(c)) is not None)
        # A character may be spread over several tokens: the ones before the next character's token are all its own.
        following = next((t for c in range(end, characters) if (t := token_at(c)) is not None), tokens)
        stop = max(last + 1, following)
        supervised[first:stop] = [True] * (stop - first)
        if weights:
            weights[first:stop] = [weight] * (stop - first)
    supervised[:1] = [False] * min(tokens, 1)
    if weights:
        weights[0] = 0.0
    return Encoded(ids, supervised), weights if weights and not {*weights} <= {0.0, 1.0} else None


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
