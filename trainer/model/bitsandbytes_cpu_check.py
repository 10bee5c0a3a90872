"""Find 4-bit layers that bitsandbytes misreads on this CPU.

bitsandbytes 0.50.2 has a bug on CPUs with AVX-512: where a layer's width is not a multiple of the block size, so that rows do not end
with a block, some weights get the scales of others. Our kernels read such layers correctly, but not every layer runs them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from kernels.nf4 import dequantize_nf4
from trainer.errors import UserError
from trainer.model.quantization import import_bitsandbytes, is_quantized, nf4_of, quant_state_of, why_not_nf4


def refuse_misread_layers(unfused: Iterable[nn.Module]) -> None:
    """Check that bitsandbytes dequantises these layers, which run its own forward, as our kernels do.

    Raises UserError for the first one that is misread.
    """
    if (width := misread_width(unfused)) is not None:
        raise UserError(f"method qlora: on this CPU bitsandbytes misreads layers of width {width}, not a multiple of the block size, and "
                        "not all of the model's are fused; train on a GPU, or with method lora")


def misread_width(layers: Iterable[nn.Module]) -> int | None:
    """Return the width of a layer that bitsandbytes misreads on this CPU; None: there is none."""
    checked_widths = set()
    for layer in layers:
        if not is_quantized(layer) or layer.weight.device.type != "cpu" or layer.in_features in checked_widths or why_not_nf4(layer):
            continue
        checked_widths.add(layer.in_features)
        theirs = import_bitsandbytes("method qlora").functional.dequantize_4bit(layer.weight.data, quant_state_of(layer))
        if not torch.equal(theirs, dequantize_nf4(nf4_of(layer), theirs.dtype)):
            return layer.in_features
    return None
