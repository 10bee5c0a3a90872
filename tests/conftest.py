"""One thread per test process (two run at once), no network, and deterministic arithmetic."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True)
def fixed_arithmetic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small Llama with random weights, its tokenizer and chat template, saved the way hub models are."""
    return tiny.save_model(tmp_path_factory.mktemp("model"), "llama")
