"""Model families with fused layers: what sets each apart, and the forwards that their modules share.

`patch(model)` gives instances, never classes, a new `forward`: RMSNorm, attention, gated MLP, decoder layers, and linear layers with
adapters. Weights, names and classes stay, so state dicts, saving, hooks, checkpointing (which is around a layer's forward, in its class's
`__call__`) and stock code that looks at the model see nothing new. A forward is a functools.partial of a function of this file, which
pickles and copies with the module. Where one operation covers a norm, the norm's module does not run; one with hooks does.

To add a family: a row in FAMILIES, a line in the tests' list of families, and the tests say what is still different.

Shapes: T tokens, W model width, H query heads, Hk key heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class Family:
    """How a family's modules differ from Llama's."""

    norm_offset: float = 0.0  # 1.0: norms multiply by 1 + weight
    norm_eps: str = "variance_epsilon"  # the attribute of a norm that is its epsilon
    activation: str = "act_fn"  # the attribute of the MLP that is its activation
    window_in_config: bool = False  # every layer has the config's sliding window; otherwise the module's own, if any
    softcap: bool = False  # attention logits are capped
    # the norm that is taken of the residual stream right after attention has joined it; None leaves layers their own forward
    stream_norm: str | None = "post_attention_layernorm"


BEFORE_MLP = "pre_feedforward_layernorm"  # of layers that also normalise what attention and MLP give
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
    "granite": Family(stream_norm=None),  # a factor on what joins
    "olmo2": Family(stream_norm=None),  # in bf16 the stock norms round after the weight, ours before it: as exact, not bit-equal
    "smollm3": Family(),
}
ACTIVATIONS = {type(ACT2FN[name]): ours for name, ours in (("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"))}


def family_of(model: PreTrainedModel) -> Family | None:
    """The model's row in FAMILIES; None for other families, for code that came with the model, and for attention that looks ahead."""
    family = FAMILIES.get(model.config.model_type)
    own_code = type(model).__module__.startswith("transformers.models.")
    return family if own_code and not getattr(model.config, "use_bidirectional_attention", False) else None


# ---------------------------------------------------------------- forwards


# ---------------------------------------------------------------- patching


