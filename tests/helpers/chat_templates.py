"""Real chat templates, as TRL ships them, and tokenizers for them."""

import re
from pathlib import Path

import trl
from tokenizers import AddedToken

from tests.helpers import tiny

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PUBLISHED = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
SPECIAL = re.compile(r"<\|[^<>|{}'\" ]+\|>|<｜[^<>｜{}'\" ]+｜>|<[a-z]+_of_[a-z]+>"
                     r"|<turn\|>|<\|turn>|\[/?INST\]|\[gMASK\]|<sop>|</?think>")


def read(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def tokenizer_for(*templates: str):
    """A tokenizer in which each special token of the templates is one token."""
    made = tiny.tokenizer(chat_template=None)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(set(SPECIAL.findall("".join(templates))))])
    return made
