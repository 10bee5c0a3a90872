"""The suites that `python -m benchmarks.run` offers, and the views of all records."""

from __future__ import annotations

from benchmarks.families import census, served
from benchmarks.forgetting import floor, real_text
from benchmarks.forgetting.miniature import demo, mend, study
from benchmarks.forgetting.real_model import study as real_model
from benchmarks.harness.suite import Suite, View
from benchmarks.speed import compare, gsm8k, kernels, options, packs, scale, scaling, synthesis, training

SUITES: dict[str, Suite] = {suite.name: suite for suite in (
    training.SUITE, scaling.SUITE, options.SUITE, kernels.SUITE, gsm8k.SUITE, synthesis.SUITE, compare.SUITE,
    census.SUITE, served.SUITE, packs.SUITE, scale.SUITE, demo.SUITE, mend.SUITE, study.SUITE, real_text.SUITE, real_model.SUITE,
    floor.SUITE)}
VIEWS: dict[str, View] = {name: view for suite in SUITES.values() for name, view in suite.views.items()}
