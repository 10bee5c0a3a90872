"""Every point measures what it says, both lines agree there, and growth is the power it should be."""

import argparse

import pytest
import torch

from benchmarks import plot
from benchmarks.harness import timing
from benchmarks.speed import scaling
from benchmarks.speed.kernel_predictions import Model
from benchmarks.speed.scaling import AXES, OURS, PLAIN, Plan, Point, growth, measure
from trainer.errors import UserError

TINY = Model("tiny", 64, 112, 4, 2, 16, 257, 1)
SMALL_PLAN = Plan(Point(TINY, 4, 16), dict(zip(AXES, ((32, 64), (16, 32), (64, 257), (4, 8)))))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Collecting garbage between samples is slow in a process that has run other tests."""
    monkeypatch.setattr(timing.gc, "collect", lambda *_: 0)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    return parser.parse_args(words)


def test_one_setting_is_varied_at_a_time():
    points = {axis: SMALL_PLAN.point(axis, SMALL_PLAN.values[axis][0]) for axis in AXES}
    assert (points["tokens a step"].count, points["tokens a step"].length) == (2, 16)
    assert (points["context"].count, points["context"].length) == (1, 16)
    assert points["vocabulary"].model == Model("tiny", 64, 112, 4, 2, 16, 64, 1) and points["rank"].rank == 4
    for plan in (scaling.ON_CPU, scaling.ON_GPU):
        assert all(value % plan.middle.length == 0 for value in plan.values["tokens a step"])
        assert all(values == tuple(sorted(values)) for values in plan.values.values())


def test_a_run_has_a_row_for_every_line_and_point(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "ON_CPU", SMALL_PLAN)
    made = scaling.run(arguments("--device", "cpu", "--rounds", "2", "--axes", "tokens a step", "rank"))
    rows = made["summary"]
    assert [(r["axis"], r["value"]) for r in rows[::2]] == [("tokens a step", 32), ("tokens a step", 64), ("rank", 4), ("rank", 8)]
    assert {r["line"] for r in rows} == {OURS, PLAIN} and all(r["us_per_token"]["value"] > 0 for r in rows)
    assert max(made["agreement"].values()) < 1e-5 and made["suite"] == "scaling-cpu"
    assert {s["tokens"] for s in made["raw"]["tokens a step 64: Steadfast"]} == {64}
    assert {s["padding"] for line in made["raw"].values() for s in line} == {0}
    assert all(r["ratio"][PLAIN]["low"] <= r["ratio"][PLAIN]["high"] for r in rows if r["line"] == OURS)
    assert all((r["same"] is not None) == (r["line"] == OURS) for r in rows)
    assert "rank 8: plain HF loop" in capsys.readouterr().err
    table = plot.markdown(made).splitlines()
    assert "A line timed against itself: " in table[-1]
    assert len(table) == 2 + 4 + 2 and table[2].startswith("| tokens a step | 32 | ")


def test_the_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "ON_CPU", SMALL_PLAN)
    made = scaling.run(arguments("--device", "cpu", "--rounds", "2", "--axes", "vocabulary", "context"))
    assert plot.draw(made, tmp_path / "a.png").read_bytes() == plot.draw(made, tmp_path / "b.png").read_bytes()


def test_losses_that_differ_stop_the_run(monkeypatch):
    class Wrong(scaling.Packs):
        def step(self):
            done = super().step()
            return type(done)(done.loss * 1.01, done.tokens, done.supervised, done.padding, done.flops)

    monkeypatch.setattr(scaling, "LINES", {PLAIN: scaling.Padded, OURS: Wrong})
    with pytest.raises(AssertionError, match="losses of Steadfast and the plain HF loop differ by 9.9e-03"):
        measure(SMALL_PLAN.middle, torch.device("cpu"), torch.float32, 2)


def test_a_line_that_fails_keeps_its_row(monkeypatch):
    class Full(scaling.Padded):
        def step(self):
            raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setattr(scaling, "LINES", {PLAIN: Full, OURS: scaling.Packs})
    monkeypatch.setattr(scaling, "ON_CPU", SMALL_PLAN)
    made = scaling.run(arguments("--device", "cpu", "--rounds", "2", "--axes", "rank"))
    assert [r["outcome"] for r in made["summary"]] == ["out of memory", "timed"] * 2
    assert all(r["ratio"] == {} for r in made["summary"]) and made["conditions"]["growth"]["rank: plain HF loop"] is None
    assert "| rank | 4 | out of memory | " in plot.markdown(made)


def test_growth_is_the_power_of_the_setting():
    def rows(axis, cost):
        return [{"axis": axis, "value": v, "line": OURS, "us_per_token": {"value": cost(v)}} for v in (256, 512, 1024)]

    assert growth(rows("context", lambda v: v), "context", OURS) == pytest.approx(2.0)  # cost of a token in proportion to it
    assert growth(rows("tokens a step", lambda v: 3.0), "tokens a step", OURS) == pytest.approx(1.0)
    assert growth(rows("rank", lambda v: 3.0), "rank", OURS) == pytest.approx(0.0)
    assert growth(rows("rank", lambda v: v**0.5), "rank", OURS) == pytest.approx(0.5)
    assert growth(rows("rank", lambda v: v)[:1], "rank", OURS) is None


@pytest.mark.parametrize("words, complaint", [
    (["--axes", "width"], "--axes: expected names of tokens a step, context, vocabulary, rank, got width"),
    (["--rounds", "1"], "--rounds, --threads: expected at least 2 and 1, got 1 and 1")])
def test_mistakes_are_one_line(words, complaint):
    with pytest.raises(UserError) as raised:
        scaling.run(arguments(*words))
    assert str(raised.value) == complaint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="--device: expected a GPU, found none; use --device cpu"):
        scaling.run(arguments("--device", "cuda"))
