"""The synthesis half of Steadfast: a model writes the replay set that keeps its own abilities."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # `python -m synth.run` is starting: until its main, Ctrl-C just ends it
