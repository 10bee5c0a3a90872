"""Find a saved adapter's folder, read its configuration, and tell its content from another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download

from trainer.errors import UserError
from trainer.hub_names import is_hub_name
from trainer.json_files import read_object
from trainer.model.locate import one_line_errors

FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer*", "special_tokens_map.json", "chat_template*")


def find_adapter(option: str, name: str) -> Path:
    """Return the folder of an adapter; one that is named as on the hub is fetched.

    Raises UserError, which names the option, where there is none.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and is_hub_name(name, owned=True):
        with one_line_errors(option, name):
            folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{option}: expected a folder with adapter_config.json, found none in {folder}")
    return folder.resolve()


def adapter_settings(option: str, folder: Path) -> dict:
    """Return what the adapter's configuration says. Raises UserError where it cannot be read."""
    return read_object(option, folder / "adapter_config.json")


def adapter_tokenizer(folder: Path) -> str | None:
    """Return an adapter's folder if it holds the tokenizer and chat template it was trained with."""
    return str(folder) if (folder / "tokenizer.json").is_file() else None


def adapter_digest(folder: Path) -> str:
    """Return a digest of an adapter's files, which does not depend on where they lie."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0".encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
