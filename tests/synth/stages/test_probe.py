"""The probe's size follows the job's, and what it cuts short is not called junk."""

import pytest

from synth.config import Config, Instruct, Model, Probe, resolve_presets
from synth.engines.interface import Completion
from synth.stages.probe import probe, size_line
from tests.helpers.synth_fakes import FakeEngine, install, make_run


@pytest.mark.parametrize(("job", "longest", "expected", "reference"), [
    (1, 1_024, (20, 256), 100), (60, 1_024, (20, 256), 100), (60, 64, (20, 64), 100), (300, 1_024, (20, 600), 300),
    (1_000, 1_024, (50, 1_024), 1_000), (100_000, 1_024, (128, 1_024), 1_000)])
def test_sizes_follow_the_number_of_instructions(job, longest, expected, reference):
    found = resolve_presets(Config(base=Model(path="m"), instruct=Instruct(num_instructions=job, max_tokens=longest)))
    assert (found.probe.samples, found.probe.max_tokens) == expected and found.instruct.reference_samples == reference
    assert resolve_presets(found) == found


def test_sizes_that_are_given_stay():
    found = resolve_presets(Config(base=Model(path="m"), probe=Probe(samples=3, max_tokens=2_000),
                                   instruct=Instruct(num_instructions=60, reference_samples=0)))
    assert (found.probe.samples, found.probe.max_tokens, found.instruct.reference_samples) == (3, 1_024, 0)
    assert size_line(found) == ("probe: 3 samples of at most 1,024 tokens at each of 3 temperatures, "
                                "for 60 instructions of at most 1,024")


@pytest.mark.parametrize(("longest", "junk", "cut"), [(256, 0.5, 0.0), (1_024, 0.25, 0.5)])
def test_samples_that_the_probe_cuts_short_are_counted_apart(tmp_path, monkeypatch, longest, junk, cut):
    """Half of the samples do not end, and half of those repeat one phrase."""
    texts = ["a b c d e f g " * 40, "What is the capital of Peru, and since when has it been that city?"]

    def script(request):
        i = request.key[1]
        return Completion(request.key, texts[i % 4 != 0], 256, "length" if i % 2 == 0 else "stop", -300.0, 4)

    said, engine = [], FakeEngine("base", complete=script)
    install(monkeypatch, base=engine)
    run = make_run(tmp_path, say=said.append, probe=Probe(temperature=[1.0]), instruct=Instruct(num_instructions=60, max_tokens=longest))
    probe(run)
    assert {(request.sampling.max_tokens, request.sampling.temperature) for request in engine.requests} == {(256, 1.0)}
    assert len(engine.requests) == 20 and said[0] == size_line(run.config)
    [summary] = run.pool.get("probe")
    assert (summary["junk"], summary["cut"]) == (junk, cut)
    [line] = [line for line in said if line.startswith("probe: temperature")]
    assert (f", cut short {cut:.1%}" in line) == bool(cut)
