"""Locate a model's files, compute their fingerprint, and count its parameters."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import struct
from fnmatch import fnmatch
from pathlib import Path

from synth.config import Model
from synth.engines.interface import EngineError
from trainer.model.gguf import converted, is_gguf
from trainer.model.locate import require_own_weights

# Files that decide a model's output: weights, configuration, tokenizer and chat template. Not pickled weights, which can run code.
FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt",
         "*.model", "*.tiktoken", "tekken.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
         "additional_chat_templates/*")
CODE = ("*.py",)
READ_WHOLE = 64_000_000  # bytes up to which all of a file goes into the fingerprint
PIECE = 1_000_000  # bytes of a larger file that do: after its header, and at its end


def locate(model: Model) -> Path:
    """Return the folder of a model; a hub name is downloaded unless it is cached, a GGUF file converted.

    Raises EngineError where there is no such model, or no safetensors file in it.
    """
    folder = Path(model.path).expanduser()
    if is_gguf(folder):
        folder = converted(folder.resolve(), model.path)
    elif not folder.is_dir():
        folder = _snapshot(model)
    if not (folder / "config.json").is_file():
        raise EngineError(f"{model.path}: expected a model folder with config.json, got none")
    if not any(folder.glob("*.safetensors")):
        raise EngineError(f"{model.path}: expected weights in *.safetensors, got none; save the model again with save_pretrained")
    require_own_weights("base, responders or judges", folder)
    return folder.resolve()


def _snapshot(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model.path, allow_patterns=[*FILES, *(CODE if model.trust_remote_code else ())]))
    except HFValidationError:
        raise EngineError(f"{model.path}: expected a folder or hub name, got what is neither") from None
    except (OSError, ValueError) as error:  # offline, unknown, gated: all of the hub's errors are one or the other
        raise EngineError(f"{model.path}: no such folder, and no download under this name from the hub "
                          f"({type(error).__name__}); give a folder, or check name, network and access") from error


def fingerprint(folder: Path) -> str:
    """Return a digest of the model's files, which does not depend on where they lie."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in FILES):
            size = path.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            _update(digest, path, size)
    return digest.hexdigest()


def _update(digest, path: Path, size: int) -> None:
    """Add a file to the digest: a small one whole.

    Of a large one, which holds weights, the header and a piece at each end.
    """
    with path.open("rb") as file:
        if size <= READ_WHOLE:
            digest.update(file.read())
            return
        start = file.read(8)
        header = struct.unpack("<Q", start)[0] if path.suffix == ".safetensors" else 0
        digest.update(start + file.read(min(header, READ_WHOLE) + PIECE))
        file.seek(size - PIECE)
        digest.update(file.read())


def count_parameters(folder: Path) -> int:
    """Return the number of parameters, from the headers of the weight files."""
    return sum(_count_in_file(path) for path in folder.glob("*.safetensors"))


def _count_in_file(path: Path) -> int:
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            return sum(math.prod(map(operator.index, tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")
        except (struct.error, ValueError, MemoryError, OverflowError, RecursionError, TypeError, AttributeError, KeyError):
            raise EngineError(f"{path}: expected a safetensors file, got one that cannot be read; fetch or save the model again") from None
