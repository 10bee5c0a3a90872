"""Checks and measurements of `make gpu`."""
