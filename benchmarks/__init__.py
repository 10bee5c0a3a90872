"""Benchmarks: speed, forgetting, and checks on a GPU; `python -m benchmarks.run` lists them."""
