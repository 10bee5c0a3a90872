"""List the model families that have fused layers, and what distinguishes each.

To add a family: add a row to FAMILIES and its name to the tests' list of families; failing tests show what else differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class Family:
    """Differences of a family's modules from Llama's."""

    norm_offset: float = 0.0  # 1.0: norms multiply by 1 + weight
    norm_eps: str = "variance_epsilon"  # the attribute of a norm that is its epsilon
    activation: str = "act_fn"  # the attribute of the MLP that is its activation
    window_in_config: bool = False  # every layer has the config's sliding window; otherwise the module's own, if any
    softcap: bool = False  # attention logits are capped
    # the norm applied to the residual stream right after attention is added to it; None: decoder layers keep their own forward
    stream_norm: str | None = "post_attention_layernorm"


BEFORE_MLP = "pre_feedforward_layernorm"  # in layers that also normalise the outputs of attention and MLP
GEMMA = Family(norm_offset=1.0, norm_eps="eps")
FAMILIES = {
    "llama": Family(),
    "mistral": Family(window_in_config=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": GEMMA,
    "gemma2": Family(norm_offset=1.0, norm_eps="eps", softcap=True, stream_norm=BEFORE_MLP),
    "gemma3_text": Family(norm_offset=1.0, norm_eps="eps", stream_norm=BEFORE_MLP),
    "phi3": Family(activation="activation_fn", window_in_config=True),
    "granite": Family(stream_norm=None),  # scales attention and MLP before adding them
    "olmo2": Family(stream_norm=None),  # in bf16 the stock norms round after the weight, ours before: as exact, not bit-identical
    "smollm3": Family(),
}
ACTIVATIONS = {type(ACT2FN[name]): ours for name, ours in (("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"))}


def family_of(model: PreTrainedModel) -> Family | None:
    """Return the model's row in FAMILIES.

    None for other families, for code that came with the model, and for bidirectional attention.
    """
    family = FAMILIES.get(model.config.model_type)
    own_code = type(model).__module__.startswith("transformers.models.")
    return family if own_code and not getattr(model.config, "use_bidirectional_attention", False) else None
