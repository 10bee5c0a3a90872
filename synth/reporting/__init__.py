"""Outputs of synthesis: the replay set, its manifest, and the report's figures."""
