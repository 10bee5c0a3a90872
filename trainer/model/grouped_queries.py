"""Let stock attention on a CPU read every key once for all query heads that share it.

Where there is a mask, transformers' sdpa repeats keys and values for each query head at every step, as CUDA's fast kernels want it
(`use_gqa_in_sdpa`). torch's kernel for CPUs takes them as they are and returns the same bits, without the copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers.integrations import sdpa_attention


@contextmanager
def grouped_queries() -> Iterator[None]:
    """Leave keys and values of CPU tensors unrepeated in transformers' sdpa inside this context."""
    stock = sdpa_attention.use_gqa_in_sdpa

    def use_gqa(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
        return key.device.type == "cpu" and key.shape[-1] == value.shape[-1] or stock(attention_mask, key, value)

    sdpa_attention.use_gqa_in_sdpa = use_gqa
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = stock
