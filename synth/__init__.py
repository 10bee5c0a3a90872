"""The synthesis half of Steadfast: a model writes the replay set that keeps its own abilities."""
