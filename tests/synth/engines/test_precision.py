"""The dtype of `auto` on a CPU, with and without products of bf16, and the line about what it gives up."""

import pytest
import torch

from synth.config import Model
from synth.engines import precision
from synth.engines.precision import GIVEN_UP, cpu_dtype, notes_on_dtype

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(("fast", "stored", "options", "expected"), [
    (True, BF16, {}, "bfloat16"), (True, FP16, {}, "bfloat16"), (True, FP32, {}, "float32"), (True, None, {}, "float32"),
    (False, BF16, {}, "float32"), (True, BF16, {"batch_invariant": True}, "float32"), (True, BF16, {"dtype": "float32"}, "float32"),
    (False, FP32, {"dtype": "bfloat16"}, "bfloat16"), (True, BF16, {"dtype": "float16"}, "float16")])
def test_auto_takes_bf16_where_it_is_fast_and_nothing_else_is_asked(monkeypatch, fast, stored, options, expected):
    monkeypatch.setattr(precision, "fast_bf16", lambda: fast)
    model = Model(path="m", **options)
    found = cpu_dtype(model, stored)
    assert found == expected
    assert notes_on_dtype(model, found) == ((GIVEN_UP,) if expected == "bfloat16" and "dtype" not in options else ())
    assert "\n" not in GIVEN_UP


def test_the_transformers_engine_computes_in_it_and_says_so(tmp_path, monkeypatch):
    from synth.engines.hf import TransformersModel
    from synth.engines.protocol import LoadRequest
    from tests.helpers import tiny
    from tests.helpers.engine_here import put_back

    put_back(monkeypatch)
    monkeypatch.setattr(precision, "fast_bf16", lambda: True)
    tiny.save_model(tmp_path, "qwen3")
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"float32"', '"bfloat16"'))
    for asked, name, notes in ((False, "bfloat16", (GIVEN_UP,)), (True, "float32", ())):
        ready = TransformersModel(LoadRequest("transformers", Model(path="m", batch_invariant=asked), str(tmp_path), 1)).ready
        assert name in ready.name and ready.notes == notes and ready.deterministic == asked
