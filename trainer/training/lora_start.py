"""Start an adapter from its layers' inputs, or from what 4 bits lose of their weights.

EVA (Paischer et al., arXiv 2410.07170) is PEFT's. LoftQ (Li et al., arXiv 2310.08659) is here, with one iteration, as PEFT's needs a GPU
and leaves the adapter's scale out: s B A is the best approximation of its rank to W - dequantised W, and the 4-bit base stays as it is.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from transformers.pytorch_utils import Conv1D

from kernels.nf4 import dequantize_nf4
from trainer.config import Config
from trainer.data.samples import Samples
from trainer.errors import UserError, one_line
from trainer.evaluation.generation import stock_attention
from trainer.model.loading import load_model
from trainer.model.lora import adapted_weights
from trainer.model.quantization import is_quantized, nf4_of

SAMPLES, BATCH = 256, 4  # that are looked at, at most, and those in a batch


def from_inputs(model: PeftModel, samples: Samples, device: torch.device) -> str:
    """Make A the main directions of the layers' inputs, and return a line that says so.

    B stays 0, and ranks stay as they are. Raises UserError if PEFT finds none, as with fewer tokens than the rank.
    """
    begun, config = time.perf_counter(), model.peft_config[model.active_adapter]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    chosen = np.random.default_rng(0).permutation(len(samples))[:SAMPLES]
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    try:
        with stock_attention(model), warnings.catch_warnings(action="ignore"), torch.no_grad():
            initialize_lora_eva_weights(model, _Batches(samples, batches, device), gather_distributed_inputs=False,
                                        show_progress_bar=False)
    except (ValueError, RuntimeError, torch.linalg.LinAlgError) as error:
        raise UserError(f"lora.init: expected training data whose inputs give a start by eva, found otherwise ({one_line(str(error))}); "
                        "choose default") from error
    finally:
        config.init_lora_weights, config.eva_config = True, None  # what is saved is an adapter like any other
    return f"lora.init: eva, from {len(chosen):,} samples, in {time.perf_counter() - begun:.1f} s"


@torch.no_grad()
def from_quantization_error(model: PeftModel, config: Config) -> str:
    """Make s B A what 4-bit weights lack of the checkpoint's, as far as the rank allows.

    Returns a line that says so. Raises UserError for a checkpoint that is itself in 4 bits.
    """
    begun, before, after = time.perf_counter(), 0.0, 0.0
    try:
        weights = load_model(replace(config, method="full", precision="fp32"), "cpu")[0].state_dict()
    except UserError as error:
        raise UserError(f"lora.init: expected a dense checkpoint beside loftq, found otherwise ({error})") from None
    for name, layer in adapted_weights(model.get_base_model()).items():
        base = layer.get_base_layer()
        if not is_quantized(base):
            continue
        adapter, held = layer.active_adapters[0], nf4_of(base)
        weight = weights[name].t() if getattr(base, "source_cls", None) is Conv1D else weights[name]
        residual = weight.to(held.device) - dequantize_nf4(held, torch.float32)
        rank = layer.r[adapter]
        U, S, V = torch.linalg.svd(residual, full_matrices=False)
        root = (S[:rank] / layer.scaling[adapter]).sqrt()
        layer.lora_A[adapter].weight.copy_(root[:, None] * V[:rank])
        layer.lora_B[adapter].weight.copy_(U[:, :rank] * root)
        before, after = before + float(S.square().sum()), after + float(S[rank:].square().sum())
    return (f"lora.init: loftq takes back {1 - (after / before) ** 0.5 if before else 0:.0%} of the error of 4-bit weights (norm), in "
            f"{time.perf_counter() - begun:.1f} s")


class _Batches:
    """Padded batches of samples, which can be gone through again and again."""

    def __init__(self, samples: Samples, batches: list[np.ndarray], device: torch.device):
        self.samples, self.batches, self.device = samples, batches, device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.batches:
            ids = [torch.as_tensor(self.samples[int(i)][0].astype(np.int64)) for i in batch]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            lengths = torch.tensor([len(one) for one in ids])
            mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).long()
            yield {"input_ids": padded.to(self.device), "attention_mask": mask.to(self.device)}
