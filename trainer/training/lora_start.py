"""Start an adapter from its layers' inputs on training data: EVA (Paischer et al., arXiv 2410.07170)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights

from trainer.data.samples import Samples
from trainer.errors import UserError, one_line
from trainer.evaluation.generation import stock_attention

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
            initialize_lora_eva_weights(model, _Batches(samples, batches, device), show_progress_bar=False)
    except (ValueError, RuntimeError, torch.linalg.LinAlgError) as error:
        raise UserError(f"lora.init: expected training data whose inputs give a start by eva, found otherwise ({one_line(str(error))}); "
                        "choose default") from error
    finally:
        config.init_lora_weights, config.eva_config = True, None  # what is saved is an adapter like any other
    return f"lora.init: eva, from {len(chosen):,} samples, in {time.perf_counter() - begun:.1f} s"


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
