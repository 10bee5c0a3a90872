"""`python -m trainer.interpolate`: models on the line from a base to what was trained from it, for the curve of what each point keeps.

    θ(α) = (1 - α) θ_base + α θ_tuned         α = 0 is the base, α = 1 the tuned model

WiSE-FT (Wortsman et al., arXiv 2109.01903): a point between often keeps most of both. An adapter adds s B A to weights that stay, so its
points are itself with B scaled by α, again an adapter that PEFT and vLLM load. (DoRA also divides by a norm that depends on A and B, so
the points between are no adapters: merge, and interpolate whole models.) Whole models are both held in memory, and one point beside them;
sums are made in fp32 and rounded to the tuned model's dtype.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from trainer import cli, config
from trainer.errors import UserError
from trainer.files import atomic_folder
from trainer.model import lora
from trainer.model.loading import meta_model
from trainer.model.locate import load_tokenizer, model_source, one_line_errors

USAGE = """\
usage: python -m trainer.interpolate --model.path BASE --adapter RUN/adapter --alpha 0.5 --output FOLDER
       python -m trainer.interpolate --model.path BASE --tuned RUN/model --alpha [0.25,0.5,0.75] --output FOLDER

Writes the model, or adapter, that lies at alpha on the line from the base (0) to what was trained from it (1): WiSE-FT.
One alpha is written to FOLDER, several to FOLDER/alpha-0.25 and so on."""


@dataclass
class Interpolate:
    """Points on the line from a base to what was trained from it: `python -m trainer.interpolate --model.path M --adapter A`."""

    output: str = ""  # the folder that is written; with several alphas, a folder in it for each
    model: config.Model = field(default_factory=config.Model)  # the base
    adapter: str | None = None  # an adapter folder that was trained on the base
    tuned: str | None = None  # instead of `adapter`: a whole model's folder, tuned from the base
    alpha: float | list[float] = 0.5  # how far from the base, 0 to 1; a list for several points


def main() -> int:
    return cli.main(interpolate, Interpolate, "trainer.interpolate", USAGE)


def interpolate(asked: Interpolate) -> None:
    """Write each point. UserError for anything that does not fit, before anything is written."""
    alphas = check(asked)
    if not sys.stderr.isatty():
        disable_progress_bar()
    write = adapter_points(asked) if asked.adapter else model_points(asked)
    for alpha in alphas:
        folder = Path(asked.output) / f"alpha-{alpha:g}" if isinstance(asked.alpha, list) else Path(asked.output)
        write(alpha, folder)
        print(f"alpha {alpha:g}: {folder}", flush=True)


def check(asked: Interpolate) -> list[float]:
    """The points that are asked for."""
    alphas = asked.alpha if isinstance(asked.alpha, list) else [asked.alpha]
    if not asked.output.strip():
        raise UserError("output: expected a folder to write, got none")
    if asked.model.path is None:
        raise UserError("model.path: expected the base that was trained from, got none")
    if (asked.adapter is None) == (asked.tuned is None):
        raise UserError(f"adapter, tuned: expected one of them, got {'neither' if asked.adapter is None else 'both'}")
    if not alphas or len(set(map(folder_number, alphas))) < len(alphas):
        raise UserError(f"alpha: expected one or more different numbers, got {alphas}")
    if wrong := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise UserError(f"alpha: expected 0 (the base) to 1 (what was trained), got {wrong[0]:g}")
    if Path(asked.output).exists() and (not Path(asked.output).is_dir() or any(Path(asked.output).iterdir())):
        raise UserError(f"output: expected a folder that is new or empty, found {asked.output} in use; choose another")
    return alphas


def folder_number(alpha: float) -> str:
    return f"{alpha:g}"


# ---------------------------------------------------------------- adapters


def adapter_points(asked: Interpolate) -> Callable[[float, Path], None]:
    """What writes the adapter at alpha, once it is known to be one of this base that can be scaled."""
    folder = Path(asked.adapter).expanduser()
    kind = "qlora" if is_quantized(asked.model) else "lora"
    with torch.device("meta"):
        lora.add_adapter(meta_model(config.Config(model=asked.model, method=kind)), config.Lora(path=str(folder)))
    if json.loads((folder / "adapter_config.json").read_text()).get("use_dora"):
        raise UserError(f"adapter: {folder} is DoRA, which has no adapters between itself and the base; merge it (--export merged) "
                        "and give the merged model as --tuned")

    def write(alpha: float, output: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        scaled = {name: scaled_by(alpha, tensor) if ".lora_B." in name or ".lora_embedding_B" in name else tensor
                  for name, tensor in tensors.items()}
        with atomic_folder(output) as aside:
            copy_others(folder, aside)
            save_file(scaled, aside / "adapter_model.safetensors", metadata={"format": "pt"})

    return write


def is_quantized(settings: config.Model) -> bool:
    with one_line_errors("model.path", settings.path):
        found = AutoConfig.from_pretrained(model_source(settings), trust_remote_code=settings.trust_remote_code)
    return getattr(found, "quantization_config", None) is not None


def scaled_by(alpha: float, tensor: Tensor) -> Tensor:
    return (alpha * tensor.float()).to(tensor.dtype)


def copy_others(folder: Path, aside: Path) -> None:
    """The files beside the weights: settings, tokenizer, chat template."""
    for path in folder.iterdir():
        if path.is_file() and ".safetensors" not in path.name and path.suffix not in (".bin", ".pt"):
            shutil.copy(path, aside / path.name)


# ---------------------------------------------------------------- whole models


def model_points(asked: Interpolate) -> Callable[[float, Path], None]:
    """What writes the model at alpha, once both are read and known to have weights of the same names and shapes."""
    settings = config.Model(path=asked.tuned, tokenizer=asked.model.tokenizer, trust_remote_code=asked.model.trust_remote_code)
    tokenizer, (base, tuned) = load_tokenizer(settings), map(load, (asked.model, settings), ("model.path", "tuned"))
    ends = base.state_dict(), tuned.state_dict()
    shapes = [{(name, tuple(tensor.shape)) for name, tensor in end.items()} for end in ends]
    if unlike := sorted(shapes[0] ^ shapes[1]):
        where = asked.model.path if unlike[0] in shapes[0] else asked.tuned
        raise UserError(f"tuned: expected weights of the same names and shapes as in {asked.model.path}, but {unlike[0][0]} "
                        f"{unlike[0][1]} is only in {where}; give the base that it was tuned from")

    def write(alpha: float, output: Path) -> None:
        made: dict[int, Tensor] = {}  # by storage: a tied weight stays one
        state = {name: made.setdefault(end.data_ptr(), between(alpha, ends[0][name], end)) for name, end in ends[1].items()}
        with atomic_folder(output) as aside:
            tuned.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)

    return write


def load(settings: config.Model, option: str) -> PreTrainedModel:
    """A dense model in the dtype that it was saved in, on the CPU."""
    source = model_source(settings)
    if is_quantized(settings):
        raise UserError(f"{option}: expected dense weights, found quantised ones in {source}; use the model that it was made from")
    with one_line_errors(option, source):
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True,
                                                    trust_remote_code=settings.trust_remote_code)


def between(alpha: float, base: Tensor, tuned: Tensor) -> Tensor:
    """(1 - alpha) base + alpha tuned in fp32, rounded to the tuned dtype; the tuned one itself at 1, and where there are no fractions."""
    if alpha == 1 or not tuned.is_floating_point():
        return tuned
    return torch.lerp(base.float(), tuned.float(), alpha).to(tuned.dtype)


if __name__ == "__main__":
    sys.exit(main())
