"""A run that dies without a word, as by kill -9, as far as one process can play it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from trainer.training import loop


class Killed(BaseException):
    """An end that no handler of errors sees."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """What trains inside dies when it begins this step, counted from 1."""
    train_step = loop.train_step

    def until(run, work, phases):
        if work.step == step - 1:
            raise Killed
        return train_step(run, work, phases)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop, "train_step", until)
        yield
