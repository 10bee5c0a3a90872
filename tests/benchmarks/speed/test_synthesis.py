"""The synthesis benchmark's parts that need no engine, and one small round that does."""

from importlib.util import find_spec

import pytest

from benchmarks.harness.record import newest
from benchmarks.run import main
from benchmarks.speed import synthesis
from synth.pool.store import Pool


def test_scores_that_are_written_are_a_pools_own(tmp_path):
    told = synthesis.writing(3_000, tmp_path)
    with Pool(tmp_path / "writing.sqlite") as pool:
        counts = pool.select("SELECT judge, count(*), count(DISTINCT item), count(DISTINCT model) FROM scores GROUP BY judge")
    assert counts == [(f"judge-{j}", 1000, 112, 3) for j in range(3)]  # 1,000 answers of each judge, nine to an item
    assert told["rows"] == 3000 and told["extrapolated_seconds"] == pytest.approx(told["seconds"] * 900)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
def test_a_small_round_agrees_with_bare_vllm_and_makes_a_table(tmp_path, capsys):
    assert main(["synthesis", "--prompts", "60", "--rounds", "2", "--rows", "3000", "--count", "400", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    record, = newest(tmp_path).values()
    assert record["agreement"] == {"texts that differ": 0.0}
    sampled = {row["sampled"]: row for row in record["conditions"]["distribution"]}
    assert sampled["T 0.7, top_p 0.98"]["distinct"] < sampled["T 1, top_p 1"]["distinct"] <= 1
    assert sampled["the same without duplicates"]["distinct"] == 1
    assert all(0 <= row["distance"] <= 1 for row in sampled.values()) and "| the world's own |" in out
    assert (tmp_path / "synthesis-cpu.png").stat().st_size > 5000
