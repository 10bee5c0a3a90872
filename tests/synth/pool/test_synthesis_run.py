"""The engine of a local model stays up between stages that use it alike."""

import dataclasses

import pytest

from synth.config import Model
from synth.engines.interface import EngineError
from tests.helpers.synth_fakes import FakeEngine, install, make_run


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(tmp_path, said):
    with make_run(tmp_path, ["base", "other"], say=said.append) as run, run.pool:
        yield run


@pytest.fixture
def engines(monkeypatch):
    engines = {name: FakeEngine(name) for name in ("base", "other", "served")}
    install(monkeypatch, **engines)
    return engines


def use(run, *models):
    for model in models:
        with run.use_engine("instruct", model, record=False) as writer:
            assert writer.stage == "instruct"


def counts(engine):
    return engine.started, engine.closed


def test_one_model_is_loaded_once_and_one_at_a_time(run, engines, said):
    (other,) = run.config.responders
    use(run, run.base, dataclasses.replace(run.base))
    assert counts(engines["base"]) == (1, 0) and said[1] == "instruct: base: scripted 1.0 is still loaded"
    use(run, other)
    assert counts(engines["base"]) == (1, 1) and counts(engines["other"]) == (1, 0)
    use(run, run.base, dataclasses.replace(run.base, engine="transformers"))
    assert counts(engines["base"]) == (3, 2) and counts(engines["other"]) == (1, 1)
    run.stop_engine()
    run.stop_engine()
    assert counts(engines["base"]) == (3, 3)


def test_the_context_of_a_run_ends_its_engine(tmp_path, engines):
    with make_run(tmp_path / "more") as run:
        use(run, run.base)
        assert counts(engines["base"]) == (1, 0)
    assert counts(engines["base"]) == (1, 1)


def test_a_server_leaves_the_loaded_model_alone(run, engines):
    use(run, run.base, Model(path="m", name="served", engine="openai", base_url="http://127.0.0.1:9/v1"), run.base)
    assert counts(engines["base"]) == (1, 0) and counts(engines["served"]) == (1, 1)


def test_an_engine_that_died_or_failed_is_started_anew(run, engines):
    use(run, run.base)
    engines["base"].dead = True
    use(run, run.base)
    assert counts(engines["base"]) == (2, 1)
    engines["base"].dead = False
    with pytest.raises(EngineError), run.use_engine("respond", run.base, record=False):
        raise EngineError("died")
    use(run, run.base)
    assert counts(engines["base"]) == (3, 2)
