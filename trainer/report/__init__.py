"""HTML pages: their shared look, and the page about a run."""
