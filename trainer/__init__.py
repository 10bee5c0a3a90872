"""The training half of Steadfast: chats in, a fine-tuned adapter or model out. Start reading at `run.py`."""
