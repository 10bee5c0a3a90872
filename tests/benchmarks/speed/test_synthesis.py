"""The synthesis benchmark's parts that need no engine, and one small round that does."""

from importlib.util import find_spec

import pytest

from benchmarks.harness.record import newest
from benchmarks.run import main
from benchmarks.speed import synthesis, synthesis_stages
from synth.pool.store import Pool
from tests.helpers.records import shown, table_rows


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


def stages_record() -> dict:
    """A record in which the four stages of an instruction take a second each."""
    lengths = {"kept": 0.5, "answered": 8, "usable": 0.5, "instruct": 40.0, "sampled": 200.0, "greedy": 100.0, "judge": 400.0}
    work = synthesis_stages.work_of_an_instruction(lengths)
    rates = {synthesis_stages.GREEDILY: 100.0, synthesis_stages.SAMPLED: 50.0, **work}
    return {"suite": synthesis_stages.SUITE, "time": "2026-11-30T10:00:00+00:00", "commit": "0123456789", "dirty": False,
            "command": "python -m x", "cpu": "Some CPU", "threads": 1,
            "conditions": {"engine": "vllm", "model": "SmolLM2", "prompts": 16, "rounds": 3, "lengths": lengths, "longest": 512,
                           "timed_tokens": 24},
            "summary": [{"line": line, "tokens_per_cpu_second": {"value": one, "low": one, "high": one},
                         "share_of_greedy": None if line == synthesis_stages.JUDGE else {"value": one / 100, "low": 0.1, "high": 2.0}}
                        for line, one in rates.items()]}


def test_hours_follow_from_rates_and_tokens_of_an_instruction():
    made = stages_record()
    assert synthesis_stages.work_of_an_instruction(made["conditions"]["lengths"]) == {
        "instruct": 40, "respond, sampled": 0.5 * 3 * 200, "respond, greedy": 50, "judge": 0.5 * 4 * 0.5 * 400}
    rows = table_rows(made)
    assert "| instruct | 40 | 0.40 (0.10-2.00) | 40 | 0.28 | 2.8 | 28 |" in rows
    assert "| judge | 400 |  | 400 | 0.28 | 2.8 | 28 |" in rows
    assert "| all stages on this core, extrapolated |  |  | 790 | 1.1 | 11 | 111 |" in rows  # four seconds an instruction
    published = [row for row in rows if "(published)" in row]
    assert "| H200, DeepSeek-V3, vLLM (published) | 2,200 |  | 390 generated | 0.049 | 0.49 | 4.9 |" in published and len(published) == 2
    assert all(one.source in shown(made) for one in synthesis_stages.PUBLISHED)


def test_requests_are_cut_to_equal_numbers_and_lengths():
    from synth.engines.interface import ChoiceRequest, CompletionRequest, Prompt, Sampling

    def some(count):
        return [CompletionRequest((i,), Prompt((1, 2)), Sampling(1.0, 0.98, 512), i) for i in range(count)]

    judge = [ChoiceRequest((0,), Prompt((1,)), ("1",))]
    found = synthesis_stages.Requests(some(5), some(4), some(4), judge).shortened(3)
    assert [len(one) for one in found] == [3, 3, 3, 1]
    assert {request.sampling.max_tokens for kind in found[:3] for request in kind} == {synthesis_stages.TIMED_TOKENS}
