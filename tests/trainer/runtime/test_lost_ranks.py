"""A rank that dies ends the others with a line that names it."""

import re
import signal
import time

import pytest

from tests.helpers.processes import complete_ranks, start_ranks
from tests.helpers.runs import arguments, records

LINE = (r"rank {} \(process \d+ on \S+\) has ended before the others: its own output says why, unless it was killed, as where memory runs "
        r"out; all ranks end; the same command with --resume auto continues from the newest checkpoint\n")


@pytest.mark.slow(3)
@pytest.mark.parametrize("how", ["sleep", "collective"])
def test_ranks_that_wait_for_a_dead_one_end(how):
    begun = time.perf_counter()
    ends = complete_ranks("tests.helpers.waiting_rank", [how], 3)
    assert time.perf_counter() - begun < 20
    assert [status for status, *_ in ends] == [1, 9, 1]
    for _, _, errors in (ends[0], ends[2]):
        lines = [line for line in errors.splitlines(keepends=True) if "has ended" in line]
        assert len(lines) == 1 and re.fullmatch("(trainer.run: error: )?" + LINE.format(1), lines[0])


@pytest.mark.slow(3)
@pytest.mark.parametrize("how", ["error", "none"])
def test_ranks_that_end_together_name_none(how):
    for status, _, errors in complete_ranks("tests.helpers.waiting_rank", [how]):
        assert status == (how == "error") and "has ended" not in errors and ("a mistake that all ranks find" in errors) == (how == "error")


@pytest.mark.slow(8)
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_a_sharded_run(model_folder, chats, tmp_path, killed):
    options = ("--method", "full", "--epochs", "500", "--logging.every", "1", "--fsdp.enabled")
    ranks = start_ranks("trainer.run", arguments(model_folder, chats, tmp_path, *options))
    while not (tmp_path / "metrics.jsonl").exists() or not records(tmp_path, "step"):
        assert all(rank.running for rank in ranks)
        time.sleep(0.05)
    ranks[killed].send(signal.SIGKILL)
    begun = time.perf_counter()
    status, _, errors = ranks[1 - killed].finish()
    assert time.perf_counter() - begun < 15 and status == 1
    assert re.search("^trainer.run: error: " + LINE.format(killed), errors, re.MULTILINE) and "Traceback" not in errors
    ranks[killed].finish()
