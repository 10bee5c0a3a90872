"""Bring back what an adapter forgot: rounds of its own answers, drawn towards the base."""
