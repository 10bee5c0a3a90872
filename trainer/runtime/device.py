"""Choose the device and the compute dtype."""

from __future__ import annotations

from typing import Literal

import torch

from trainer.errors import UserError


def choose_device(option: Literal["auto", "cuda", "cpu"], local_rank: int = 0) -> torch.device:
    """Return the device of the option `device`; `auto` prefers a GPU, the one of this rank's number.

    A GPU has its index: without one it is a thread's current GPU, the first in every thread but the one that chose another, and libraries
    load weights in threads of their own. Raises UserError for `cuda` where there is no GPU, and for a rank that has none of its own.
    """
    if option == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected a CUDA GPU, found none; use --device cpu")
    if option == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (count := torch.cuda.device_count()) <= local_rank:
        raise UserError(f"device: expected a GPU for each rank on this machine, found {count} for rank {local_rank} (counted from 0); "
                        "start fewer ranks, or use --device cpu")
    return torch.device("cuda", local_rank)


def compute_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """Return the dtype to compute in; `auto` means bf16 on a GPU that has it, else fp32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def fast_bf16() -> bool:
    """Return whether the CPU has bf16 matmul instructions; without them bf16 is emulated, and slow."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")
