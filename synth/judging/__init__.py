"""Scores of answers: the judges' prompt, reading their scores, calibrating and comparing judges."""
