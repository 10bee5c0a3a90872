"""The suite of scale: every case in small, and its table."""

import argparse

import pytest

from benchmarks.harness import show
from benchmarks.speed import scale, scale_worker
from trainer.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "document", "sources_alike", "sources_apart", "items", "pool", "metrics", "mcnemar_tail"])
def test_a_case_in_small_has_its_parts(name, tmp_path):
    parts = scale_worker.Parts()
    scale_worker.CASES[name](parts, 40, tmp_path)
    assert parts and all(seconds >= 0 for seconds in parts.values())


def test_the_table_names_every_case(monkeypatch):
    done = {"seconds": {"read": 2.0, "tokenize": 3.0}, "peak_mib": 700.0, "before_mib": 600.0}
    monkeypatch.setattr(scale, "measure", lambda case, size, folder: done)
    made = scale.run(argparse.Namespace(share=0.1, cases=list(scale.CASES)))
    head, rows, again, *others = scale.table(made)
    assert rows == ["100,000 short chats: a run's start", "5.0", "read 2.0, tokenize 3.0", "50.0", "700", "100"]
    assert again[0] == scale.AGAIN and len(others) == len(scale.CASES) - 1
    view = scale.SUITE.views["scale"]
    assert view.headline(made) == "100,000 chats are ready to train on after 5 CPU seconds"
    assert "a pool of 100,000 scores" in show.markdown(made, view)


@pytest.mark.parametrize("options, message", [({"share": 2}, "--share: expected more than 0 and at most 1, got 2"),
                                              ({"cases": ["tables"]}, "--cases: expected names of rows")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        scale.run(argparse.Namespace(**{"share": 0.1, "cases": []} | options))
