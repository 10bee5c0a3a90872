"""The pool: an SQLite file of instructions, answers and scores, and the run that fills it."""
