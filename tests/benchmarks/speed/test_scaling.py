"""Every point measures what it says, both lines agree there, and growth is the power it should be."""

import argparse

import pytest
import torch

from benchmarks.harness import show, timing
from benchmarks.harness.model_shapes import ModelShape
from benchmarks.speed import scaling
from benchmarks.speed.scaling import AXES, OURS, PLAIN, Grid, Point, growth, measure
from trainer.errors import UserError

TINY = ModelShape("tiny", 64, 112, 4, 2, 16, 257, 1)
SMALL_GRID = Grid(Point(TINY, 4, 16), dict(zip(AXES, ((32, 64), (16, 32), (64, 257), (4, 8)))))

VIEW = scaling.SUITE.views["scaling"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Collecting garbage between samples is slow in a process that has run other tests."""
    monkeypatch.setattr(timing.gc, "collect", lambda *_: 0)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    return parser.parse_args(words)


def test_one_setting_is_varied_at_a_time():
    points = {axis: SMALL_GRID.point(axis, SMALL_GRID.values[axis][0]) for axis in AXES}
    assert (points["tokens a step"].count, points["tokens a step"].length) == (2, 16)
    assert (points["context"].count, points["context"].length) == (1, 16)
    assert points["vocabulary"].model == ModelShape("tiny", 64, 112, 4, 2, 16, 64, 1) and points["rank"].rank == 4
    for plan in (scaling.ON_CPU, scaling.ON_GPU):
        assert all(value % plan.middle.length == 0 for value in plan.values["tokens a step"])
        assert all(values == tuple(sorted(values)) for values in plan.values.values())


def test_a_run_has_a_row_for_every_contender_and_point(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "ON_CPU", SMALL_GRID)
    made = scaling.run(arguments("--device", "cpu", "--rounds", "2", "--axes", "tokens a step", "rank"))
    rows = made["summary"]
    assert [(r["axis"], r["value"]) for r in rows[::2]] == [("tokens a step", 32), ("tokens a step", 64), ("rank", 4), ("rank", 8)]
    assert {r["contender"] for r in rows} == {OURS, PLAIN} and all(r["us_per_token"]["value"] > 0 for r in rows)
    assert max(made["agreement"].values()) < 1e-5 and made["suite"] == "scaling-cpu"
    assert {s["tokens"] for s in made["raw"]["tokens a step 64: Steadfast"]} == {64}
    assert {s["padding"] for line in made["raw"].values() for s in line} == {0}
    assert all(r["ratio"][PLAIN]["low"] <= r["ratio"][PLAIN]["high"] for r in rows if r["contender"] == OURS)
    assert all((r["same"] is not None) == (r["contender"] == OURS) for r in rows)
    assert "rank 8: plain HF loop" in capsys.readouterr().err
    table = show.markdown(made, VIEW).splitlines()
    assert len([row for row in table if row.startswith("|")]) == 2 + 4 and table[2].startswith("| tokens a step | 32 | ")


@pytest.mark.slow
def test_the_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "ON_CPU", SMALL_GRID)
    made = scaling.run(arguments("--device", "cpu", "--rounds", "2", "--axes", "vocabulary", "context"))
    assert show.draw(made, VIEW, tmp_path / "a.png").read_bytes() == show.draw(made, VIEW, tmp_path / "b.png").read_bytes()


def test_losses_that_differ_stop_the_run(monkeypatch):
    def wrong(model, samples, point, device):
        model.get_output_embeddings().weight.data.mul_(1.01)
        return scaling.steadfast(model, samples, point, device)

    monkeypatch.setitem(scaling.CONTENDERS, OURS, wrong)
    with pytest.raises(AssertionError, match="losses of Steadfast and the plain HF loop differ by .* in fp32"):
        measure(SMALL_GRID.middle, torch.device("cpu"), "fp32", 2)


def test_a_contender_that_fails_keeps_its_row(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("too much")

    monkeypatch.setitem(scaling.CONTENDERS, PLAIN, full)
    monkeypatch.setattr(scaling, "ON_CPU", SMALL_GRID)
    made = scaling.run(arguments("--device", "cpu", "--rounds", "2", "--axes", "rank"))
    assert [r["outcome"] for r in made["summary"]] == ["out of memory", "timed"] * 2
    assert all(r["ratio"] == {} for r in made["summary"]) and made["conditions"]["growth"]["rank: plain HF loop"] is None
    assert "| rank | 4 | out of memory | " in show.markdown(made, VIEW)


def test_growth_is_the_power_of_the_setting():
    def rows(axis, cost):
        return [{"axis": axis, "value": v, "contender": OURS, "us_per_token": {"value": cost(v)}} for v in (256, 512, 1024)]

    assert growth(rows("context", lambda v: v), "context", OURS) == pytest.approx(2.0)  # cost of a token in proportion to it
    assert growth(rows("tokens a step", lambda v: 3.0), "tokens a step", OURS) == pytest.approx(1.0)
    assert growth(rows("rank", lambda v: 3.0), "rank", OURS) == pytest.approx(0.0)
    assert growth(rows("rank", lambda v: v**0.5), "rank", OURS) == pytest.approx(0.5)
    assert growth(rows("rank", lambda v: v)[:1], "rank", OURS) is None


@pytest.mark.parametrize("words, complaint", [
    (["--axes", "width"], "--axes: expected names of tokens a step; context; vocabulary; rank, got width"),
    (["--rounds", "1"], "--rounds: expected at least 2, got 1")])
def test_mistakes_are_one_line(words, complaint):
    with pytest.raises(UserError) as raised:
        scaling.run(arguments(*words))
    assert str(raised.value) == complaint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="--device: expected a GPU, found none; use --device cpu"):
        scaling.run(arguments("--device", "cuda"))
