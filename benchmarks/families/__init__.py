"""Census of model families: tiny models of each, tried against stock transformers."""
