"""The pool: an SQLite file of instructions, responses and scores, and the run that fills it."""
