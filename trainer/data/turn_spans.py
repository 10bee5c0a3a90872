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
from a chat of four one-character messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os.path import commonprefix

Message = dict
Span = tuple[int, int]  # characters start ... end - 1 of the rendered text
Render = Callable[..., str]  # render(messages, add_generation_prompt=False) -> text

# Unicode noncharacters: valid in a string, never in text.
MARK = "\ufdd0{}\ufdd1"
MARKED = re.compile("\ufdd0(\\d+)\ufdd1")
USER_WORDS, ASSISTANT_WORDS = "\ufdd2", "\ufdd3"  # of a message whose place in the template is looked for

# Opens a reasoning block. A prompt may print it already, but it belongs to the assistant's words.
REASONING = "<think>"


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
    return TurnLayout(opening, header if header.strip() else opening, end, closing)


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
    for i, message in enumerate(messages):
        neighbours = messages[max(i - 1, 0):i] + messages[i + 1:i + 2]
        if message["role"] != "assistant" and any(other["role"] == "assistant" for other in neighbours):
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
    The last turn may end in `layout.closing`, which the caller appends. Raises TurnError with a turn whose span is not certain.
    """
    pieces, anchors = split_at_marks(messages, text, render)
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            k = sum(anchor < turn for anchor in anchors)
            begin, end = _span_in(pieces[k], messages, turn, layout)
            if not all(words in pieces[k][begin:end] for words in _words(message)):
                raise TurnError("the template does not print all that the assistant says in this turn", turn)
            spans.append((starts[k] + begin, starts[k] + end))
    return spans


def _words(message: Message) -> list[str]:
    """Return the answer after any reasoning, and the tools called: a template must print these."""
    calls = [call.get("function") or call for call in message.get("tool_calls") or []]
    return [message["content"].rpartition("</think>")[2].strip()] + [str(call.get("name")) for call in calls]


def _span_in(piece: str, messages: list[Message], turn: int, layout: TurnLayout) -> Span:
    """Return the span of assistant turn `turn` in `piece`, the text between the marks around it."""
    before = messages[turn - 1] if turn else None
    if before and before["role"] == "assistant":
        raise TurnError("two assistant turns in a row cannot be separated; join them into one", turn)
    rest = _halves(before["content"])[1].rstrip() if before else ""
    if not piece.startswith(rest):
        raise TurnError("the template does not print the words before this turn as they are", turn)
    opening = layout.opening if before and before["role"] == "user" else layout.header
    begin = piece.find(opening, len(rest))
    if begin < 0:
        raise TurnError(f"the template does not open this turn with {opening!r}", turn)
    begin += len(opening)
    if turn == len(messages) - 1:
        return begin, len(piece.rstrip()) + len(layout.closing)
    following = messages[turn + 1]
    if following["role"] == "assistant":
        raise TurnError("two assistant turns in a row cannot be separated; join them into one", turn + 1)
    start = _halves(following["content"])[0].lstrip()
    if not piece.endswith(start):
        raise TurnError("the template does not print the words after this turn as they are", turn)
    end = piece.rfind(layout.end, begin, len(piece) - len(start))
    if end < 0:
        raise TurnError(f"the template does not end this turn with {layout.end!r}", turn)
    return begin, end + len(layout.end)
