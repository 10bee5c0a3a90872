"""The operations that fine-tuning spends its time in, each with hand-derived gradients, as plain functions of tensors.

One file holds one operation: its maths, a torch reference (which is the CPU path), and its public function. Nothing here knows about
models or trainers, and nothing but torch is needed. The import name is shared with Hugging Face's hub client: see `_hub_client`.
"""

from kernels import _hub_client
from kernels.attention import packed_attention
from kernels.glu import glu
from kernels.linear_cross_entropy import linear_cross_entropy, linear_log_prob
from kernels.lora import Lora, lora_linear, lora_qkv
from kernels.lora_mlp import lora_mlp
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope

__all__ = [
    "Lora", "apply_rope", "glu", "linear_cross_entropy", "linear_log_prob", "lora_linear", "lora_mlp", "lora_qkv", "packed_attention",
    "rms_norm",
]

__getattr__ = _hub_client.lend(__name__, __path__)
