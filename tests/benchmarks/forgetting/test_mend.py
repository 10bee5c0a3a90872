"""The suite `mend`: what it trains is valid, and its record is shown with the time of each arm."""

from benchmarks.forgetting.miniature import mend
from synth.config import resolve_presets, validate


def test_the_prompts_are_the_bases_own():
    config = mend.own_answers(mend.FAMILY["base"].folder)
    validate(config)
    assert not resolve_presets(config).responders and config.select.rule == "first"


def test_the_record_is_shown_with_the_time_of_each_arm():
    row = {"general": 0.5, "domain": 1.0, "forgotten": 0.5}
    record = {"summary": [row | {"line": "base", "seconds": None}, row | {"line": "recovered", "seconds": 61.2}],
              "conditions": {"items": {"general": 640, "domain": 160}, "seconds": {"the base's replay set": 24.0}, "domain_rows": 600,
                             "prompts": 1500, "floor": 0.97},
              "machine": {}}
    assert mend.table_of(record)[1:] == [["base", "0.500", "1.000", "0.500", ""], ["recovered", "0.500", "1.000", "0.500", "61"]]
