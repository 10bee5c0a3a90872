"""Everything that is measured: `python -m benchmarks.run` times Steadfast against plain Hugging Face; `miniature/` is the demo's world."""
