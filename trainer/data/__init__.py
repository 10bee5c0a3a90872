"""Data files to packed training steps: sources, readers, formats, chat templates, tokenizing, mixing, packing."""
