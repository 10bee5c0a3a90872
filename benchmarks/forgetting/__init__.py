"""Suites that measure what a model forgets and what it learns."""
