"""Machinery shared by all suites: timing, records, costs, worker processes."""
