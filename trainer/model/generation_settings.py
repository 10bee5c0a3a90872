"""Read a model's generation_config.json: which tokens end its answers."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from trainer.errors import UserError, one_line


def read_settings(source: str | Path) -> GenerationConfig | None:
    """Return the generation settings of the model at `source`; None where it has none.

    Raises UserError for a file that transformers does not take.
    """
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return None
    except Exception as error:  # of whatever a field may hold
        raise UserError(f"{source}: expected generation settings in generation_config.json, found otherwise: {one_line(str(error))}; "
                        "correct or remove the file") from None


def end_ids(settings: GenerationConfig | None) -> set[int]:
    """Return the ids of the tokens that end an answer. Raises UserError where they are no ids."""
    found = getattr(settings, "eos_token_id", None)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if wrong := [one for one in ids if not isinstance(one, int) or isinstance(one, bool)]:
        raise UserError(f"model: expected token ids as eos_token_id of generation_config.json, found {one_line(repr(wrong[0]))}; "
                        "correct or remove the file")
    return {*ids}
