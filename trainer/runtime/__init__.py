"""The process around a run: device, ranks, signals, checkpoints."""
