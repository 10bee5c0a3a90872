"""Test that loops of any period are found, and natural texts pass."""

import time

import pytest

from synth.filters.repetition import repetition
from tests.helpers import real_prompts

STORY = ("A fox found a bell in the snow and carried it home. Nobody knew whose it was, so she asked the heron, who had seen many winters. "
         "He told her of a ship that once lay in the bay with all its lamps lit; when spring came, they went to look for it together.")


@pytest.mark.slow
@pytest.mark.parametrize("period", [1, 2, 7, 30, 100, 400])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_loop_counts_for_its_share_of_the_text(period, share):
    phrase = "".join(chr(0x4E00 + n) for n in range(period))  # characters that differ, so that nothing else repeats
    loop = phrase * (3000 // period)
    other = "".join(chr(0x10000 + n) for n in range(round(len(loop) * (1 - share) / share)))
    assert repetition(other + loop) == pytest.approx(share, abs=0.002 + period / len(other + loop))
    assert (repetition(other + loop, 0.6) > 0.6) == (share > 0.6)


def test_a_phrase_between_other_things_counts_for_at_least_two_thirds():
    text = "".join(f"{n}. Tell me more about the weather in spring.\n" for n in range(10, 40))
    phrase = len(". Tell me more about the weather in spring.\n")
    assert 2 / 3 * phrase / (phrase + 2) <= repetition(text) <= 1


def test_a_short_text_or_one_said_three_times_is_no_loop():
    assert repetition("ha " * 16) == 0.0 and repetition("ha " * 40) == 1.0
    assert repetition("") == 0.0
    assert repetition(f"Compare: {STORY} And: {STORY} And: {STORY}") < 0.3


def test_no_real_prompt_is_dropped_by_the_default():
    found = real_prompts.prompts(*real_prompts.COLUMNS)
    assert len(found) == 9219 and max(map(repetition, found)) < 0.5


def test_twenty_thousand_characters_take_no_time():
    for text in (STORY * 90, "".join(f"{n} " for n in range(5000)), "ab" * 10_000):
        began = time.process_time()
        repetition(text[:20_000])
        assert time.process_time() - began < 3
