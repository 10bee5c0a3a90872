"""Name an adapter's targets and tensors so that PEFT finds just these layers wherever it is loaded.

transformers 5 holds as 3-D parameters the experts that transformers 4 held as linear layers, and renames parts of some checkpoints. So
PEFT 0.21 rewrites the targets of every adapter that it makes or loads for such a family: names like `gate_proj` then mean the experts and
no longer the linear layers of that name, which dense layers and shared experts still have. Here an adapter is made without that, and its
folder names these layers by their weights, as target parameters, which PEFT leaves as they are and for which it saves tensors of the same
names. Names of tensors it rewrites too, as from the checkpoint's layout to the model's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, transformers_weight_conversion
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from trainer.model.linear_layers import linear_layers
from trainer.model.text_part import dropped_towers, is_wrapped

logger = logging.getLogger(__name__)

REWRITE = "convert_peft_config_for_transformers"  # PEFT's function
PREFIX = "base_model.model."  # of tensors' names in an adapter's file
# Model types whose modules have other names than in the files, by which vLLM 0.32 does not know them: it leaves such an adapter out and
# says nothing. A test compares all types with vLLM's own maps.
NAMED_AS_IN_FILES = set("emu3 ernie4_5_vl_moe glm5_next glmasr granite_speech granite_speech_plus hunyuan_vl hy_v3 hy_v4 laguna "
                        "qianfan_ocr shieldgemma2 vibevoice_asr voxtral".split())


def is_rewritten(model: PreTrainedModel, target: str) -> bool:
    """Return whether PEFT, making or loading an adapter, takes this name of layers for experts' weights."""
    made = LoraConfig(target_modules=[target])
    try:
        getattr(transformers_weight_conversion, REWRITE)(made, model=model, conversions=None)
    except ValueError:  # it would rewrite the name, did others stand beside it
        return True
    return set(made.target_modules) != {target}


@contextmanager
def targets_as_given() -> Iterator[None]:
    """Keep PEFT from rewriting targets inside this context."""
    rewrite = getattr(transformers_weight_conversion, REWRITE)
    setattr(transformers_weight_conversion, REWRITE, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(transformers_weight_conversion, REWRITE, rewrite)


def make_loadable(model: PreTrainedModel, folder: Path) -> None:
    """Change an adapter folder so that stock PEFT and vLLM find in it what was trained.

    Towers that are not in memory are excluded by name, as PEFT keeps only the ends of targets' names. Tensors are named as the model's
    modules, or as in the checkpoint where these names would not survive PEFT's renaming or vLLM does not know them. Warns where that does
    not help.
    """
    saved = PeftConfig.from_pretrained(folder)
    targets = set() if isinstance(saved.target_modules, str) else set(saved.target_modules)
    if rewritten := {target for target in targets if is_rewritten(model, target)}:
        saved.target_modules = sorted(targets - rewritten)
        weights = rewritten if not is_wrapped(model) else {name for name in linear_layers(model) if _ends_with(name, rewritten)}
        saved.target_parameters = sorted({*(saved.target_parameters or ()), *(f"{target}.weight" for target in weights)})
    saved.exclude_modules = saved.exclude_modules or excluded_towers(model)
    saved.save_pretrained(folder)

    file = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(file)
    as_in_files = {name_in_checkpoint(model, name): tensor for name, tensor in tensors.items()}
    names = [as_in_files, tensors] if model.config.model_type in NAMED_AS_IN_FILES else [tensors, as_in_files]
    found = next((named for named in names if as_loaded(model, saved, named).keys() == tensors.keys()), None)
    if found is as_in_files:
        save_file(as_in_files, file, metadata={"format": "pt"})
    if found is None:
        logger.warning("PEFT does not find the adapter's tensors in %s, as it renames them; only a merged model can be served "
                       "(--export.format merged)", type(model).__name__)


def as_loaded(model: PreTrainedModel, saved: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors by the names under which PEFT looks for them."""
    return transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers(model, saved, dict(tensors))


def name_in_checkpoint(model: PreTrainedModel, name: str) -> str:
    """Return an adapter tensor's name with the checkpoint's name of its layer."""
    conversions = getattr(model, "_weight_conversions", None)  # those that loading this checkpoint took
    conversions = get_model_conversion_mapping(model) if conversions is None else conversions
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    plain = name.removeprefix(PREFIX)
    return PREFIX + rename_source_key(plain, [entry.reverse_transform() for entry in renamings[::-1]], [], reverse=True)[0]


def excluded_towers(model: PreTrainedModel) -> str | None:
    """Return the regular expression of names in towers that are not in memory, or None."""
    towers = dropped_towers(model)
    return rf"({'|'.join(map(re.escape, towers))})\..*" if towers else None


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    """Return whether a name is one of `ends`, or ends with one after a dot."""
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def as_modules(model: PreTrainedModel, saved: LoraConfig) -> LoraConfig:
    """Return a saved configuration for `targets_as_given`, with linear layers as target modules again.

    PEFT's own rewriting is done first, as stock PEFT would do it.
    """
    getattr(transformers_weight_conversion, REWRITE)(saved, model=model, conversions=None)
    if saved.exclude_modules == excluded_towers(model):  # PEFT warns of what excludes nothing
        saved.exclude_modules = None
    weights = [f"{name}.weight" for name in linear_layers(model)]
    layers = {target for target in saved.target_parameters or () if any(_ends_with(weight, [target]) for weight in weights)}
    if layers:
        saved.target_parameters = sorted(set(saved.target_parameters) - layers)
        saved.target_modules = sorted({*saved.target_modules, *(target.removesuffix(".weight") for target in layers)})
    return saved
