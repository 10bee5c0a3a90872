"""Notes of an engine are said once and kept in the pool, also where the engine fails."""

import pytest

from synth.engines.interface import CompletionRequest, EngineError, Prompt, Sampling
from synth.pool.store import Pool
from synth.pool.writer import ResultWriter
from tests.helpers.synth_fakes import FakeEngine

NOTE = "seed is left out, which the server refuses"


@pytest.mark.parametrize("results", [None, 0])
def test_notes_are_said_once_and_kept(results, tmp_path, monkeypatch):
    engine, said = FakeEngine("m", complete=lambda request: "x", results=results), []
    monkeypatch.setattr(engine, "notes", lambda: [NOTE])
    with Pool(tmp_path / "pool.sqlite") as pool:
        with pool.transaction():
            pool.set("notes.m", ["an earlier one"])
        writer = ResultWriter(pool, said.append, "respond", "m", engine)
        request = CompletionRequest((0,), Prompt((1,)), Sampling(0, 1, 5), 0)
        for _ in range(2):
            if results == 0:
                with pytest.raises(EngineError):
                    writer.complete([request], 1, lambda results: None)
            else:
                writer.complete([request], 1, lambda results: None)
        assert pool.get("notes.m") == ["an earlier one", NOTE] and said.count(f"respond: m: {NOTE}") == 1
