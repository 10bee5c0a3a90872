"""Scoring a model on item files, beside its base: items, scoring, statistics, pages. `trainer/evaluate.py` is the table of contents."""
