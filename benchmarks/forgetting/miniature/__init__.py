"""A synthetic world whose right answers are all known, and tiny language models that learnt it.

It has general skills in known shares, and a domain that conflicts with one of them.
"""
