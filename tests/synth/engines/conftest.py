"""Engines on the miniature base, and a copy of its files."""

import pytest

from synth.config import Model
from synth.engines import open_engine
from tests.helpers.engine_requests import BASE


@pytest.fixture
def opened(tmp_path):
    engines = []

    def open_(kind, **more):
        engines.append(open_engine(Model(path=str(BASE), engine=kind, dtype="float32", **more), tmp_path / "log"))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in BASE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
