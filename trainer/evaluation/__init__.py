"""Score a model on item files and compare it with its base. Start reading at `trainer/evaluate.py`."""
