"""Published chat templates, a tokenizer for them, and chats one at a time."""

import re
from pathlib import Path

import trl
from tokenizers import AddedToken

from tests.helpers import tiny
from trainer.data.chat_template import ChatTemplate, Encoded

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PUBLISHED = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
SPECIAL = re.compile(r"<\|[^<>|{}'\" ]+\|>|<｜[^<>｜{}'\" ]+｜>|<[a-z]+_of_[a-z]+>"
                     r"|<turn\|>|<\|turn>|\[/?INST\]|\[gMASK\]|<sop>|</?think>")


def read(name: str) -> str:
    """Return the Jinja text of a template that TRL ships."""
    return (TEMPLATES / f"{name}.jinja").read_text()


def tokenizer_for(*templates: str):
    """Make a tokenizer in which each special token of the templates is one token."""
    made = tiny.tokenizer(chat_template=None)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(set(SPECIAL.findall("".join(templates))))])
    return made


def encode(template: ChatTemplate, chat: list[dict], train_on: str = "assistant") -> Encoded:
    """Encode one chat."""
    encoded, = template.encode_chats([chat], train_on)
    return encoded
