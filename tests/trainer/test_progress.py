"""A line for what takes long, and none for what does not."""

import time

import pytest

from trainer import progress


@pytest.mark.parametrize(("seconds", "rank", "said"), [(0.05, "0", "data: planning\n"), (0.05, "1", ""), (5, "0", "")])
def test_only_what_takes_long_is_announced_by_the_first_rank(monkeypatch, capsys, seconds, rank, said):
    monkeypatch.setattr(progress, "SECONDS", seconds)
    monkeypatch.setenv("RANK", rank)
    with progress.announce("data: planning"):
        time.sleep(0.2)
    assert capsys.readouterr().out == said
