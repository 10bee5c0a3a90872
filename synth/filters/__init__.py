"""Filters of the stage `clean`: repetition, language, contamination and near-duplicates."""
