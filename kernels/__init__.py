"""The operations that fine-tuning spends its time in, as plain functions of tensors.

One file holds one operation: its maths, hand-derived gradients, a torch reference (which is the CPU path), Triton kernels and its public
function. Nothing here knows about models or trainers; only torch is needed, and Triton on a GPU. `serving` says whether Triton or the
reference serves a device and dtype. The import name is shared with Hugging Face's hub client: see `_hub_client`.
"""

from kernels import _hub_client
from kernels._dispatch import serving
from kernels.attention import packed_attention
from kernels.glu import glu
from kernels.grouped_lora import grouped_lora_linear
from kernels.linear_cross_entropy import TokenStatistics, linear_cross_entropy, linear_cross_entropy_statistics, linear_log_prob
from kernels.linear_kl import linear_kl
from kernels.lora import Lora, lora_linear, lora_qkv
from kernels.lora_mlp import lora_mlp
from kernels.nf4 import Nf4, dequantize_nf4
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope

__all__ = [
    "Lora", "Nf4", "TokenStatistics", "add_rms_norm", "apply_rope", "dequantize_nf4", "glu", "grouped_lora_linear",
    "linear_cross_entropy", "linear_cross_entropy_statistics", "linear_kl", "linear_log_prob", "lora_linear", "lora_mlp", "lora_qkv",
    "packed_attention", "qk_norm_rope", "rms_norm", "serving",
]

__getattr__ = _hub_client.lend(__name__, __path__)
