"""Reload an export as a user would, and compare its log-probs with the trained model's.

Both models read a few samples, held out where there are such. Stock classes of transformers and PEFT load the export on the run's device,
whose memory is free by then, or on the CPU if it lacks space. How much rounding may change is measured, by the input moved by one unit in
the last place. A folder that differs is renamed, so that nobody serves it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from trainer.data.batch import collate
from trainer.data.samples import Piece, Samples
from trainer.errors import UserError
from trainer.model.bitsandbytes_cpu_check import misread_width
from trainer.model.checkpoint_rest import checkpoint_files
from trainer.model.forward import forward_hidden, lm_head, unwrap_peft
from trainer.model.quantization import quantized_layers
from trainer.model.text_part import auto_class
from trainer.model.vocabulary import trains_vocabulary
from trainer.training.training_run import TrainingRun

SAMPLES, TOKENS = 8, 128  # at most: samples, and tokens of each
ROUNDING = 8  # units in the last place of 1 that log-probs may differ by, in the mean over tokens
FROM_NOISE = 4  # times what one unit in the last place of the input changes
TF32 = 2.0**-10  # what a GPU may round factors of fp32 products to
NOT_LOADED = ("inv_freq", "masked_bias", "attn.bias", "attention.bias")  # ends of names in old files, of what is computed


@dataclass
class Trained:
    """The model that was trained, as far as a comparison needs it once it is out of memory."""

    samples: list[Tensor]  # int64[n] each
    log_probs: Tensor  # fp32, of every token but the first of each sample
    dtype: torch.dtype
    device: torch.device
    quantization: object | None  # of a base that was quantised as it was loaded
    trust_remote_code: bool
    base_names: set[str]  # of the tensors in the base's files
    base_bytes: int  # of these files


def check_exports(run: TrainingRun, folders: Sequence[Path]) -> None:
    """Compare every exported folder with the trained model, and print a line for each.

    The weights in memory are gone afterwards. An adapter whose base stock code misreads on this CPU is not checked. Raises UserError for a
    folder that does not give the trained model's log-probs.
    """
    misread = misread_width(quantized_layers(unwrap_peft(run.model)))
    trained = measure_trained(run)
    _free(run)
    for folder in folders:
        if misread is not None and (folder / "adapter_config.json").is_file():
            print(f"WARNING: {folder} is not checked: on this CPU bitsandbytes misreads the base's layers of width {misread}, not a "
                  "multiple of its block size; serve it on a GPU, or merged")
            continue
        needed = _bytes_to_load(folder, trained)
        place = _place(trained.device, needed)
        if place is None:
            print(f"WARNING: {folder} is not checked: loading it takes {needed / 1e9:.1f} GB of memory, which are not free")
            continue
        try:
            with _silence():
                fault, line = compare(folder, trained, place)
        except (torch.OutOfMemoryError, MemoryError) as error:
            print(f"WARNING: {folder} is not checked, as memory ran out: {error}")
            continue
        except Exception as error:  # stock code fails in ways of its own
            fault = f"stock classes cannot run it, {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if fault:
            raise UserError(f"export: {folder.name}/ is not what was trained: {fault}; it is now {_put_aside(folder)}; "
                            "report this, or use another --export.format")
        print(f"checked: {folder} {line}")


def measure_trained(run: TrainingRun) -> Trained:
    """Run the trained model on a few samples of the eval set, or else of the training data."""
    base, samples = unwrap_peft(run.model), run.eval_set.samples if run.eval_set else run.loader.samples
    pieces = _pieces(samples)
    run.model.eval()
    with torch.no_grad():
        head, batch = lm_head(base), collate(pieces).to(run.device)
        log_probs = [target_log_probs(head.logits(hidden), ids) for hidden, ids in zip(
            forward_hidden(run.model, batch).split([len(piece.input_ids) for piece in pieces]), _tokens(pieces, run.device))]
    quantised_while_loading = run.config.method == "qlora" and getattr(AutoConfig.from_pretrained(
        base.name_or_path, trust_remote_code=run.config.model.trust_remote_code), "quantization_config", None) is None
    return Trained(_tokens(pieces, "cpu"), torch.cat(log_probs).cpu(), base.dtype, run.device,
                   base.config.quantization_config if quantised_while_loading else None, run.config.model.trust_remote_code,
                   {name for file in checkpoint_files(base) for name in safe_open(file, "pt").keys()},
                   sum(Path(file).stat().st_size for file in checkpoint_files(base)))


def _pieces(samples: Samples) -> list[Piece]:
    """Return the beginnings of some samples that have targets."""
    usable = [i for i in range(len(samples)) if samples.lengths[i] > 1]
    chosen = usable[:: max(1, len(usable) // SAMPLES)][:SAMPLES]
    return [Piece(ids[:TOKENS], supervised[:TOKENS]) for ids, supervised in (samples[i] for i in chosen)]


def _tokens(pieces: Sequence[Piece], device: torch.device | str) -> list[Tensor]:
    return [torch.tensor(piece.input_ids, dtype=torch.int64, device=device) for piece in pieces]


def target_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probs [T - 1] of tokens [T] under logits [T, V], each by those before it."""
    return logits[:-1].float().log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


@torch.no_grad()
def compare(folder: Path, trained: Trained, device: torch.device) -> tuple[str | None, str]:
    """Return how an exported folder differs from the trained model, and how near it is.

    The first is None if rounding explains what differs.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    model = load_adapter(folder, trained, device) if is_adapter else load_whole(folder, trained, device)

    def log_probs() -> Tensor:
        samples = [ids.to(device) for ids in trained.samples]
        return torch.cat([target_log_probs(model(input_ids=ids[None]).logits[0], ids) for ids in samples]).cpu()

    found, unit = log_probs(), torch.finfo(trained.dtype).eps
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * (1 + unit))
    moved = log_probs()
    floor = ROUNDING * max(unit, TF32 if trained.device.type == "cuda" else 0.0) + 1e-3
    limit = floor + FROM_NOISE * float((moved - found).abs().mean())
    change = found - trained.log_probs
    apart, shift = float(change.abs().mean()), abs(float(change.mean()))
    lost = set() if is_adapter else _lost_names(folder, model, trained)
    if not (apart <= limit and shift <= limit / 4):
        fault = f"its log-probs differ by {apart:.2g} nats a token ({shift:.2g} in the mean), rounding explains {limit:.2g}"
        return fault + (f"; it lacks {len(lost)} tensors of the base's files, such as {min(lost)}" if lost else ""), ""
    names = f"; it lacks {len(lost)} tensors of the base's files, such as {min(lost)}, without which it computes the same" if lost else ""
    return None, f"gives the trained model's log-probs within {apart:.1g} nats over {len(change):,} tokens{names}"


def load_whole(folder: Path, trained: Trained, device: torch.device, **options) -> PreTrainedModel:
    """Load a model folder or hub name with transformers' own class."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trained.trust_remote_code)
    return auto_class(config).from_pretrained(folder, dtype=trained.dtype, device_map=device if device.type == "cuda" else None,
                                              trust_remote_code=trained.trust_remote_code, **options).eval()


def load_adapter(folder: Path, trained: Trained, device: torch.device) -> PeftModel:
    """Load an adapter folder with PEFT, on the base that it names."""
    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    options = {} if trained.quantization is None else {"quantization_config": trained.quantization}
    base = load_whole(name, trained, device, **options)
    if trains_vocabulary(str(folder)) and (rows := len(AutoTokenizer.from_pretrained(folder))) > len(base.get_input_embeddings().weight):
        base.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(base, folder).eval()


def _lost_names(folder: Path, model: PreTrainedModel, trained: Trained) -> set[str]:
    """Return the base's names that a model folder lacks.

    Tied and quantised weights have other names by right.
    """
    if any(end in name for name in trained.base_names for end in ("absmax", "qweight", "_scale", "scales")):
        return set()
    names = {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}
    return {name for name in trained.base_names - names if not name.endswith((*NOT_LOADED, *(model._tied_weights_keys or ())))}


def _put_aside(folder: Path) -> Path:
    """Rename a folder that differs from what was trained, and return its new path."""
    aside = folder.with_name(f"{folder.name}-differs")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


@contextmanager
def _silence() -> Iterator[None]:
    """Silence warnings of transformers and PEFT, which the comparison makes superfluous."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _bytes_to_load(folder: Path, trained: Trained) -> float:
    """Return the memory that loading and running a folder takes, about."""
    base = trained.base_bytes if (folder / "adapter_config.json").is_file() else 0
    return 1.1 * (base + sum(file.stat().st_size for file in folder.glob("*.safetensors"))) + 5e8


def _place(device: torch.device, needed: float) -> torch.device | None:
    """Return the device that has so many bytes free, the run's own or the CPU; None if neither has."""
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu") if needed <= psutil.virtual_memory().available else None


@torch.no_grad()
def _free(run: TrainingRun) -> None:
    """Free the memory of weights, masters and moments."""
    run.optimizer.free()
    for parameter in run.model.parameters():
        parameter.grad, parameter.data = None, torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
