"""Find the experts of a mixture-of-experts model, and choose how their product is computed.

transformers keeps the experts of a layer in 3-D parameters [experts, rows, columns], in modules called `experts`; a few families, and code
that comes with a model, have a module for each. A router sends each token to some of them; shared experts, which see every token, are
layers like any other.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # names in configs: how many there are
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")  # and how many of them a token passes through


def expert_share(config: PreTrainedConfig) -> float | None:
    """Return the share of a layer's experts that a token passes through.

    None where the text config does not tell.
    """
    for part in (config, getattr(config, "ffn_config", None)):  # DBRX has its own part for them
        there, chosen = (next((value for name in names if (value := getattr(part, name, None))), None) for names in (EXPERTS, CHOSEN))
        if there and chosen:
            chosen = sum(chosen) / len(chosen) if isinstance(chosen, list) else chosen  # one for each layer
            return chosen / there
    return None


def expert_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of routed experts, with those of adapters on them, without biases."""
    return {weight for name, module in model.named_modules() if "experts" in name.split(".") or _holds_experts(module)
            for kind, weight in module.named_parameters(recurse=False) if weight.ndim >= 2 and not kind.endswith("bias")}


def _holds_experts(module: nn.Module) -> bool:
    """Return whether a module of another name is one of transformers' collections of routed experts."""
    kind = type(module).__name__
    return kind.endswith("Experts") and "Shared" not in kind
