"""Test comparisons of distributions: closed forms, chance, and samples of the miniature model."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections import defaultdict

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from benchmarks.forgetting.miniature.family import MODELS, load
from benchmarks.forgetting.miniature.instructions import sample_instructions
from benchmarks.forgetting.miniature.tokenizer import BOS, EOT, USER
from synth.reporting import distribution
from synth.reporting.distribution import (
    InstructionSample,
    ReferenceComparison,
    Topics,
    classifier_auc,
    compare_likelihoods,
    compare_repeats,
    squared_mmd,
)

COUNT = 2000


def sample(texts, nats=None) -> InstructionSample:
    tokens = np.array([len(text) + 1 for text in texts])
    return InstructionSample(list(texts), np.full(len(texts), np.nan) if nats is None else -np.asarray(nats) * tokens, tokens)


# ---------------------------------------------------------------- the miniature's own samples


@torch.inference_mode()
def read(model, tokenizer, texts) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The log-probability that the model gives each text with its end, and the mean of its hidden states over it."""
    opening, end = tokenizer.convert_tokens_to_ids([BOS, USER]), tokenizer.convert_tokens_to_ids(EOT)
    by_length = defaultdict(list)
    for text in dict.fromkeys(texts):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        by_length[len(ids)].append((text, [*opening, *ids, end]))
    logprobs, vectors = {}, {}
    for group in by_length.values():
        ids = torch.tensor([ids for _, ids in group])
        out = model(ids[:, :-1], output_hidden_states=True)
        found = torch.log_softmax(out.logits, -1).gather(2, ids[:, 1:, None])[:, len(opening) - 1:, 0].sum(1)
        means = torch.nn.functional.normalize(out.hidden_states[-1].mean(1), dim=-1)
        for (text, _), logprob, mean in zip(group, found.tolist(), means.numpy(), strict=True):
            logprobs[text], vectors[text] = logprob, mean
    return logprobs, vectors


@pytest.fixture(scope="module")
def measured():
    """Fresh samples of the miniature's base against: others like them; a pool at top_p 0.98; part of one of 5,000 without duplicates, as a
    pool is whose every duplicate was dropped; and one at temperature 0.7."""
    torch.set_num_threads(1)
    model, tokenizer = load(MODELS / "base")
    model.eval()
    texts = {"fresh": sample_instructions(model, tokenizer, COUNT, 1, top_p=1.0)}
    texts["again"] = sample_instructions(model, tokenizer, COUNT, 2, top_p=1.0)
    more = sample_instructions(model, tokenizer, 5000, 3)
    texts |= {"good": more[:COUNT], "deduplicated": random.Random(0).sample(list(dict.fromkeys(more)), COUNT)}
    texts["cold"] = sample_instructions(model, tokenizer, COUNT, 4, temperature=0.7)
    logprobs, vectors = read(model, tokenizer, [text for found in texts.values() for text in found])
    samples = {name: InstructionSample(found, np.array([logprobs[text] for text in found]), np.array([len(text) + 1 for text in found]))
               for name, found in texts.items()}
    fresh = samples.pop("fresh")
    with_vectors = ReferenceComparison(fresh, list(samples.values()), 12, vectors)
    without = ReferenceComparison(fresh, list(samples.values()), 12)
    found = {name: with_vectors.compare(one) for name, one in samples.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "classifier_auc", lambda *_: (math.nan, math.nan))  # it reads no vectors: the AUCs are those above
        return {name: found[name] | {f"{key} of words": value for key, value in without.compare(one).items() if "mmd" in key}
                for name, one in samples.items()}


@pytest.mark.slow
def test_figures_rank_a_good_pool_above_a_deduplicated_and_a_cold_one(measured):
    for name in ("again", "good"):
        pool = measured[name]
        assert abs(pool["auc"] - 0.5) < 3 * pool["auc_error"] and 0.005 < pool["auc_error"] < 0.012
        assert pool["mmd_p"] > 0.01 and pool["mmd_p of words"] > 0.01
        assert pool["topics"] < 0.07
    for narrow, margin in (("deduplicated", 1.0), ("cold", 3.0)):
        good, other = measured["good"], measured[narrow]
        assert other["auc"] - good["auc"] > margin * 0.025
        assert other["mmd2"] - good["mmd2"] > margin * 0.0015 and other["mmd_p"] == 1 / 500
        assert other["mmd2 of words"] - good["mmd2 of words"] > margin * 0.001
        assert other["topics"] - good["topics"] > margin * 0.025
        assert other["ks"] - good["ks"] > margin * 0.025


@pytest.mark.slow
def test_what_is_lacking_shows(measured):
    """Duplicates are missing from one pool; the other is likelier than fresh samples and repeats itself."""
    assert measured["deduplicated"]["repeated"] == 0 < 0.1 < measured["deduplicated"]["repeated_reference"]
    assert abs(measured["good"]["repeated"] - measured["good"]["repeated_reference"]) < 4 * measured["good"]["repeated_error"]
    assert measured["cold"]["nats_text_difference"] < -1 < -0.7 < measured["good"]["nats_text_difference"]
    assert measured["cold"]["repeated"] > 1.5 * measured["cold"]["repeated_reference"]


# ---------------------------------------------------------------- closed forms


def test_mmd_of_few_vectors_is_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 3)), rng.normal(size=(9, 3)) + 0.5

    def mean_kernel(x, y):
        pairs = [math.exp(-((p - q)**2).sum() / (2 * 1.3**2)) for i, p in enumerate(x) for j, q in enumerate(y) if x is not y or i != j]
        return sum(pairs) / len(pairs)

    value, p, z = squared_mmd(a, b, 1.3, 0)
    assert value == pytest.approx(mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b), abs=1e-6)
    assert 0 < p <= 1 and squared_mmd(a, b, 1.3, 0) == (value, p, z)


def test_mmds_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(1)
    p = [squared_mmd(rng.normal(size=(30, 2)), rng.normal(size=(40, 2)), 1.0, seed)[1] for seed in range(200)]
    assert abs(np.mean(p) - 0.5) < 0.07 and 0.01 < np.mean(np.array(p) < 0.05) < 0.12
    assert squared_mmd(rng.normal(size=(60, 2)), rng.normal(size=(60, 2)) + 1, 1.0, 0)[1] == 1 / 500


@pytest.mark.slow
def test_the_classifier_on_one_feature():
    """Two normal distributions a distance of 1 apart have an AUC of Φ(1/√2) = 0.760."""
    rng = np.random.default_rng(2)
    a, b = (csr_matrix(rng.normal(mean, 1, (1500, 1))) for mean in (0, 1))
    auc, error = classifier_auc(a, b, 0)
    assert auc == pytest.approx(0.760, abs=4 * error) and error == pytest.approx(0.0089, rel=0.3)


@pytest.mark.slow
def test_a_text_drawn_often_on_one_side_only_is_told_apart():
    """It is the share of draws that counts: the same texts on both sides, in other proportions."""
    rng = np.random.default_rng(3)
    fresh, again, skewed = (sample([f"question {chr(97 + i)}" for i in rng.choice(10, 1000, p=p)])
                            for p in ([0.1] * 10, [0.1] * 10, [0.05] * 9 + [0.55]))
    found = ReferenceComparison(fresh, [skewed, again], 10)
    # of the best classifier: the rare one has 0.55 against 0.1, and the others are even: 1/2 + 0.45/2
    assert found.compare(skewed)["auc"] == pytest.approx(0.725, abs=0.03)
    assert found.compare(again)["auc"] == pytest.approx(0.5, abs=0.04)
    assert found.compare(skewed)["topics"] == pytest.approx(0.45, abs=0.03)
    assert found.compare(again)["topics"] == pytest.approx(found.compare(again)["topics_chance"], abs=0.03)


def test_likelihoods_are_means_and_the_greatest_distance():
    fresh, other = sample(["abc"] * 10, np.arange(10.0)), sample(["abc"] * 10, np.arange(10.0) + 5)
    found = compare_likelihoods(fresh, other)
    assert found["ks"] == 0.5 and found["nats_difference"] == 5 and found["nats_text_difference"] == 20
    assert found["nats_error"] == pytest.approx(math.sqrt(2 * 8.25 / 10))
    assert compare_likelihoods(fresh, sample(["abc"] * 10)) == {}  # a server that does not tell


def test_repeats_among_equally_many():
    found = compare_repeats(["a", "a", "b", "c", "a", "b"], ["a", "b", "b", "b"])
    assert found["repeated"] == 0.75 and found["repeated_reference"] == 0.5


@pytest.mark.slow
def test_few_texts_and_equal_ones_are_no_obstacle():
    few, same = sample(["a", "b"]), sample(["x"] * 30)
    assert ReferenceComparison(few, [same], 3).compare(same) == {"texts": 30, "characters": 1.0, "tokens": 2.0}
    found = ReferenceComparison(same, [same], 3)
    assert found.compare(same)["auc"] == 0.5 and found.compare(same)["topics"] == 0
    assert found.topics.count == 1 and found.baseline()["texts"] == 15


def test_topics_have_their_words_and_are_largest_first():
    texts = [f"add {i} and {j}" for i in range(8) for j in range(5)] + [f"what is the capital of land {i}" for i in range(20)]
    topics = Topics(texts, range(60), 2, 0)
    assert topics.shares(np.arange(60)).tolist() == pytest.approx([2 / 3, 1 / 3])
    first, second = topics.describe()
    assert "add" in first["words"] and "capital" in second["words"] and all("capital" in text for text in second["examples"])


@pytest.mark.slow
def test_equal_settings_give_equal_figures():
    texts = [f"how many {word} are there" for word in "abcdefghij" * 5]
    fresh, pool = sample(texts), sample(texts[:30])
    assert ReferenceComparison(fresh, [pool], 4, seed=5).compare(pool) == ReferenceComparison(fresh, [pool], 4, seed=5).compare(pool)


def test_mmd_never_holds_the_whole_kernel():
    a, b = np.random.default_rng(3).normal(size=(2, 1200, 4))
    squared_mmd(a[:5], b[:5], 1.0, 0)
    tracemalloc.start()
    squared_mmd(a, b, 1.0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2400**2 * 4  # bytes of the kernel in fp32
