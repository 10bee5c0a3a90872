"""One thread per test process (two run at once), no network, and deterministic arithmetic.

Without a GPU Triton's kernels run in its interpreter, which has to be asked for before they are imported.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import _launch
from tests.helpers.interpreter import mend_bf16

if _launch.INTERPRETED:
    mend_bf16()


@pytest.fixture(autouse=True)
def fixed_arithmetic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    from tests.helpers import tiny  # transformers: the kernels' tests run without it

    return tiny.tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small Llama with random weights, its tokenizer and chat template, saved the way hub models are."""
    from tests.helpers import tiny

    return tiny.save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A file of chats about sums."""
    from tests.helpers.runs import write_chats

    return write_chats(tmp_path_factory.mktemp("data") / "sums.jsonl")
