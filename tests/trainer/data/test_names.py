"""Names of sources and item files."""

import time

from trainer.data.names import distinct


def test_no_two_names_are_alike():
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert distinct(["a", "a", "a (2)", "a (2)"]) == ["a", "a (3)", "a (2)", "a (2) (2)"]


def test_twenty_thousand_equal_names_take_no_time():
    began = time.process_time()
    assert len({*distinct(["a"] * 20_000)}) == 20_000
    assert time.process_time() - began < 1
