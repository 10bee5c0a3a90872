"""The training half of Steadfast: chats become an adapter or a model. Start reading at `run.py`."""

import logging

# PEFT imports bitsandbytes wherever it is installed, and that warns that it found no kernel for inference on the hub. None is wanted.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
