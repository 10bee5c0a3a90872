"""Engines: what runs a language model for us. One small interface, three of them, chosen by what is installed."""
