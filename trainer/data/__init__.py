"""From data files to packed training steps: read, tokenize, mix, pack, plan."""
