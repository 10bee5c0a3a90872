"""Scores of responses: judge prompts, reading the scores, calibrating judges and diagnosing them."""
