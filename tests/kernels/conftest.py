"""Mark the tests that run Triton kernels, interpreted where there is no GPU, as slow."""

import pytest

from tests.helpers.kernels import runs_triton


def pytest_collection_modifyitems(items):
    for item in items:
        if any(mark == runs_triton.mark for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.slow)
