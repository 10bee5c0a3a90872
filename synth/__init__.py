"""The synthesis half of Steadfast: a model writes the replay set that keeps its own abilities."""

import trainer  # noqa: F401  where `python -m synth.run` is starting, it takes care of Ctrl-C and of packages that are not installed
