"""Test the paper's claim on a real instruct model."""
