"""A model's generation settings are read as ids of tokens, or refused in one line."""

import pytest

from trainer.errors import UserError
from trainer.model.generation_settings import end_ids, read_settings


@pytest.mark.parametrize(("text", "expected"), [
    ('{"eos_token_id": 4}', {4}), ('{"eos_token_id": [4, 2]}', {2, 4}), ('{"eos_token_id": null}', set()), ("{}", set()), (None, set()),
])
def test_the_ends_of_answers(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert end_ids(read_settings(tmp_path)) == expected


@pytest.mark.parametrize("text", [
    '{"eos_token_id": ["x"]}', '{"eos_token_id": "x"}', '{"eos_token_id": {"a": 1}}', '{"eos_token_id": [[1]]}', '{"eos_token_id": true}',
    '{"cache_implementation": "x"}', '{"max_new_tokens": -1}', '{"early_stopping": "x"}', "[1]",
])
def test_other_things_are_one_line(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match="generation_config.json") as raised:
        end_ids(read_settings(tmp_path))
    assert "\n" not in str(raised.value)
