"""The training half of Steadfast: chats become an adapter or a model. Start reading at `run.py`."""

import logging
import signal
import sys

from trainer.needed_packages import refuse_to_start_without_them

if sys.argv[:1] == ["-m"]:  # `python -m trainer.run` is starting
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until its main, Ctrl-C just ends it
    refuse_to_start_without_them()

# PEFT imports bitsandbytes wherever it is installed, and that warns that it found no kernel for inference on the hub. None is wanted.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
