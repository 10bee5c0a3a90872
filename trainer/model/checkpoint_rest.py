"""Complete an exported model with what its base's files hold beside the weights that were loaded.

These are the towers of a checkpoint that also reads images or sound, layers that transformers does not load (multi-token prediction), and
the settings of image and sound processors. Tensors are copied as they stand, into a shard of their own.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from kernels.nf4 import dequantize_nf4
from trainer.model.own_files import is_own, require_own
from trainer.model.quantization import import_bitsandbytes, nf4_view

QUANT_STATE = ".quant_state.bitsandbytes__"  # of a weight in 4 bits, in bitsandbytes' files
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def add_rest(folder: Path, model: PreTrainedModel, loaded: Iterable[str]) -> None:
    """Add to the exported `folder` of `model` what its base has beside the weights of the names `loaded`."""
    if rest := rest_of_checkpoint(model, loaded):
        _add_shard(folder, rest)
    for name in PROCESSOR_FILES:
        if found := base_file(model, name):
            shutil.copy(found, folder / name)


def rest_of_checkpoint(model: PreTrainedModel, loaded: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of the base's files that `model` did not load, by their names in the files.

    `loaded` are the stock names of its weights. Tensors beside a weight of the same layer are left out: scales of a quantised one.
    Weights in 4 bits are dequantised, as the exported model is dense.
    """
    rest = {}
    for file, names in rest_names(model, loaded).items():
        with safe_open(file, "pt") as tensors:
            rest |= {name: tensors.get_tensor(name) for name in names}
    return _dequantized(rest)


def rest_names(model: PreTrainedModel, loaded: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the tensors of `rest_of_checkpoint`, by file.

    Raises UserError for a file that is a link out of the base's folder: its tensors would be copied as they stand.
    """
    loaded = set(loaded)
    layers = {name.rpartition(".")[0] for name in loaded}
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known = dict.fromkeys(loaded, True)
    rest = defaultdict(list)
    for file in checkpoint_files(model):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
                of_weight = name in loaded or any(end in loaded for end in _beginnings(renamed))
                if not of_weight and renamed.rpartition(".")[0] not in layers:
                    rest[file].append(name)
        if rest[file]:
            require_own("model.path", Path(file), Path(file).parent)
    return rest


def _beginnings(name: str) -> Iterator[str]:
    """Yield a dotted name, and what is left of it as its parts are removed from the end."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with those in 4 bits dequantised.

    NF4 is read by our kernel, as bitsandbytes misreads some widths.
    """
    for name in [state.partition(QUANT_STATE)[0] for state in tensors if QUANT_STATE in state]:
        functional = import_bitsandbytes("model.path").functional
        parts = {part: tensors.pop(part) for part in list(tensors) if part.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, "cpu")
        if state.quant_type == "nf4" and len(state.shape) == 2:
            tensors[name] = dequantize_nf4(nf4_view(tensors[name], state, tuple(state.shape), state.dtype))
        else:
            tensors[name] = functional.dequantize_4bit(tensors[name], state)
    return tensors


def checkpoint_files(model: PreTrainedModel) -> list[str]:
    """Return the safetensors files that a model was loaded from, in a folder or the hub's cache.

    There are none for random weights.
    """
    if whole := base_file(model, SAFE_WEIGHTS_NAME):
        return [whole]
    index = base_file(model, SAFE_WEIGHTS_INDEX_NAME)
    return get_checkpoint_shard_files(model.name_or_path, index, local_files_only=True)[0] if index else []


def base_file(model: PreTrainedModel, name: str) -> str | None:
    """Return the path of one of the base's files, in its folder or the hub's cache, or None.

    Random weights have none, and a link out of the folder is none, except to weights, which were loaded through it.
    """
    if not model.name_or_path:
        return None
    base = Path(model.name_or_path)
    if base.exists():
        return str(base / name) if (base / name).is_file() and (is_own(base, base / name) or name in WEIGHTS) else None
    return cached_file(model.name_or_path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)


def _add_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as one more shard of a saved model."""
    save_file(tensors, folder / "rest.safetensors", metadata={"format": "pt"})
    shards, weight_map, size = [*sorted(folder.glob("model*.safetensors")), folder / "rest.safetensors"], {}, 0
    for i, shard in enumerate(shards, 1):
        path = shard.rename(folder / f"model-{i:05}-of-{len(shards):05}.safetensors")
        with safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
        size += path.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
