"""Interpolate between a base and what was trained from it (WiSE-FT): `python -m trainer.interpolate`.

    θ(α) = (1 - α) θ_base + α θ_tuned         α = 0 is the base, α = 1 the tuned model

WiSE-FT (Wortsman et al., arXiv 2109.01903): a point between often keeps most of what both can do. An adapter adds s B A to weights that do
not change, so its point at α is the adapter with B scaled by α, which PEFT and vLLM load. DoRA also divides by a norm that depends on A
and B, so points between are no adapters: merge, and interpolate whole models. These need memory for both models and one point; sums are
computed in fp32 and rounded to the tuned model's dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR

from trainer import cli
from trainer.config import Config, Lora, Model
from trainer.errors import UserError
from trainer.files import atomic_folder, sole_owner
from trainer.model import lora
from trainer.model.checkpoint_rest import add_rest
from trainer.model.export import save_generation_config, save_weights
from trainer.model.loading import meta_model
from trainer.model.locate import load_tokenizer, model_source, one_line_errors, require_own_weights_of_hub
from trainer.model.own_files import is_own, require_own_settings
from trainer.model.saved_adapter import adapter_settings
from trainer.model.text_part import auto_class
from trainer.model.vocabulary import trains_vocabulary

UNFINISHED = ".unfinished.yaml"  # in the output, while several alphas are written: the options of the call

USAGE = """\
usage: python -m trainer.interpolate --model.path BASE --adapter RUN/adapter --alpha 0.5 --output FOLDER
       python -m trainer.interpolate --model.path BASE --tuned RUN/model --alpha [0.25,0.5,0.75] --output FOLDER

Writes the model or adapter at alpha on the line from the base (0) to what was trained from it (1): WiSE-FT.
One alpha is written to FOLDER, several to FOLDER/alpha-0.25 and so on."""


@dataclass
class Interpolate:
    """Options of `python -m trainer.interpolate --model.path M --adapter A`."""

    output: str = ""  # the folder that is written; with several alphas, a folder in it for each
    model: Model = field(default_factory=Model)  # the base
    adapter: str | None = None  # an adapter folder that was trained on the base
    tuned: str | None = None  # instead of `adapter`: a whole model's folder, tuned from the base
    alpha: float | list[float] = 0.5  # how far from the base, 0 to 1; a list for several points


def main() -> int:
    return cli.main(interpolate, Interpolate, "trainer.interpolate", USAGE)


def interpolate(config: Interpolate) -> None:
    """Write the model or adapter at each alpha.

    Raises UserError for anything that does not fit, before anything is written.
    """
    alphas = check(config)
    with sole_owner(Path(config.output), "trainer.interpolate"):
        _write(config, alphas)


def _write(config: Interpolate, alphas: list[float]) -> None:
    """Write the model or adapter at each alpha, and print where.

    Of several, those that a stopped call wrote are kept.
    """
    write_at, output = adapter_writer(config) if config.adapter else model_writer(config), Path(config.output)
    if not isinstance(config.alpha, list):
        write_at(alphas[0], output)
        print(f"alpha {alphas[0]:g}: {output}", flush=True)
        return
    cli.save_yaml(config, output / UNFINISHED)
    for alpha in alphas:
        folder = output / f"alpha-{alpha:g}"
        written = folder.is_dir()
        if not written:
            write_at(alpha, folder)
        print(f"alpha {alpha:g}: {folder}" + (", written before" if written else ""), flush=True)
    (output / UNFINISHED).unlink()


def check(config: Interpolate) -> list[float]:
    """Return the alphas. Raises UserError for options that no interpolation can use."""
    alphas = config.alpha if isinstance(config.alpha, list) else [config.alpha]
    if not config.output.strip():
        raise UserError("output: expected a folder to write, got none")
    if config.model.path is None:
        raise UserError("model.path: expected the base of the training run, got none")
    if (config.adapter is None) == (config.tuned is None):
        raise UserError(f"adapter, tuned: expected one of them, got {'neither' if config.adapter is None else 'both'}")
    if not alphas or len({f"{alpha:g}" for alpha in alphas}) < len(alphas):
        raise UserError(f"alpha: expected one or more different numbers, got {alphas}")
    if wrong := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise UserError(f"alpha: expected 0 (the base) to 1 (what was trained), got {wrong[0]:g}")
    _check_output(config)
    return alphas


def _check_output(config: Interpolate) -> None:
    """Check that the output is new, or that a stopped call with these options left it. Raises UserError."""
    output = Path(config.output)
    if output.is_dir() and not {path.name for path in output.iterdir()} - {".lock"}:  # of a killed call
        return
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        if yaml.safe_load((output / UNFINISHED).read_text()) == dataclasses.asdict(config):
            return
    if output.exists():
        raise UserError(f"output: expected a folder that is new or empty, found {output} in use; choose another")


# ---------------------------------------------------------------- adapters


def adapter_writer(config: Interpolate) -> Callable[[float, Path], None]:
    """Return a function that writes the adapter at alpha to a folder.

    Raises UserError unless it is an adapter of this base, without DoRA.
    """
    folder = Path(config.adapter).expanduser()
    if trains_vocabulary(config.adapter, "adapter"):
        raise UserError(f"adapter: {folder} trains rows of the embedding or head, which cannot be scaled; merge it (--export.format "
                        "merged) and give the merged model as --tuned")
    kind = "qlora" if is_quantized(config.model) else "lora"
    require_own_settings("adapter", folder, ["adapter_config.json"])
    with torch.device("meta"):
        lora.add_adapter(meta_model(Config(model=config.model, method=kind)), Lora(path=str(folder)))
    if adapter_settings("adapter", folder).get("use_dora"):
        raise UserError(f"adapter: {folder} is a DoRA adapter, which cannot be scaled; merge it (--export.format "
                        "merged) and give the merged model as --tuned")

    def write(alpha: float, output: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        scaled = {name: scaled_by(alpha, tensor) if ".lora_B." in name or ".lora_embedding_B" in name else tensor
                  for name, tensor in tensors.items()}
        with atomic_folder(output) as tmp:
            copy_others(folder, tmp)
            save_file(scaled, tmp / "adapter_model.safetensors", metadata={"format": "pt"})

    return write


def is_quantized(model: Model) -> bool:
    """Return whether a checkpoint holds quantised weights."""
    with one_line_errors("model.path", model.path):
        found = AutoConfig.from_pretrained(model_source(model), trust_remote_code=model.trust_remote_code)
    return getattr(found, "quantization_config", None) is not None


def scaled_by(alpha: float, tensor: Tensor) -> Tensor:
    """Return alpha * tensor, computed in fp32 and rounded to the tensor's dtype."""
    return (alpha * tensor.float()).to(tensor.dtype)


def copy_others(folder: Path, tmp: Path) -> None:
    """Copy the files beside the weights: adapter configuration, tokenizer, chat templates.

    Links out of the folder are left out, and told.
    """
    for path in sorted([*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*")]):
        if not path.is_file() or ".safetensors" in path.name or path.suffix in (".bin", ".pt"):
            continue
        if not is_own(folder, path):
            print(f"adapter: {path} is a link out of its folder, and is left out", flush=True)
            continue
        copy = tmp / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)


# ---------------------------------------------------------------- whole models


def model_writer(config: Interpolate) -> Callable[[float, Path], None]:
    """Return a function that writes the model at alpha to a folder.

    Raises UserError unless both models have weights of equal names and shapes.
    """
    if (folder := Path(config.tuned).expanduser()).is_dir():
        require_own_settings("tuned", folder)
    tuned_model = Model(path=config.tuned, trust_remote_code=config.model.trust_remote_code)
    tokenizer = load_tokenizer(tuned_model)
    base, tuned = load(config.model, "model.path"), load(tuned_model, "tuned")
    base_state, tuned_state = base.state_dict(), tuned.state_dict()
    shapes = [{(name, tuple(tensor.shape)) for name, tensor in state.items()} for state in (base_state, tuned_state)]
    if unlike := sorted(shapes[0] ^ shapes[1]):
        where = config.model.path if unlike[0] in shapes[0] else config.tuned
        raise UserError(f"tuned: expected weights of the same names and shapes as in {config.model.path}, but {unlike[0][0]} "
                        f"{unlike[0][1]} is only in {where}; give the base that it was tuned from")

    def write(alpha: float, output: Path) -> None:
        by_storage: dict[int, Tensor] = {}  # a tied weight stays one
        state = {name: by_storage.setdefault(end.data_ptr(), between(alpha, base_state[name], end)) for name, end in tuned_state.items()}
        with atomic_folder(output) as tmp:
            save_weights(tuned, tmp, state)
            add_rest(tmp, tuned, tuned_state)
            save_generation_config(tuned, tmp)
            tokenizer.save_pretrained(tmp)

    return write


def load(model: Model, option: str) -> PreTrainedModel:
    """Load a whole dense model, towers included, in the dtype that it was saved in, on the CPU."""
    source = model_source(model)
    if is_quantized(model):
        raise UserError(f"{option}: expected dense weights, found quantised ones in {source}; use the model that they were quantised from")
    with one_line_errors(option, source):
        require_own_weights_of_hub(option, source)
        own_class = auto_class(AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code))
        return own_class.from_pretrained(source, dtype="auto", use_safetensors=True, trust_remote_code=model.trust_remote_code)


def between(alpha: float, base: Tensor, tuned: Tensor) -> Tensor:
    """Return (1 - alpha) base + alpha tuned, computed in fp32 and rounded to tuned's dtype.

    At alpha 1, and for integers, it is `tuned` itself.
    """
    if alpha == 1 or not tuned.is_floating_point():
        return tuned
    return torch.lerp(base.float(), tuned.float(), alpha).to(tuned.dtype)


if __name__ == "__main__":
    sys.exit(main())
