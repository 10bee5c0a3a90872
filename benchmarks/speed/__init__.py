"""Suites that measure speed and memory."""
