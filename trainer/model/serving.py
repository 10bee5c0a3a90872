"""Know how vLLM finds an adapter's layers, and say where it has to be told or cannot.

vLLM maps names of a checkpoint's files to its own modules, and names of an adapter by the same map. Where the two differ in a way that the
map does not know, it leaves the adapter out and says nothing. `python -m benchmarks.run served` compares what it serves with what was
trained.
"""

from __future__ import annotations

from peft import PeftModel

from trainer.model.lora import adapted_layers, adapted_weights
from trainer.model.mixtures import find_mixtures
from trainer.model.vocabulary import wrappers


def how_to_serve(model: PeftModel) -> list[str]:
    """Return a line for whatever vLLM needs to be told to serve the adapter, or cannot serve."""
    lines = []
    if wrappers(model):
        lines.append("adapter: PEFT loads it on the base with model.resize_token_embeddings(len(tokenizer)); vLLM refuses trained rows and "
                     "modules, so it needs a merged model (--export merged)")
    elif any(getattr(layer, "lora_variant", None) for layer in adapted_layers(model)):
        lines.append("adapter: vLLM refuses DoRA; only a merged model can be served there (--export merged)")
    elif find_mixtures(base := model.get_base_model()).weights.keys() & adapted_weights(base).keys():
        lines.append("adapter: experts carry it, so vLLM needs enable_mixed_moe_lora_format, and is_3d_lora_weight in its LoRA module")
    return lines
