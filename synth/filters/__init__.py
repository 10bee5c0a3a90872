"""Filters of the stage clean: length, repetition, language, duplicates, contamination."""
