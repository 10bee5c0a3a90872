"""These tests run on the fake GPU alone, which `make fake-gpu` loads in place of a driver; elsewhere they are not collected."""

import os

import pytest
import torch

collect_ignore_glob = [] if "FAKE_GPU" in os.environ else ["test_*.py"]


@pytest.fixture
def device():
    return torch.device("cuda", 0)
