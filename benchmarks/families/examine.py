"""Take a tiny model of a family through loading, a pack and training steps, beside stock transformers.

The model's weights are drawn so that every module matters: matrices keep the size of what they multiply, norms and biases differ from
their initial values. Stock transformers run every sample by itself.
"""

from __future__ import annotations

import logging
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from benchmarks.families.tiny_configs import PLACEHOLDER, model_type, tiny_config
from benchmarks.harness.synthetic_models import byte_pair_encoding, chat_tokenizer, quiet
from trainer.config import Config, Lora, Model
from trainer.data.batch import PackedBatch, collate
from trainer.data.samples import Piece
from trainer.errors import UserError
from trainer.evaluation.generation import stock_attention
from trainer.metrics.throughput import model_size
from trainer.model.export import merge_and_save, save_adapter
from trainer.model.forward import lm_head, supervised_hidden
from trainer.model.packed_attention import is_packed
from trainer.model.patch import PatchReport
from trainer.optim.adamw import FlatAdamW
from trainer.training.build import build_model
from trainer.training.loss import sft_loss
from trainer.training.memory_estimate import estimate

LENGTHS = (13, 1, 20, 13)
METHODS = ("lora", "qlora", "full")
CPU = torch.device("cpu")
FOLDER = "steadfast-family-"
TOLERANCE = 1e-4  # of logits and gradients: stock norms and rotations compute in fp32 even in an fp64 model


class Wrong(Exception):
    """A result that differs from stock transformers'."""


def examine(family: str) -> dict:
    """Return how a family's packs run, its errors against stock code, and the outcome of every stage."""
    quiet()
    row: dict = {"line": family, "mode": None, "why": None, "operations": {}, "stages": {}}
    with tempfile.TemporaryDirectory(prefix=FOLDER) as name, warnings_of("trainer") as warnings:
        folder = Path(name)
        if not _stage(row, "make", lambda: save_loud_model(family, folder / "base")):
            return row
        if _stage(row, "pack", lambda: compare_pack(folder / "base", row, warnings)):
            _stage(row, "generate", lambda: compare_generation(folder / "base"))
            _stage(row, "bf16", lambda: compare_in_bf16(folder / "base"))
            for method in METHODS:
                _stage(row, method, partial(train_step, folder, method))
    return row


def _stage(row: dict, name: str, run: Callable[[], object]) -> bool:
    """Note how a stage ended, and return whether it ended well."""
    try:
        run()
        row["stages"][name] = "ok"
    except UserError as error:
        row["stages"][name] = f"refused: {without_folder(str(error))}"
    except Wrong as error:
        row["stages"][name] = f"wrong: {error}"
    except Exception as error:
        row["stages"][name] = f"crash: {type(error).__name__}: {' '.join(str(error).split())[:200]} ({_place(error)})"
    return row["stages"][name] == "ok"


def without_folder(text: str) -> str:
    """Return a message without the place of the temporary folder."""
    return re.sub(rf"/\S*{FOLDER}[^/ ]*/", "", text)


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/trainer/" in frame.filename or "/kernels/" in frame.filename]
    shown = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], frames[-1])]
    return " ".join(dict.fromkeys(shown))


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a package's loggers."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


# ---------------------------------------------------------------- models


def stock_class(family: str) -> type:
    """Return the class that a checkpoint of the family is saved from."""
    return AutoModelForMultimodalLM if model_type(family) in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES else AutoModelForCausalLM


def save_loud_model(family: str, folder: Path, **settings) -> None:
    """Save a model of the family, whose configuration has these settings, and a tokenizer."""
    torch.manual_seed(0)
    model = stock_class(family).from_config(tiny_config(family, **settings), dtype=torch.float32)
    model.eval()
    make_loud(model)
    model(input_ids=torch.arange(5, 15)[None], use_cache=False)
    model.save_pretrained(folder)
    chat_tokenizer(byte_pair_encoding(["The answer is 7."] * 9, PLACEHOLDER)).save_pretrained(folder)


@torch.no_grad()
def make_loud(model: nn.Module) -> None:
    """Draw weights that matter: a matrix keeps the size of its input, a vector moves by a third."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(noise, alpha=0.3)


def stock_model(folder: Path) -> PreTrainedModel:
    """Load a folder with stock transformers, in the class it was saved from.

    Raises Wrong unless all its weights are there.
    """
    family = AutoConfig.from_pretrained(folder).model_type
    model, info = stock_class(family).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[kind])):
            raise Wrong(f"{len(keys)} {kind.replace('_', ' ')} of {type(model).__name__}, such as {keys[0]}")
    return model.eval()


def config_of(folder: Path, method: str) -> Config:
    return Config(model=Model(path=str(folder)), method=method, lora=Lora(rank=4, alpha=8.0), precision="fp32", device="cpu")


# ---------------------------------------------------------------- a pack


def pack(seed: int = 1) -> PackedBatch:
    """Return a pack of samples, of which half the tokens are supervised."""
    rng = np.random.default_rng(seed)
    return collate([Piece(rng.integers(5, PLACEHOLDER - 9, n).astype(np.int32), rng.random(n) < 0.5) for n in LENGTHS])


def stock_logits(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Return the logits at the supervised rows, each sample by itself."""
    samples = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples])[batch.supervised_rows]


def our_logits(model: nn.Module, batch: PackedBatch) -> Tensor:
    return lm_head(model).logits(supervised_hidden(model, batch))


def compare_pack(folder: Path, row: dict, warnings: list[str]) -> None:
    """Compare logits and gradients of the patched model's pack with the stock model's."""
    ours, report = build_model(config_of(folder, "full"), CPU)
    row["mode"], row["why"] = mode(ours, report), next((w.partition(": ")[2] for w in warnings if "one at a time" in w), None)
    row["operations"] = report.backends
    model_size(ours)
    stock, batch, ours = stock_model(folder), pack(), ours.eval()
    try:
        expected = stock_logits(stock.double(), batch)
    except RuntimeError:  # its code names fp32
        stock, ours = stock.float(), ours.float()
        expected = stock_logits(stock, batch)
    ours = ours.to(stock.dtype)
    found = our_logits(ours, batch)
    row["logits"] = relative_error(found, expected)
    true, found = gradients(stock, expected), gradients(ours, found)
    row["gradients"], where = worst_gradient(found, true)
    if row["logits"] > TOLERANCE:
        raise Wrong(f"logits of a pack differ from stock ones by {row['logits']:.0e}")
    if row["gradients"] > 10 * TOLERANCE:
        raise Wrong(f"gradients of a pack differ from stock ones by {row['gradients']:.0e} ({where})")


def compare_generation(folder: Path) -> None:
    """Compare the tokens that the patched model generates from padded prompts with the stock model's."""
    ours, _ = build_model(config_of(folder, "full"), CPU)
    prompts = torch.tensor([[2, 2, 2, 7, 8, 9], [5, 6, 7, 8, 9, 10]])
    settings = dict(attention_mask=(prompts != 2).long(), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=2)
    try:
        expected = stock_model(folder).generate(prompts, **settings)
    except Exception:  # stock transformers cannot
        return
    with stock_attention(ours.eval()) as base:
        if not torch.equal(base.generate(prompts, **settings), expected):
            raise Wrong("generates other tokens than stock transformers")


def compare_in_bf16(folder: Path) -> None:
    """See that a pack in bf16 is as exact as stock transformers in bf16, and that LoRA trains on it.

    Rounding sends a few tokens to other experts, so the median over tokens counts.
    """
    batch, exact = pack(), stock_model(folder)
    ours, _ = build_model(replace(config_of(folder, "lora"), precision="bf16"), CPU)
    with torch.no_grad():
        expected = stock_logits(exact, batch)
        stock_error = median_error(stock_logits(exact.to(torch.bfloat16), batch), expected)
    (sft_loss(ours.train(), batch) / batch.weight_sum).backward()
    error = median_error(our_logits(ours.eval(), batch), expected)
    if error > max(3 * stock_error, 0.02):
        raise Wrong(f"logits of a pack in bf16 differ from exact ones by {error:.0e}, stock ones by {stock_error:.0e}")


def median_error(found: Tensor, exact: Tensor) -> float:
    """Return the median over tokens of the relative error of their logits [S,V]."""
    found, exact = found.detach().double(), exact.detach().double()
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


def mode(model: PreTrainedModel, report: PatchReport) -> str:
    """Return how a model's packs run."""
    if not is_packed(model):
        return "one by one"
    return ("packed" if "stock layers" in report.family else "fused") + ", mixers by sample" * ("mixers" in report.backends)


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a random combination of logits, by names without the wrappers of a decoder."""
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(logits.dtype)
    (logits * weight).sum().backward()
    return {plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model", "text_model"))


def relative_error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def worst_gradient(found: dict[str, Tensor], true: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest error of a gradient, and whose it is.

    It is relative to the gradient's norm, or to a thousandth of the largest norm.
    """
    if unmatched := sorted(found.keys() ^ true.keys()):
        nonzero = [name for name in unmatched if (found.get(name, true.get(name)) != 0).any()]
        if nonzero:
            raise Wrong(f"{len(nonzero)} weights have a gradient in one of stock and ours only, such as {nonzero[0]}")
    floor = 1e-3 * max(float(g.double().norm()) for g in true.values())
    errors = {name: float((found[name].double() - g.double()).norm() / max(float(g.double().norm()), floor))
              for name, g in true.items() if name in found}
    worst = max(errors, key=errors.get)
    return errors[worst], worst


# ---------------------------------------------------------------- steps


def train_step(folder: Path, method: str) -> None:
    """Train one step, and see that what is exported is what was trained."""
    config = config_of(folder / "base", method)
    model, _ = build_model(config, CPU)
    estimate(model, config, torch.float32, CPU)
    optimizer, batch = FlatAdamW(model.parameters(), config.optim), pack()
    model.train()
    if method != "full":
        stir(model)
    loss = sft_loss(model, batch) / batch.weight_sum
    loss.backward()
    if not loss.isfinite():
        raise Wrong(f"the loss is {float(loss)}")
    if method != "full" and (idle := [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]):
        raise Wrong(f"{len(idle)} adapter weights have no gradient, such as {idle[0]}")
    if not float(optimizer.step(1e-3)) > 0:
        raise Wrong("the gradient's norm is not above 0")
    if method == "qlora":
        return
    model.eval()
    with torch.no_grad():
        trained = our_logits(model, batch)
        _compare_export(model, folder, trained, batch)


def _compare_export(model: nn.Module, folder: Path, trained: Tensor, batch: PackedBatch) -> None:
    """See that what is exported gives the trained model's logits in stock code."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    if isinstance(model, PeftModel):
        save_adapter(model, folder / "adapter", tokenizer)
        served = PeftModel.from_pretrained(stock_model(folder / "base"), folder / "adapter").eval()
        kept = get_peft_model_state_dict(model)
        lost = [name for name, tensor in get_peft_model_state_dict(served).items() if not torch.equal(tensor, kept.get(name, tensor + 1))]
        if lost:
            raise Wrong(f"{len(lost)} adapter weights do not load in stock PEFT, such as {lost[0]}")
        if (error := relative_error(stock_logits(served, batch), trained)) > 10 * TOLERANCE:
            raise Wrong(f"logits of the adapter in stock PEFT differ by {error:.0e}")
    name = "merged" if isinstance(model, PeftModel) else "full"
    merge_and_save(model, tokenizer, folder / name)
    if (error := relative_error(stock_logits(stock_model(folder / name), batch), trained)) > 10 * TOLERANCE:
        raise Wrong(f"logits of the exported model in stock transformers differ by {error:.0e}")


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Give a new adapter values that matter."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
