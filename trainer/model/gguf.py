"""Turn a GGUF file into a model folder, which everything else reads.

The folder lies in the Hugging Face cache and is made once for each file. Quantised weights become dense, in bf16.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections import Counter
from pathlib import Path

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.errors import UserError, one_line
from trainer.files import atomic_folder
from trainer.model.own_files import require_own_settings

logger = logging.getLogger(__name__)

PIECE = 4_000_000  # bytes at each end of a file that go into its digest; the header is among the first
DTYPES = {"F32": torch.float32, "F16": torch.float16}  # of the file's matrices; all others become bf16


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file in GGUF."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def converted(file: Path, option: str) -> Path:
    """Return the folder of a GGUF file's model: config, safetensors weights, tokenizer and chat template.

    Raises UserError, which names `option`, for a file that cannot be converted.
    """
    folder = Path(HF_HOME) / "steadfast-gguf" / f"{file.stem}-{_digest(file)}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{option}: expected a model folder or the package gguf, which reads {file.name}; "
                        "pip install 'steadfast-sft[gguf]'")
    require_own_settings(option, file.parent, ["generation_config.json"])  # which transformers reads beside the file
    with atomic_folder(folder, lambda error: f"{option}: cannot write the model of {file.name} to {folder}: {error}; "
                                             "set HF_HOME to a folder with more room") as made:
        try:
            _convert(file, made)
        except (ValueError, LookupError, TypeError, RuntimeError, ImportError, AttributeError) as error:
            raise UserError(f"{option}: cannot read {file} as GGUF: {one_line(str(error))}; "
                            "use a folder with safetensors weights") from error
    logger.warning("%s: %s is dense now, in %s", option, file.name, folder)
    return folder


def _digest(file: Path) -> str:
    """Return what tells a file from others of its name."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        pieces = stream.read(PIECE)
        stream.seek(max(0, size - PIECE))
        pieces += stream.read()
    return hashlib.blake2b(pieces + f"{size} {file.stat().st_mtime_ns}".encode(), digest_size=6).hexdigest()


def _convert(file: Path, folder: Path) -> None:
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        dense = {} if not hasattr(transformers, "GgufConfig") else {"quantization_config": transformers.GgufConfig(dequantize=True)}
        model, info = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True,
                                                           **dense)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
        model.to(_dtype(file)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _dtype(file: Path) -> torch.dtype:
    """Return the dtype that holds most of a file's matrices without loss, bf16 for quantised ones."""
    from gguf import GGUFReader

    elements = Counter()
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            elements[tensor.tensor_type.name] += int(tensor.n_elements)
    return DTYPES.get(elements.most_common(1)[0][0], torch.bfloat16)
