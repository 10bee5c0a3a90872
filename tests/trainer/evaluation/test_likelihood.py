"""Choices of one token share a run of their prompt through the model."""

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from trainer.evaluation import likelihood
from trainer.evaluation.likelihood import BaseStates, group_by_context, measure_likelihoods
from trainer.evaluation.tokens import Key, Sample
from trainer.model.forward import lm_head
from trainer.model.patch import patch


def sample(item: int, ids: list[int], scored: int) -> Sample:
    mask = np.zeros(len(ids), dtype=bool)
    mask[-scored:] = True
    return Sample(Key(0, item), None, True, np.array(ids, dtype=np.int32), mask, 1)


PROMPT = [5, 6, 7, 8, 9]
SAMPLES = [sample(0, [*PROMPT, 11], 1), sample(0, [*PROMPT, 12], 1), sample(0, [*PROMPT, 13, 14], 2), sample(1, [*PROMPT, 15], 1),
           sample(2, [*PROMPT, 11], 2), sample(3, [6, 7, 11], 1), sample(3, [6, 7, 12], 1)]


@pytest.fixture(scope="module")
def model():
    made = tiny.model("llama")
    patch(made)
    return made


def test_samples_that_differ_in_a_scored_last_token_are_a_group():
    assert group_by_context(SAMPLES) == [[0, 1, 3], [2], [4], [5, 6]]


@torch.no_grad()
def test_a_shared_run_gives_the_log_probs_of_runs_alone(model, monkeypatch):
    tokens = []
    forward = likelihood.forward_hidden
    monkeypatch.setattr(likelihood, "forward_hidden", lambda m, batch, rows: tokens.append(batch.tokens) or forward(m, batch, rows))
    remembered = BaseStates(lm_head(model))
    together = measure_likelihoods(model, SAMPLES, 64, remember=remembered, keep=range(len(SAMPLES)))
    assert sum(tokens) == 6 + 7 + 6 + 3, "each group once"
    for i, found in enumerate(together):
        alone, = measure_likelihoods(model, [SAMPLES[i]], 64)
        assert found.logprob == pytest.approx(alone.logprob, abs=1e-5)
        logits = model(torch.from_numpy(SAMPLES[i].ids).long()[None]).logits[0].log_softmax(-1)
        expected = sum(float(logits[t - 1, SAMPLES[i].ids[t]]) for t in np.flatnonzero(SAMPLES[i].scored))
        assert found.logprob == pytest.approx(expected, abs=1e-4)
        assert len(remembered.hidden[i]) == SAMPLES[i].tokens
    again = measure_likelihoods(model, SAMPLES, 64, base=remembered)
    assert all(found.kl == pytest.approx(0, abs=1e-6) for found in again)
