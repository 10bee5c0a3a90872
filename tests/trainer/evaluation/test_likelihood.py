"""Samples share the run of what they begin with through the model."""

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from tests.helpers.models import with_packed_attention
from trainer.evaluation import likelihood
from trainer.evaluation.likelihood import BaseStates, measure_likelihoods
from trainer.evaluation.shared_context import group_by_context
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


@pytest.mark.parametrize(("branch", "capacity", "expected"), [
    (True, 64, [[0, 1, 2, 3], [4], [5, 6]]), (True, 6, [[0, 1, 2, 3], [4], [5, 6]]),
    (False, 64, [[0, 1, 3, 4], [2], [5, 6]])])
def test_samples_with_one_context_are_a_group(branch, capacity, expected):
    groups = group_by_context(SAMPLES, capacity, branch)
    assert [group.numbers for group in groups] == expected
    for group in groups:
        for i, rest in zip(group.numbers, group.branches):
            assert [*group.context, *rest] == SAMPLES[i].ids[:-1].tolist()


def test_a_group_has_no_more_tokens_than_a_pack():
    samples = [sample(0, [*PROMPT, first, 9], 2) for first in (11, 12, 13)]
    assert [group.numbers for group in group_by_context(samples, 7, True)] == [[0, 1], [2]]


def test_a_sample_with_scored_tokens_inside_is_whole():
    inside = sample(0, [5, 6, 7, 8], 1)
    inside.scored[1] = True
    group, = group_by_context([inside], 64, True)
    assert group.context.tolist() == [5, 6, 7]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 6 + 5 + 2), (torch.bfloat16, 64)], ids=str)
def test_a_shared_run_gives_the_log_probs_of_runs_alone(dtype, tokens, monkeypatch):
    model, sizes = with_packed_attention(tiny.model("llama", dtype)), []
    patch(model)
    forward = likelihood.forward_hidden
    monkeypatch.setattr(likelihood, "forward_hidden", lambda m, batch, *args: sizes.append(batch.tokens) or forward(m, batch, *args))
    remembered = BaseStates(lm_head(model))
    together = measure_likelihoods(model, SAMPLES, 64, remember=remembered, keep=range(len(SAMPLES)))
    assert sum(sizes) == tokens, "each context once, last tokens never, and in 16 bits few shapes"
    tolerance = 1 if dtype == torch.float32 else 3e3
    for i, found in enumerate(together):
        alone, = measure_likelihoods(model, [SAMPLES[i]], 64)
        assert found.logprob == pytest.approx(alone.logprob, abs=tolerance * 1e-5)
        logits = model(torch.from_numpy(SAMPLES[i].ids).long()[None]).logits[0].float().log_softmax(-1)
        expected = sum(float(logits[t - 1, SAMPLES[i].ids[t]]) for t in np.flatnonzero(SAMPLES[i].scored))
        assert found.logprob == pytest.approx(expected, abs=tolerance * 1e-4)
        assert len(remembered.hidden[i]) == SAMPLES[i].tokens
    again = measure_likelihoods(model, SAMPLES, 64, base=remembered)
    assert all(found.kl == pytest.approx(0, abs=1e-6) for found in again)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text", "gpt_oss", "mixtral", "deepseek_v3", "gemma2", "mamba",
                                    "olmo2"])
def test_long_choices_of_one_prompt_score_as_each_alone_in_stock_code(family):
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 300, 24).tolist()  # longer than the windows
    samples = [sample(0, [*prompt, *rng.integers(3, 300, length).tolist()], length) for length in (1, 9, 2, 30)]
    stock = tiny.model(family)
    expected = []
    for one in samples:
        logits = stock(torch.from_numpy(one.ids).long()[None]).logits[0].log_softmax(-1)
        expected.append(sum(float(logits[t - 1, one.ids[t]]) for t in np.flatnonzero(one.scored)))
    model = tiny.model(family)
    model.load_state_dict(stock.state_dict())
    patch(with_packed_attention(model))
    assert [found.logprob for found in measure_likelihoods(model, samples, 256)] == pytest.approx(expected, abs=2e-4)
