"""Parse YAML files and dotted overrides into a configuration dataclass.

Every mistake is one line that names the option and a remedy.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import io
import os
import re
import signal
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from trainer.errors import UserError, printable
from trainer.last_resort import as_user_error
from trainer.option_values import check_number, checked

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}  # a disk that is full, or that may not be written to
MOST_VALUES = 100_000  # in a YAML file
LONGEST = 2_000  # characters of an error: enough for two long paths
NOT_OPTIONS = ("versions", "command")  # blocks of a run's config.yaml that are no options: ignored when it is given as --config


def parse(kind: type, argv: list[str], prog: str):
    """Return a `kind`, a dataclass of options, from `--config F.yaml` and `--section.key value` overrides.

    Option names may have dashes for underscores, and a switch needs no value: `--dry-run` is `--dry_run true`. Raises UserError for
    anything that does not fit. `--help` and `--print_config` print and exit with status 0.
    """
    argv = _with_values(kind, _with_underscores(argv))
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=kind.__doc__,
                            epilog="--traceback prints the whole traceback of an error that is no mistake of the user's.")
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(kind, None)
    for block in NOT_OPTIONS:
        parser.add_argument(f"--{block}", type=Any, help=argparse.SUPPRESS)
    try:
        for path in _config_files(argv):
            _check_yaml(path)
        _check_values(kind, argv)
        parsed = parser.parse_args(argv)
        _check_sections(kind, parsed)
        config = parser.instantiate(parsed)
        return checked(kind(**{f.name: getattr(config, f.name) for f in dataclasses.fields(kind)}))
    except ArgumentError as error:
        raise UserError(_explain(str(error), kind)) from None
    except RecursionError:
        raise UserError("--config: a YAML file includes itself; expected plain keys and values") from None


def known_keys(kind: type, prefix: str = "") -> dict[str, type]:
    """Return the type of every option and section of a configuration dataclass, by dotted name."""
    keys = {}
    for name, annotation in typing.get_type_hints(kind).items():
        keys[prefix + name] = annotation
        if dataclasses.is_dataclass(annotation):
            keys |= known_keys(annotation, f"{prefix}{name}.")
    return keys


def save_yaml(config, path: Path, **extra) -> None:
    """Write a configuration with all its defaults, and the blocks `extra` below it."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config) | extra, sort_keys=False, width=120))


def main(run, kind: type, prog: str, usage: str) -> int:
    """Parse, call `run(config)`, and print any error as one line on standard error.

    With --traceback, errors that nobody foresaw come through.

    Returns the exit status: that of `run`, 1 for an error, 2 for usage, 130 after Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # since the package was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(sys.argv) == 1:
        print(usage, file=sys.stderr)
        return 2
    try:
        try:
            return _status(run, kind, prog, [argument for argument in sys.argv[1:] if argument != "--traceback"])
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE and _is_full(sys.stdout):  # whoever read it has gone, as `head` does
            return 128 + signal.SIGPIPE
        if error.errno not in DISK_ERRORS:
            return _unforeseen(prog, error)
        place = error.filename or ("standard output" if _is_full(sys.stdout) else "output")
        return _print_error(prog, UserError(f"{place}: {error.strerror}; free space, or choose another folder"), 1)
    except Exception as error:
        return _unforeseen(prog, error)


def _unforeseen(prog: str, error: Exception) -> int:
    """Print the error that is being handled as one line; with --traceback raise it."""
    if "--traceback" in sys.argv:
        raise error
    return _print_error(prog, as_user_error(error), 1)


def _status(run, kind: type, prog: str, argv: list[str]) -> int:
    """Parse and run, and print a UserError or Ctrl-C as one line."""
    try:
        config = parse(kind, argv, prog)
    except UserError as error:
        return _print_error(prog, error, 2)
    try:
        if not sys.stderr.isatty():
            _disable_progress_bars()
        return run(config) or 0
    except KeyboardInterrupt:  # in a run's start or end, or a second one
        return _print_error(prog, UserError("interrupted at once; earlier checkpoints are whole"), 128 + signal.SIGINT)
    except UserError as error:
        return _print_error(prog, error, 1)


def _is_full(stream: typing.TextIO) -> bool:
    """Return whether nothing more can be printed.

    The rest is then thrown away, as the interpreter would fail on it at its end.
    """
    try:
        stream.flush()
        os.write(stream.fileno(), b"\n")
    except io.UnsupportedOperation:  # no file
        return False
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        return True
    return False


def _disable_progress_bars() -> None:
    """Turn off the bars of transformers and datasets, which fill a log file; import neither.

    Those that are imported later read the environment, as child processes do.
    """
    for library in ("HUB", "DATASETS"):
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def _print_error(prog: str, error: UserError, status: int) -> int:
    """Print a mistake as one line, without the middle of a long one: a value in it may have any length."""
    line = printable(" ".join(str(error).split()))
    print(f"{prog}: error: {line if len(line) <= LONGEST else f'{line[:LONGEST // 2]} ... {line[-LONGEST // 2:]}'}", file=sys.stderr)
    return status


def _with_underscores(argv: list[str]) -> list[str]:
    """Spell option names with underscores: `--dry-run` is `--dry_run`, `--max-steps=3` `--max_steps=3`."""
    spelled = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        spelled.append("--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument)
    return spelled


def _with_values(kind: type, argv: list[str]) -> list[str]:
    """Give every lone switch its value: `--dry_run` is `--dry_run true`."""
    switches = {f"--{key}" for key, annotation in known_keys(kind).items() if annotation is bool}
    spelled = []
    for argument, following in zip(argv, [*argv[1:], "--"]):
        spelled += [argument, "true"] if argument in switches and following.startswith("--") else [argument]
    return spelled


def _config_files(argv: list[str]) -> Iterator[Path]:
    """Yield the files given by `--config F` or `--config=F`."""
    for argument, following in zip(argv, [*argv[1:], ""]):
        option, _, value = argument.partition("=")
        if option == "--config" and (value or following):
            yield Path(value or following)


def _check_values(kind: type, argv: list[str]) -> None:
    """Raise UserError for values on the command line that YAML would read as other numbers.

    Options that take text keep it as it is.
    """
    kinds = {f"--{key}": annotation for key, annotation in known_keys(kind).items()}
    for argument, following in zip(argv, [*argv[1:], ""]):
        option, equals, value = argument.partition("=")
        value = value if equals else following
        annotation = kinds.get(option)
        if value.startswith(("[", "{")) and annotation is not None:
            try:
                _check_node(yaml.compose(value), option[2:], {})
            except yaml.YAMLError:
                continue  # the parser says what is wrong with it
        elif annotation in (int, float) or {int, float} & {*typing.get_args(annotation)}:
            check_number(value, option[2:])


def _check_yaml(path: Path) -> None:
    """Raise UserError for a file that is not keys and values, or has a key twice (YAML keeps the last)."""
    try:
        top = yaml.compose(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config: expected UTF-8 text in {path}, found byte {error.object[error.start]:#x}; convert the file") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"--config: {path}, line {error.problem_mark.line + 1}: expected YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"--config: expected plain keys and values in {path}, found brackets in brackets; correct it") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise UserError(f"--config: expected YAML in {path}: {error}") from None
    if not isinstance(top, yaml.MappingNode):
        found = "nothing" if top is None else {"!!seq": "a list"}.get(top.tag.replace("tag:yaml.org,2002:", "!!"), "a lone value")
        raise UserError(f"--config: expected keys and values in {path}, found {found}; --print_config shows how they look")
    _check_node(top, f"--config: {path}", {})


def _check_node(node: yaml.Node | None, place: str, sizes: dict[int, int]) -> int:
    """Return the number of values in a node of YAML, each alias counted as what it stands for.

    Raises UserError for a key that is given twice or is no text, for numbers that are not in base 10, and for aliases without measure.
    `sizes` are those of the nodes seen so far, by id, 0 of those that are still being counted.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise UserError(f"{place}: expected plain keys and values, found an alias of what it stands in; write it out")
        return sizes[id(node)]
    sizes[id(node)] = 0
    size, seen = 1, {}
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        check_number(node.value, f"{place}, line {node.start_mark.line + 1}")
    for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        if key is not None:
            where = f"{place}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{where}: expected the name of an option as key, found a list or a mapping; correct it")
            if key.value in seen:
                raise UserError(f"{where}: {key.value} was given before, on line {seen[key.value]}; keep one of them")
            seen[key.value] = key.start_mark.line + 1
        size += _check_node(value, place, sizes)
        if size > MOST_VALUES:
            raise UserError(f"{place}: expected at most {MOST_VALUES:,} values, found more by its aliases; write out what is meant")
    sizes[id(node)] = size
    return size


def _check_sections(kind: type, parsed: Namespace) -> None:
    """Raise UserError for a section that is not keys and values: the parser does not check that."""
    for key, annotation in known_keys(kind).items():
        if dataclasses.is_dataclass(annotation) and not isinstance(parsed.get(key), Namespace):
            example = next(iter(known_keys(annotation, f"{key}.")))
            raise UserError(f"{key}: expected a section of options, such as {example}, got {parsed.get(key)}")


def _explain(message: str, kind: type) -> str:
    """Shorten a message of jsonargparse to one line, with the nearest known key where one was misspelt."""
    message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
    keys = list(known_keys(kind))
    if message.startswith("Unexpected config"):
        return "--config: expected options with values, found none; give values, or remove the options"
    if found := re.match(r"unrecognized arguments: (?:--)?(\S+)", message):
        return _unknown(found[1].split("=")[0], keys)
    if found := re.match(r"ambiguous option: --(\S+) could match (.*)", message):
        return f"unknown option {found[1].split('=')[0]}: did you mean one of {found[2].replace('--', '')}?"
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


def _key(text: str) -> str:
    """Return the option that a message of jsonargparse names."""
    return text.removeprefix("Parser key").strip(' "')


def _unknown(key: str, keys: list[str]) -> str:
    """Suggest a key whose last part was typed (`lr` -> `optim.lr`), else the nearest spelling."""
    last = key.split(".")[-1]
    close = [k for k in keys if k.split(".")[-1] == last] or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    remedy = f"did you mean {close[0]}?" if close else "--print_config shows all"
    return f"unknown option {key}: {remedy}"


def _plain(message: str) -> str:
    """Rewrite a message of jsonargparse as `expected X, got Y`."""
    message = message.replace("typing.", "").replace("Problems parsing config", "--config")
    message = re.sub(r"Literal\[(.*?)\]", r"one of \1", message)
    return re.sub(r"Expected (?:an? )?(.*?)\. Got value: (.*)", r"expected \1, got \2", message)
