"""Packs beside one sample at a time: a short run, its record and its table."""

import argparse

import pytest

from benchmarks.harness import show
from benchmarks.harness.synthetic_models import random_samples
from benchmarks.speed import packs
from trainer.errors import UserError
from trainer.model.forward import unwrap_peft
from trainer.model.packed_attention import is_packed


@pytest.mark.slow
def test_a_short_run_agrees_and_makes_a_table(monkeypatch):
    monkeypatch.setattr(packs, "SAMPLES", 32)
    monkeypatch.setattr(packs, "TOKENS_PER_STEP", 256)
    record = packs.run(argparse.Namespace(families=["lfm2", "qwen3_moe"], rounds=2))
    assert [(row["line"], row["packed"], row["mixers"]) for row in record["summary"]] == [("lfm2", True, 4), ("qwen3_moe", True, 0)]
    assert max(record["agreement"].values()) < 1e-4
    head, lfm2, moe = packs.table(record)
    assert head[0] == "family" and lfm2[:2] == ["lfm2", "4"] and moe[:2] == ["qwen3_moe", "0"]
    view = packs.SUITE.views["packs"]
    assert "times as fast as one sample at a time" in view.headline(record)
    assert "one sample at a time, tokens/CPU-s" in show.markdown(record, view)


@pytest.mark.parametrize("packed", [True, False])
def test_one_contender_packs_and_the_other_does_not(packed):
    samples = random_samples([20, 30], packs.VOCABULARY, seed=0)
    made = packs.contender("lfm2", samples, packed)
    calls = []
    base = unwrap_peft(made.model)
    base.model.layers[2].feed_forward.register_forward_hook(lambda mlp, args, out: calls.append(out.shape[1]))
    made.step_on(samples)
    assert is_packed(base) == packed
    assert calls == ([50] if packed else [20, 30])


@pytest.mark.parametrize("options, message", [(dict(families=["bloom"], rounds=2), "--families: expected names of qwen3"),
                                              (dict(families=["lfm2"], rounds=1), "--rounds: expected at least 2, got 1")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        packs.run(argparse.Namespace(**options))
