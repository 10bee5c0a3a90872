"""Every option that a message, docstring, comment or page names is an option that some command has."""

import ast
import dataclasses
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from synth.config import Config as SynthConfig
from trainer.chat import Chat
from trainer.cli import known_keys
from trainer.config import Config
from trainer.convert import Convert
from trainer.evaluation.config import Config as EvaluationConfig
from trainer.evaluation.config import GateConfig
from trainer.interpolate import Interpolate
from trainer.publish import Publish
from trainer.recovery.config import Recover

ROOT = Path(__file__).parent.parent
TRAINER = (Config, EvaluationConfig, GateConfig, Interpolate, Convert, Chat, Publish, Recover)
COMMANDS = {"trainer": TRAINER, "synth": (*TRAINER, SynthConfig)}  # whose options the files of a package name without dashes
PLACEHOLDERS = {"section.option", "section.key"}
OF_EVERY_COMMAND = {"config", "help", "print_config", "traceback"}
OF_OTHER_PROGRAMS = {"nproc_per_node", "max_restarts", "outfile", "outtype", "enable_lora", "lora_modules", "max_lora_rank",
                     "chat_template"}
FILES = {"json", "jsonl", "yaml", "html", "py", "md", "txt", "csv", "safetensors", "jinja", "parquet"}  # model.safetensors is a file
FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*(?:\.\w+)*)")
TEMPLATE_CODE = re.compile(r"{{.*?}}|{%.*?%}|<style>.*?</style>", re.DOTALL)


@functools.cache
def options_of(commands: tuple[type, ...]) -> dict[str, type]:
    return {key: annotation for command in commands for key, annotation in known_keys(command).items()}


def unknown_options(text: str, commands: tuple[type, ...]) -> list[str]:
    """Return what the text names as an option, though no command has it."""
    options, flags_known = options_of(commands), {*options_of(COMMANDS["synth"]), *PLACEHOLDERS, *OF_EVERY_COMMAND, *OF_OTHER_PROGRAMS}
    sections = "|".join(key for key, annotation in options.items() if dataclasses.is_dataclass(annotation))
    dotted = re.findall(rf"(?<![\w./\\-])({sections})\.([a-z]\w*)(?![\w(/])(\.\w)?", text)
    named = [f"{section}.{option}" for section, option, deeper in dotted if option not in FILES and not deeper]
    flags = [flag.replace("-", "_") for flag in FLAG.findall(text)]
    return [name for name in named if name not in options] + [flag for flag in flags if flag not in flags_known]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each string and comment of a source file, or what a template says outside of its code."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, TEMPLATE_CODE.sub(" ", source)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.mark.slow
@pytest.mark.parametrize("package", COMMANDS)
def test_every_option_that_is_named_exists(package):
    paths = sorted(path for pattern in ("*.py", "*.jinja") for path in (ROOT / package).rglob(pattern))
    found = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in paths for line, text in texts(path)
             for name in unknown_options(text, COMMANDS[package])]
    assert len(paths) > 20 and found == []


# Named in tables of other trainers' options, in the benchmarks' commands, or of a section named before.
OF_OTHERS = {"compare", "families", "predict", "model", "chats", "data", "method", "parts", "contenders", "rounds", "steps", "compared",
             "no_deps", "target", "campaign_seed"}


@pytest.mark.parametrize("page", ["README.md", "trainer/README.md", "synth/README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_every_option_of_a_page_exists(page):
    text = re.sub(r"\(\S+\)|<!-- benchmark.*?<!-- end of benchmark -->", " ", (ROOT / page).read_text(), flags=re.DOTALL)  # links, tables
    assert [name for name in unknown_options(text, COMMANDS["synth"]) if name not in OF_OTHERS] == []


def test_an_option_that_does_not_exist_is_found():
    assert unknown_options("lower optim.lr, or add --dry-run; see --optim.lr, data.json and model.layers.0", TRAINER) == []
    assert unknown_options("checkpoint.resume goes on; add --lora.ranks 3.", TRAINER) == ["checkpoint.resume", "lora.ranks"]
