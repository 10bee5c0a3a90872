"""Mark the tests that run Triton kernels, interpreted where there is no GPU, as slow; choose who serves attention."""

import sys

import pytest

from tests.helpers.kernels import runs_triton


def pytest_collection_modifyitems(items):
    for item in items:
        if any(mark == runs_triton.mark for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.slow(0.5))


@pytest.fixture
def served_by(monkeypatch):
    """served_by(name): that backend serves here, whatever the device."""
    return lambda name: monkeypatch.setattr(sys.modules["kernels.attention"], "backend", lambda *_: name)
