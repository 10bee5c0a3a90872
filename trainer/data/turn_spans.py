"""Find the spans of the assistant's turns in a rendered chat, for any chat template.

A template prints, for each turn, an opening ("<|im_start|>assistant\\n"), the assistant's words, and an end-of-turn
token. Where it has no `{% generation %}` markers the spans are derived from two renders of the chat, whatever its
number of turns:

    rendered   ... <|im_end|>\\n<|im_start|>assistant\\nIt is 7.<|im_end|>\\n<|im_start|>user\\nAnd 5?<|im_end|> ...
    marked     ... as rendered, with a mark inside each message that stands before or after an assistant turn

The text between two marks is the rest of one known message, the assistant's turn with the template's own text around
it, and the start of another known message. So the turn begins after the first opening in it and ends with the last
end-of-turn token in it, whatever the assistant's words are: they are never searched. The assistant's messages are
rendered as they are, so templates that strip them, add an empty <think> block or drop earlier ones are read exactly as
the model will see them. The derivation is checked: without its marks the marked text must equal the rendered one, and
the assistant's words must lie in the span. The opening and the end-of-turn token belong to the template; they are read once,
from a chat of four one-character messages, and those around tool calls and results from a chat with one call.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from os.path import commonprefix

from trainer.errors import UserError

Message = dict
Span = tuple[int, int]  # characters start ... end - 1 of the rendered text
Render = Callable[..., str]  # render(messages, add_generation_prompt=False) -> text

# Unicode noncharacters: valid in a string, never in text.
MARK = "\ufdd0{}\ufdd1"
MARKED = re.compile("\ufdd0(\\d+)\ufdd1")
USER_WORDS, ASSISTANT_WORDS, TOOL_WORDS, ARGUMENT = "\ufdd2", "\ufdd3", "\ufdd4", "\ufdd5"  # whose places in the template are looked for

# Of the call in a chat that shows a template's layout; Mistral's templates refuse ids of another form.
CALL_ID, CALL_NAME = "probe0001", "probed_tool"

# Opens a reasoning block. A prompt may print it already, but it belongs to the assistant's words.
REASONING = "<think>"


TWO_IN_A_ROW = "two assistant turns in a row cannot be separated; join them, as data.same_role=join does"


class TurnError(Exception):
    """A chat, or a template, that cannot be masked: `turn` counts from 0; None: the template itself."""

    def __init__(self, reason: str, turn: int | None = None):
        super().__init__(reason)
        self.reason, self.turn = reason, turn


@dataclass(frozen=True)
class TurnLayout:
    """The text that a template prints around an assistant turn."""

    opening: str  # between a user's words and the assistant's, e.g. "<|im_end|>\n<|im_start|>assistant\n"
    header: str  # the part of `opening` that does not end the user's turn: what opens the turn after any other role
    end: str  # the end-of-turn token
    closing: str  # printed by us after a last turn that the template leaves open (GLM); "" otherwise
    after_tool: str = ""  # between a tool's result and the assistant's words; "": as after any other role, `header`
    call_end: str = ""  # ends a turn that calls a tool, where `end` does not (gpt-oss, Gemma 4)
    call_closing: str = ""  # `closing` of a last turn that calls a tool

    def closing_of(self, message: Message) -> str:
        """Return what is printed by us after a last turn."""
        return self.call_closing if message.get("tool_calls") else self.closing


def read_layout(render: Render, added_tokens: Iterable[str]) -> TurnLayout:
    """Read the layout of a template from a chat whose words are single sentinel characters.

    Raises TurnError if a plain chat shows none.
    """
    user, assistant = {"role": "user", "content": USER_WORDS}, {"role": "assistant", "content": ASSISTANT_WORDS}
    parts = re.split(f"[{USER_WORDS}{ASSISTANT_WORDS}]", render([user, assistant] * 2))
    if len(parts) != 5:
        raise TurnError("it does not print each message of a plain chat once")
    _, first, between, last, tail = parts
    prompt = render([user], add_generation_prompt=True).rpartition(USER_WORDS)[2]
    without_prompt = render([user]).rpartition(USER_WORDS)[2]
    # A template without a generation prompt leaves the space before the first word to the model (Llama 2).
    opening = commonprefix([first, last]).rstrip(" ") if prompt == without_prompt else commonprefix([first, last, prompt])
    opening = opening.partition(REASONING)[0]
    header = opening[len(commonprefix([without_prompt, opening])):]
    end = _end_of_turn(between, tail, added_tokens)
    if not opening.strip() or not end:
        raise TurnError("it prints nothing between a user's words and the assistant's" if end else
                        "it prints no end-of-turn token after the assistant's words, so the model would never stop")
    closing = "" if tail.strip() else between[:between.index(end)] + end
    return _with_calls(TurnLayout(opening, header if header.strip() else opening, end, closing), render, added_tokens)


def _with_calls(layout: TurnLayout, render: Render, added_tokens: Iterable[str]) -> TurnLayout:
    """Add what the template prints around a call and its result.

    Nothing is added if it refuses them, or prints them elsewhere.
    """
    user, assistant = {"role": "user", "content": USER_WORDS}, {"role": "assistant", "content": ASSISTANT_WORDS}
    result = {"role": "tool", "content": TOOL_WORDS, "name": CALL_NAME, "tool_call_id": CALL_ID}

    def call(arguments: dict) -> Message:
        function = {"name": CALL_NAME, "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": CALL_ID, "type": "function", "function": function}]}

    try:
        unanswered = [render([user, call(arguments)]).rpartition(USER_WORDS)[2] for arguments in ({}, {"q": ARGUMENT})]
        answered = render([user, call({}), result, assistant]).rpartition(USER_WORDS)[2]
        prompt = render([user, call({}), result], add_generation_prompt=True).rpartition(TOOL_WORDS)[2]
    except UserError:
        return layout
    parts = re.split(f"[{TOOL_WORDS}{ASSISTANT_WORDS}]", answered)
    if len(parts) != 3 or ARGUMENT not in unanswered[1]:
        return layout
    calling, between, _ = parts
    after_tool = _after_names(commonprefix([between, prompt]).partition(REASONING)[0])
    layout = replace(layout, after_tool=after_tool if after_tool.strip() else "")
    ending = _after_names(commonprefix([text[::-1] for text in unanswered])[::-1]).strip()
    _, found, following = calling.rpartition(ending)
    if not ending or not found:
        return layout
    if layout.closing:  # a turn is left open, so the token that ends a call is the first one after it
        token = min(((following.index(t), -len(t), t) for t in added_tokens if t in following), default=(0, 0, ""))[2]
        closing = following[:following.index(token)] + token
        return replace(layout, call_end=ending + closing, call_closing=closing)
    return replace(layout, call_end=ending)


def _after_names(text: str) -> str:
    """Return the part of a text around a call that is the same for every call.

    It comes after any id or name of the call (Mistral).
    """
    return re.split(f"{CALL_ID}|{CALL_NAME}", text)[-1]


def _end_of_turn(between: str, tail: str, added_tokens: Iterable[str]) -> str:
    """Return the text that ends the last turn (in `tail`) and earlier ones (in `between`) alike, or "".

    GLM, gpt-oss and Phi-3 end the last turn in another way: for them it is the first added token after earlier turns.
    """
    ending = tail.strip()
    if ending and between.lstrip().startswith(ending):
        return ending
    found = ((between.index(token), -len(token), token) for token in added_tokens if token in between)
    return min(found, default=(0, 0, ""))[2]


def mark(messages: list[Message]) -> tuple[list[Message], list[int]]:
    """Put a mark into each message next to an assistant turn, and return these messages' indices too."""
    marked, anchors = [], []
    is_answer = [False, *(message["role"] == "assistant" for message in messages), False]
    for i, message in enumerate(messages):
        if not is_answer[i + 1] and (is_answer[i] or is_answer[i + 2]):
            left, right = _halves(message["content"])
            message = message | {"content": left + MARK.format(len(anchors)) + right}
            anchors.append(i)
        marked.append(message)
    return marked, anchors


def _halves(content: str) -> tuple[str, str]:
    """Cut `content` in the middle of its words: templates test how messages start and end, and strip them."""
    middle = len(content) - len(content.lstrip()) + len(content.strip()) // 2
    return content[:middle], content[middle:]


def split_at_marks(messages: list[Message], text: str, render: Render) -> tuple[list[str], list[int]]:
    """Cut `text` where `render` prints the marks, and return the indices of the marked messages too."""
    marked, anchors = mark(messages)
    pieces = MARKED.split(render(marked))
    if pieces[1::2] != [str(k) for k in range(len(anchors))]:
        raise TurnError("the template does not print each message once, in order")
    if "".join(pieces[::2]) != text:
        raise TurnError("the template prints other text when the words of a message change")
    return pieces[::2], anchors


def turn_spans(messages: list[Message], text: str, render: Render, layout: TurnLayout) -> list[Span]:
    """Return the span of each assistant turn in `text`, the rendered `messages`.

    A span holds the turn's words and its end-of-turn token.
    The last turn may end in `layout.closing_of` it, which the caller appends. Raises TurnError with a turn whose span is not certain.
    """
    pieces, anchors = split_at_marks(messages, text, render)
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for turn in turns:
        k = bisect_left(anchors, turn)
        begin, end = _span_in(pieces[k], messages, turn, layout)
        spans.append((starts[k] + begin, starts[k] + end))
    for i, turn in enumerate(turns):
        said = text[slice(*spans[i])]
        if i + 1 < len(turns) and all(message["role"] == "tool" for message in messages[turn + 1:turns[i + 1]]):
            said += text[slice(*spans[i + 1])]  # Gemma 4 prints the words beside a call after the tool's result
        if not all(said.count(words) >= count for words, count in _words(messages[turn]).items()):
            raise TurnError("the template does not print all that the assistant says in this turn", turn)
    return spans


def _words(message: Message) -> dict[str, int]:
    """Return the answer without reasoning, and the tools called, with how often each must be printed."""
    answer = message["content"].rpartition("</think>")[2].strip()
    if not message.get("tool_calls"):
        return {answer: 1}
    return Counter([answer, *(str((call.get("function") or call).get("name")) for call in message["tool_calls"])])


def _span_in(piece: str, messages: list[Message], turn: int, layout: TurnLayout) -> Span:
    """Return the span of assistant turn `turn` in `piece`, the text between the marks around it."""
    before, message = messages[turn - 1] if turn else None, messages[turn]
    if before and before["role"] == "assistant":
        raise TurnError(TWO_IN_A_ROW, turn)
    rest = _printed(_halves(before["content"])[1], str.rstrip, piece.startswith) if before else ""
    if rest is None:
        raise TurnError("the template does not print the words before this turn as they are", turn)
    opening = layout.opening if before and before["role"] == "user" else layout.header
    if before and before["role"] == "tool" and layout.after_tool:
        opening = layout.after_tool
    begin = piece.find(opening, len(rest))
    if begin < 0:
        raise TurnError(f"the template does not open this turn with {opening!r}", turn)
    begin += len(opening)
    if turn == len(messages) - 1:
        return begin, len(piece.rstrip()) + len(layout.closing_of(message))
    following = messages[turn + 1]
    if following["role"] == "assistant":
        raise TurnError(TWO_IN_A_ROW, turn + 1)
    start = _printed(_halves(following["content"])[0], str.lstrip, piece.endswith)
    if start is None:
        raise TurnError("the template does not print the words after this turn as they are", turn)
    limit = len(piece) - len(start)
    endings = [layout.end, *([layout.call_end] if message.get("tool_calls") and layout.call_end else [])]
    end = max(at + len(ending) if at >= 0 else -1 for ending in endings for at in [piece.rfind(ending, begin, limit)])
    if end < 0:
        raise TurnError(f"the template does not end this turn with {layout.end!r}", turn)
    return begin, end


def _printed(words: str, strip: Callable[[str], str], fits: Callable[[str], bool]) -> str | None:
    """Return the first form that fits of those in which templates print a part of a message.

    They are the text but for outer white space, and its JSON; None if none fits.
    """
    if fits(strip(words)):
        return strip(words)
    as_json = (json.dumps(form, ensure_ascii=False)[1:-1] for form in (words, strip(words)))
    return next(filter(fits, as_json), None)
