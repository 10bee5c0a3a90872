"""Talk to a tuned model and its base in a terminal: `python -m trainer.chat`.

Lines may also come from a file or a pipe. With `web` the conversation is on a page that this machine alone can open.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from trainer import cli
from trainer.config import Model
from trainer.errors import UserError, printable, require
from trainer.evaluation import chat_page
from trainer.evaluation import config as evaluation
from trainer.evaluation.conversation import SHOWN, Conversations
from trainer.evaluation.models import LoadedModel, find_models, load, template_of
from trainer.report.streamed_answers import StreamedAnswers
from trainer.runtime.device import choose_device

USAGE = """\
usage: python -m trainer.chat --adapter runs/first/adapter [--system 'Answer in one line.'] [--temperature 0.7]
       python -m trainer.chat --model.path MODEL
       python -m trainer.chat --adapter runs/first/adapter --web

Talks to the tuned model and its base, side by side. Lines that begin with a slash are commands: /help lists them."""

HELP = """\
/both, /base, /tuned   who answers
/system TEXT           begin anew with this system message; without a text: with none
/save FILE             add the conversation to a JSON Lines file, as a chat to train on: the tuned model's, after /base the base's
/reset                 begin anew
/quit                  end"""


@dataclass
class Chat:
    """Talk to a tuned model and its base."""

    adapter: str | None = None  # folder or hub name of a LoRA adapter, which names its base
    model: Model = field(default_factory=Model)  # instead of `adapter`: a whole model; or the adapter's base, if that has moved
    force_base: bool = False  # put the adapter on model.path although adapter_config.json names another base
    load_in_4bit: bool = False  # load the model in 4 bits, as a QLoRA run does (needs the `quant` extra)
    system: str | None = None  # a system message
    max_tokens: int = 512  # longest answer
    temperature: float = 0.0  # of sampling; 0: the likeliest token always
    seed: int = 0  # of sampling
    chat_template: str | None = None  # a Jinja file to use instead of the tokenizer's own template
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # keywords for the template, as in training: {enable_thinking: false}
    web: bool = False  # on a page in the browser, served to this machine alone
    port: int = 0  # of that page; 0: a free one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: Literal["auto", "cuda", "cpu"] = "auto"


def main() -> int:
    return cli.main(run, Chat, "trainer.chat", USAGE)


def run(config: Chat) -> None:
    """Load the model, and answer line after line.

    Raises UserError if the model cannot be loaded.
    """
    require(config.adapter is not None or config.model.path is not None, "adapter, model.path", "one of them", "neither")
    require(config.max_tokens >= 1, "max_tokens", "1 or more", config.max_tokens)
    require(config.temperature >= 0, "temperature", "0 or more", config.temperature)
    require(0 <= config.port < 65536, "port", "0 to 65535", config.port)
    require(0 <= config.seed < 2**63, "seed", "0 <= seed < 2^63", config.seed)
    options = evaluation.Config(
        model=config.model, adapter=config.adapter, force_base=config.force_base, load_in_4bit=config.load_in_4bit,
        precision=config.precision, data=evaluation.Data(chat_template=config.chat_template, template_kwargs=config.template_kwargs))
    found = find_models(options)
    model = load(found.model, found.adapter, options, choose_device(config.device))
    loaded = LoadedModel("model", str(found.adapter or found.model.path), model, template_of(found.model, options))
    torch.manual_seed(config.seed)
    names = ("base", "tuned") if found.base_is_adapter_off else ("tuned",)
    conversations = Conversations(loaded, names, config.system, config.max_tokens, config.temperature)
    if config.web:
        chat_page.serve(conversations, config.port)
    else:
        converse(conversations)


def converse(conversations: Conversations) -> None:
    """Answer each line until the last, /quit or Ctrl-C; what cannot be done is one line."""
    for line in lines():
        try:
            if not line.startswith("/"):
                conversations.say(line, StreamedAnswers)
            elif not obey(conversations, *line.partition(" ")[::2]):
                return
        except UserError as error:
            print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)


def obey(conversations: Conversations, command: str, text: str) -> bool:
    """Do what a command says; return whether to go on. Raises UserError."""
    text = text.strip()
    if command == "/quit":
        return False
    if command[1:] in SHOWN:
        conversations.show(command[1:])
    elif command == "/system":
        conversations.reset(text or None)
    elif command == "/reset":
        conversations.reset(conversations.system)
    elif command == "/save":
        print(printable(save(conversations, text)), flush=True)
    elif command == "/help":
        print(HELP, flush=True)
    else:
        raise UserError(f"{command}: expected /both, /base, /tuned, /system, /save, /reset, /quit or /help")
    return True


def save(conversations: Conversations, name: str) -> str:
    """Add a conversation to a file of chats, and return a line that says so.

    Raises UserError if there is none, or no such place.
    """
    record, path = conversations.record(), Path(name).expanduser()
    require(bool(name), "/save", "a file, such as chats.jsonl", "none")
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"/save: cannot write {path}: {error.strerror}; name another file") from None
    return f"added the conversation with {conversations.shown[-1]} to {path}"


def lines() -> Iterator[str]:
    """Yield the lines that are typed or piped, but empty ones."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (earlier lines by the arrow keys)
        print("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> " if typed else "").strip()
            if line:
                yield line


if __name__ == "__main__":
    sys.exit(main())
