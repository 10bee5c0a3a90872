"""Choose the device and the compute dtype."""

from __future__ import annotations

from typing import Literal

import torch

from trainer.errors import UserError


def choose_device(option: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """Return the device of the option `device`; `auto` prefers a GPU.

    Raises UserError for `cuda` where there is none.
    """
    if option == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected a CUDA GPU, found none; use --device cpu")
    return torch.device("cuda" if option != "cpu" and torch.cuda.is_available() else "cpu")


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
