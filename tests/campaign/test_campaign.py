"""Run some cases of every attack, by the seed `--campaign-seed`; `make campaign` runs thousands."""

from collections import Counter
from random import Random

import pytest

from tests.campaign import KINDS
from tests.campaign.__main__ import attacked, table
from tests.campaign.forked import Ended
from tests.campaign.material import Material
from tests.campaign.odd_values import damaged, mutated, odd_value
from tests.campaign.oracle import FAULTS, Outcome, judge

CASES = {"configurations": 24, "rows": 30, "model folders": 20, "chat templates": 20, "servers": 2, "damaged files": 3,
         "kills of training": 1, "kills of synthesis": 1}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    made = Material(tmp_path_factory.mktemp("material"))
    made.warm_up()
    return made


@pytest.mark.slow(20)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_ends_in_a_traceback_hangs_or_differs_silently(kind, material, tmp_path, request):
    seed = request.config.getoption("--campaign-seed")
    verdicts = [(number, attacked(kind, seed, number, tmp_path / f"{number}", material)) for number in range(CASES[kind])]
    assert [(number, verdict) for number, verdict in verdicts if verdict.outcome in FAULTS] == []
    if CASES[kind] >= 20:
        assert {verdict.outcome for _, verdict in verdicts} == {Outcome.WELL, Outcome.REFUSED}


# ---------------------------------------------------------------- the oracle

LINE = "trainer.run: error: epochs: expected above 0, got -1\n"


@pytest.mark.parametrize("ended, difference, expected", [
    (Ended("trainer.run", 0, "", "", False), None, Outcome.WELL),
    (Ended("trainer.run", 0, "", "a warning\n", False), None, Outcome.WELL),
    (Ended("trainer.run", 0, "", "", False), "weights differ", Outcome.SILENT),
    (Ended("trainer.run", 2, "", f"a warning\n{LINE}", False), None, Outcome.REFUSED),
    (Ended("trainer.run", 2, "", LINE + LINE, False), None, Outcome.UNCLEAR),
    (Ended("trainer.run", 2, "", f"{LINE}and more\n", False), None, Outcome.UNCLEAR),
    (Ended("trainer.run", 2, "", "", False), None, Outcome.UNCLEAR),
    (Ended("trainer.run", 5, "", LINE, False), None, Outcome.UNCLEAR),
    (Ended("trainer.run", 2, "", LINE.replace("-1", "\x1b[2J"), False), None, Outcome.UNCLEAR),
    (Ended("trainer.run", 1, "", "trainer.run: error: 'NoneType' object is not iterable\n", False), None, Outcome.UNCLEAR),
    (Ended("trainer.run", 1, "", "trainer.run: error: a fault of Steadfast, not of yours: KeyError\n", False), None, Outcome.TRACEBACK),
    (Ended("trainer.run", 1, "", "Traceback (most recent call last):\nKeyError\n", False), None, Outcome.TRACEBACK),
    (Ended("trainer.run", -11, "", "", False), None, Outcome.TRACEBACK),
    (Ended("trainer.run", -9, "", "", True), None, Outcome.HANG),
])
def test_the_oracle_tells_a_refusal_from_a_fault(ended, difference, expected):
    assert judge(ended, difference).outcome == expected


def test_values_follow_from_the_dice_alone():
    def drawn(seed):
        dice = Random(seed)
        return repr([odd_value(dice, 3), mutated(dice, {"a": [1, {"b": "c"}]}, 3), damaged(dice, b"0123456789" * 9)])

    assert drawn(5) == drawn(5)
    assert len(Counter(map(drawn, range(50)))) == 50


def test_the_table_counts_every_case():
    results = [{"kind": "rows", "seed": 3, "outcome": outcome, "kills": 0} for outcome in Outcome]
    results.append({"kind": "kills of training", "seed": 4, "outcome": Outcome.WELL, "kills": 5})
    _, _, header, _, *rows = table(results).splitlines()
    assert table(results).splitlines()[0].endswith(", seeds 3, 4:")
    assert header == "| kind | cases | ended well | refused in one line | traceback | no clear line | hang | silent difference | kills |"
    assert rows == ["| rows | 6 | 1 | 1 | 1 | 1 | 1 | 1 | 0 |", "| kills of training | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 5 |",
                    "| all | 7 | 2 | 1 | 1 | 1 | 1 | 1 | 5 |"]
