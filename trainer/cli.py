"""YAML and dotted overrides into a configuration dataclass; every mistake becomes one line that names the key and the remedy."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import re
import signal
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from trainer.errors import UserError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}  # a disk that is full, or not ours to write on
RECORDED = ("versions", "command")  # blocks of a run's own config.yaml that are no options: read over when it is given back


def parse(kind: type, argv: list[str], prog: str):
    """An instance of the dataclass `kind` from `--config F.yaml` and `--section.key value` overrides.

    Raises UserError for anything that does not fit. `--help` and `--print_config` print and exit with status 0.
    """
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=kind.__doc__)
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(kind, None)
    for record in RECORDED:
        parser.add_argument(f"--{record}", type=Any, help=argparse.SUPPRESS)
    try:
        for path in _config_files(argv):
            _check_yaml(path)
        parsed = parser.parse_args(_lone_switches(kind, argv))
        _check_sections(kind, parsed)
        config = parser.instantiate(parsed)
        return kind(**{f.name: getattr(config, f.name) for f in dataclasses.fields(kind)})
    except ArgumentError as error:
        raise UserError(_explain(str(error), kind)) from None
    except RecursionError:
        raise UserError("--config: a YAML file includes itself; expected plain keys and values") from None


def known_keys(kind: type, prefix: str = "") -> dict[str, type]:
    """Dotted name -> annotated type, of every option of a configuration dataclass."""
    keys = {}
    for name, annotation in typing.get_type_hints(kind).items():
        keys[prefix + name] = annotation
        if dataclasses.is_dataclass(annotation):
            keys |= known_keys(annotation, f"{prefix}{name}.")
    return keys


def save_yaml(config, path: Path, **extra) -> None:
    """Write a configuration, complete with defaults, and further blocks below it."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config) | extra, sort_keys=False, width=120))


def main(run, kind: type, prog: str, usage: str) -> int:
    """Parse, call `run(config)`, and turn a UserError, or a disk that refuses, into one line on standard error.

    Returns the exit status: that of `run`, 1 for an error, 2 for usage, 130 after Ctrl-C.
    """
    if len(sys.argv) == 1:
        print(usage, file=sys.stderr)
        return 2
    try:
        config = parse(kind, sys.argv[1:], prog)
    except UserError as error:
        return _complain(prog, error, 2)
    try:
        return run(config) or 0
    except KeyboardInterrupt:  # in a run's start or end, or a second one
        return _complain(prog, UserError("interrupted at once; what was saved before is whole"), 128 + signal.SIGINT)
    except UserError as error:
        return _complain(prog, error, 1)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return _complain(prog, UserError(f"{error.filename or 'output'}: {error.strerror}; free space, or choose another folder"), 1)


def _complain(prog: str, error: UserError, status: int) -> int:
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _lone_switches(kind: type, argv: list[str]) -> list[str]:
    """`--dry_run` alone means `--dry_run true`."""
    switches = {f"--{key}" for key, annotation in known_keys(kind).items() if annotation is bool}
    spelled = []
    for here, following in zip(argv, [*argv[1:], "--"]):
        spelled += [here, "true"] if here in switches and following.startswith("--") else [here]
    return spelled


def _config_files(argv: list[str]) -> Iterator[Path]:
    """The files given by `--config F` or `--config=F`."""
    for here, following in zip(argv, [*argv[1:], ""]):
        option, _, value = here.partition("=")
        if option == "--config" and (value or following):
            yield Path(value or following)


def _check_yaml(path: Path) -> None:
    """Refuse a file that is not keys and values, or gives a key twice, of which YAML would keep the last in silence."""
    try:
        top = yaml.compose(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config: expected UTF-8 text in {path}, found byte {error.object[error.start]:#x}; convert the file") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"--config: {path}, line {error.problem_mark.line + 1}: expected YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise UserError(f"--config: expected YAML in {path}: {error}") from None
    if not isinstance(top, yaml.MappingNode):
        found = "nothing" if top is None else {"!!seq": "a list"}.get(top.tag.replace("tag:yaml.org,2002:", "!!"), "a lone value")
        raise UserError(f"--config: expected keys and values in {path}, found {found}; --print_config shows how they look")
    _check_keys(top, path)


def _check_keys(node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UserError(f"--config: {path}, line {line}: {key.value} was given before, on line {seen[key.value]}; keep one of them")
            seen[key.value] = line
            _check_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, path)


def _check_sections(kind: type, parsed: Namespace) -> None:
    """A section is keys and values, which the parser does not check."""
    for key, annotation in known_keys(kind).items():
        if dataclasses.is_dataclass(annotation) and not isinstance(parsed.get(key), Namespace):
            example = next(iter(known_keys(annotation, f"{key}.")))
            raise UserError(f"{key}: expected a section of options, such as {example}, got {parsed.get(key)}")


def _explain(message: str, kind: type) -> str:
    """jsonargparse's words, shorter, on one line, with the nearest known key where one was misspelt."""
    message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
    keys = list(known_keys(kind))
    if found := re.match(r"unrecognized arguments: (?:--)?(\S+)", message):
        return _unknown(found[1].split("=")[0], keys)
    if found := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _unknown(f"{found[1]}.{found[2]}", keys)
    if found := re.match(r"Option '([\w.]+)' is not accepted", message):
        return _unknown(found[1], keys)
    entry = r"(.*?): Does not validate.*class_path '(?:[\w.]+\.)?(\w+)': "  # the option, and what it is a list of
    if found := re.match(entry + r"Option '(\w+)", message):
        return f"{_key(found[1])}: unknown key {found[3]!r} in a {found[2].lower()}; --help lists what it takes"
    if found := re.match(entry + r"the following arguments are required: (\w+)", message):
        return f"{_key(found[1])}: expected {found[3]} in every {found[2].lower()} of the list, found one without"
    if found := re.match(entry + r'Parser key "(\w+)": (.*?) Given value type', message):
        return f"{_key(found[1])}: {found[3]} of a {found[2].lower()}: {_plain(found[4])}"
    if found := re.match(r"(.*?): Does not validate.* Subtypes: \[(\w+), NoneType\] .* Given value: (.*)", message):
        return f"{_key(found[1])}: expected {found[2]} or null, got {found[3]}"
    if found := re.match(r'Parser key "(\w+)": Unable to load config', message):
        example = next(key for key in keys if key.startswith(f"{found[1]}."))
        return f"{found[1]}: expected its options one by one, as in --{example}; --help lists them"
    if found := re.match(r'(Parser key "[\w.]+"): (.*)', message):
        return f"{_key(found[1])}: {_plain(found[2])}"
    return _plain(message)


def _key(words: str) -> str:
    return words.removeprefix("Parser key").strip(' "')


def _unknown(key: str, keys: list[str]) -> str:
    """Prefer a key whose last part is what was typed (`lr` -> `optim.lr`), then the nearest spelling."""
    last = key.split(".")[-1]
    close = [k for k in keys if k.split(".")[-1] == last] or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    remedy = f"did you mean {close[0]}?" if close else "--print_config shows all"
    return f"unknown option {key}: {remedy}"


def _plain(message: str) -> str:
    message = message.replace("typing.", "").replace("Problems parsing config", "--config")
    message = re.sub(r"Literal\[(.*?)\]", r"one of \1", message)
    return re.sub(r"Expected (?:an? )?(.*?)\. Got value: (.*)", r"expected \1, got \2", message)
