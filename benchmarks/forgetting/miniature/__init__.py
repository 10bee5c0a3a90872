"""A world small enough to know completely: general skills of known mixture, a domain that fights one of them, and models of it."""
