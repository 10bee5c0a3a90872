"""Name the item files of known benchmarks, and bundle a small suite. Start reading at `table.py`."""
