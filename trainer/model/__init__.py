"""The model: loading, fused layers, packed attention, LoRA, 4-bit weights, export."""
