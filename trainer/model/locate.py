"""Where a model is described and its tokenizer lies: a folder or a name on the hub, checked; what is unfit is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer import config
from trainer.errors import UserError

TOKENIZER_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # not tokenizer_config.json, which has no tokens


def load_tokenizer(settings: config.Model) -> PreTrainedTokenizerBase:
    """The tokenizer of `settings.tokenizer`, or the model's own. UserError where there is none."""
    option, source = "model.tokenizer", _locate("model.tokenizer", settings.tokenizer) if settings.tokenizer else model_source(settings)
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise UserError(f"{option}: no tokenizer in {folder}; set {option} to a folder or hub name that has one")
    with one_line_errors(option, source):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)


def model_source(settings: config.Model) -> str:
    """Where the model is described: a folder with weights, a config.json, or a name on the hub."""
    if (settings.path is None) == (settings.config is None):
        raise UserError("model.path, model.config: expected exactly one of them, got " + ("neither" if settings.path is None else "both"))
    if settings.path is not None:
        source = _locate("model.path", settings.path)
        if Path(source).exists():
            _check_folder(Path(source))
        return source
    path = Path(settings.config).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"model.config: expected a config.json or its folder, found no file {file}")
    return str(file.resolve())


def _locate(option: str, given: str) -> str:
    """An absolute path where there is such a file or folder; else `given`, if it may be a name on the hub."""
    path = Path(given).expanduser()
    if path.exists():
        return str(path.resolve())
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", given):
        raise UserError(f"{option}: there is no folder {given}")
    return given


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise UserError(f"model.path: {folder} holds an adapter; set lora.path to it and model.path to its base model ({base})")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: expected a model folder with config.json, found none in {folder}")
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    if pickled := next(folder.glob("pytorch_model*.bin"), None):
        raise UserError(
            f"model.path: {folder} has pickled weights only ({pickled.name}), which can run code; only safetensors are loaded. "
            "If you trust it, convert it: AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)")
    raise UserError(f"model.path: expected model.safetensors (or its index), found none in {folder}")


@contextmanager
def one_line_errors(option: str, source: str | Path) -> Iterator[None]:
    """Turn what the libraries raise for unreadable, unknown or unreachable models into one line, without their warnings before it."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
        why = " ".join(str(error).split()).partition(" Model type should be one of ")[0]
        if "trust_remote_code" in why:
            why = "it needs Python code of its own; add --model.trust_remote_code true if you trust it"
        elif not Path(source).exists():
            why = f"no such folder here, and not to be had from the hub under this name ({type(error).__name__})"
        raise UserError(f"{option}: cannot load {source}: {why[:300]}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
