"""A model's files: where they lie, what tells one model from another, how large it is and how long its context."""

from __future__ import annotations

import hashlib
import json
import struct
from fnmatch import fnmatch
from pathlib import Path

from synth.config import Model
from synth.engines.interface import EngineError

# What decides a model's words: weights, configuration, tokenizer and chat template. Pickled weights are not among them: they can run code.
FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt",
         "*.model", "*.tiktoken", "tekken.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
         "additional_chat_templates/*")
CODE = ("*.py",)
WHOLE = 64_000_000  # bytes up to which a file is read whole for its fingerprint
ENDS = 1_000_000  # bytes read at the end of a larger one, and after its header


def locate(model: Model) -> Path:
    """The folder of a model: as given, or the snapshot of a hub name, which is fetched if need be. EngineError where there is none."""
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        folder = _snapshot(model)
    if not (folder / "config.json").is_file():
        raise EngineError(f"{model.path}: expected a model folder with config.json, found none")
    if not any(folder.glob("*.safetensors")):
        raise EngineError(f"{model.path}: expected weights in *.safetensors, found none; save the model again with save_pretrained")
    return folder.resolve()


def _snapshot(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model.path, allow_patterns=[*FILES, *(CODE if model.trust_remote_code else ())]))
    except HFValidationError:
        raise EngineError(f"{model.path}: there is no such folder, and no model can have this name on the hub") from None
    except (OSError, ValueError) as error:  # offline, unknown, gated: all of the hub's errors are one or the other
        raise EngineError(f"{model.path}: no such folder here, and not to be had from the hub under this name "
                          f"({type(error).__name__}); give a folder, or check name, network and access") from error


def fingerprint(folder: Path) -> str:
    """A digest of the model's files, equal for equal files wherever they lie."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in FILES):
            size = path.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            _update(digest, path, size)
    return digest.hexdigest()


def _update(digest, path: Path, size: int) -> None:
    """All of a small file; of a large one, which holds weights, the header and a piece at each end."""
    with path.open("rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
            return
        start = file.read(8)
        header = struct.unpack("<Q", start)[0] if path.suffix == ".safetensors" else 0
        digest.update(start + file.read(min(header, WHOLE) + ENDS))
        file.seek(size - ENDS)
        digest.update(file.read())


def parameters(folder: Path) -> int:
    """How many numbers the weights hold, from the headers of their files."""
    return sum(_numbers(path) for path in folder.glob("*.safetensors"))


def _numbers(path: Path) -> int:
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        except (struct.error, ValueError, MemoryError, OverflowError):
            raise EngineError(f"{path}: expected a safetensors file, found none that can be read; fetch or save the model again") from None
    count = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for dimension in tensor["shape"]:
                size *= dimension
            count += size
    return count
