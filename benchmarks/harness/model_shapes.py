"""Shapes of the models that benchmarks train or whose layers they time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The shape of a Llama, or of a Qwen3 where queries and keys are normalised."""

    name: str
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int
    qk_norm: bool = False

    @property
    def linear_weights(self) -> int:
        """Return the number of weights in the linear layers: those that QLoRA stores in NF4."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp)


LLAMA_8B = ModelShape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256, 32)
QWEN_4B = ModelShape("Qwen3-4B", 2560, 9728, 32, 8, 128, 151936, 36, qk_norm=True)
LLAMA_1B = ModelShape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256, 16)
MODELS = (LLAMA_8B, QWEN_4B, LLAMA_1B)  # of the benchmarks on a GPU, the largest first

SMALL = ModelShape("7m", 256, 704, 4, 2, 64, 8192, 4)
LARGER = ModelShape("100m", 768, 2048, 12, 4, 64, 8192, 14)
CPU_MODELS = {shape.name: shape for shape in (SMALL, LARGER)}
REAL = "smollm2"  # the name of the model that has trained weights
