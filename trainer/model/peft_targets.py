"""Name an adapter's targets so that PEFT adapts just these, here and wherever the adapter is loaded.

transformers 5 holds as 3-D parameters the experts that transformers 4 held as linear layers. For the families that changed, PEFT 0.21
rewrites the targets of every adapter that it makes or loads: names such as `gate_proj` then mean the experts and no longer the linear
layers of that name, which dense layers and shared experts still have. Here an adapter is made without that, and its folder names these
layers by their weights, as target parameters, which PEFT leaves as they are and for which it saves tensors of the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils import transformers_weight_conversion
from transformers import PreTrainedModel

from trainer.model.linear_layers import linear_layers

REWRITE = "convert_peft_config_for_transformers"  # PEFT's function


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


def write_targets(model: PreTrainedModel, folder: Path) -> None:
    """Change an adapter folder's configuration so that stock PEFT adapts the layers that were trained."""
    saved = PeftConfig.from_pretrained(folder)
    if rewritten := {target for target in saved.target_modules if is_rewritten(model, target)}:
        saved.target_modules = sorted(set(saved.target_modules) - rewritten)
        saved.target_parameters = sorted({*(saved.target_parameters or ()), *(f"{target}.weight" for target in rewritten)})
        saved.save_pretrained(folder)


def as_modules(model: PreTrainedModel, saved: LoraConfig) -> LoraConfig:
    """Return a saved configuration for `targets_as_given`, with linear layers as target modules again.

    PEFT's own rewriting is done first, as stock PEFT would do it.
    """
    getattr(transformers_weight_conversion, REWRITE)(saved, model=model, conversions=None)
    linear = {f".{name}.weight" for name in linear_layers(model)}
    layers = {target for target in saved.target_parameters or () if any(name.endswith(f".{target}") for name in linear)}
    if layers:
        saved.target_parameters = sorted(set(saved.target_parameters) - layers)
        saved.target_modules = sorted({*saved.target_modules, *(target.removesuffix(".weight") for target in layers)})
    return saved
