"""Throughput, timers, the metrics log and the profiler."""
