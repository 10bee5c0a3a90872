"""Patching: names, copies and pickles stay; the report says what runs fused, and on what."""

import copy
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from kernels import _dispatch, _launch
from tests.helpers import tiny
from tests.helpers.models import SETTINGS, our_logits, pack, with_packed_attention
from trainer.errors import UserError
from trainer.model import fused_layers
from trainer.model.forward import forward_hidden
from trainer.model.patch import patch


def test_patched_model_generates_with_stock_attention():
    model, prompt = tiny.model("gemma3_text"), torch.tensor([[2, 2, 7, 8], [5, 6, 7, 9]])
    settings = dict(attention_mask=(prompt != 2).long(), max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = model.generate(prompt, **settings)
    patch(with_packed_attention(model))
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(prompt, **settings), expected)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_patched_model_copies_pickles_and_keeps_its_names(family):
    model, batch = with_packed_attention(tiny.model(family)), pack()
    names = list(model.state_dict())
    patch(model)
    expected = our_logits(model, batch)
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(our_logits(other, batch), expected)
        next(other.model.layers[0].self_attn.parameters()).data.zero_()
        assert not torch.equal(our_logits(other, batch), expected)  # its forwards use its own weights
    assert torch.equal(our_logits(model, batch), expected)


def test_patching_twice_is_patching_once():
    model, batch = with_packed_attention(tiny.model("llama")), pack()
    first = patch(model)
    expected = our_logits(model, batch)
    assert patch(model) == first
    assert torch.equal(our_logits(model, batch), expected)


COVERED = {  # what operations serve two layers and a last norm
    "llama": dict(rms_norm=3, add_rms_norm=2, rope=2, glu=2),
    "phi3": dict(rms_norm=3, add_rms_norm=2, rope=2, glu=2),
    "qwen3": dict(rms_norm=3, add_rms_norm=2, qk_norm_rope=2, glu=2),
    "gemma3_text": dict(rms_norm=7, add_rms_norm=2, qk_norm_rope=2, glu=2),
    "granite": dict(rms_norm=5, rope=2, glu=2),
    "olmo2": dict(rms_norm=9, rope=2, glu=2),
    "smollm3": dict(rms_norm=3, add_rms_norm=2, rope=1, glu=2),  # one layer without positions
}


@pytest.mark.parametrize("family", COVERED)
def test_report_counts_the_operations_that_run(family, monkeypatch):
    """Every operation of the report is called as often as it says in one forward, from the backend that it says."""
    calls = Counter()

    def counted(op, original):
        def call(*args, **kwargs):
            calls["rope" if op == "apply_rope" else op] += 1
            return original(*args, **kwargs)
        return call

    for op in ("rms_norm", "add_rms_norm", "qk_norm_rope", "apply_rope", "glu"):
        monkeypatch.setattr(fused_layers, op, counted(op, getattr(fused_layers, op)))
    model = with_packed_attention(tiny.model(family, **SETTINGS.get(family, {})))
    report = patch(model)
    calls.clear()  # of the check that they are right
    forward_hidden(model, pack())
    assert calls == COVERED[family]
    assert report.backends == {"attention": "packed (tiles)", "linear cross entropy": "reference",
                               **{op: f"reference x {n}" for op, n in COVERED[family].items()}}
    assert f"  add_rms_norm: reference x {calls['add_rms_norm']}\n" in str(report) or not calls["add_rms_norm"]


def test_report_says_what_stays_stock():
    relu = with_packed_attention(tiny.model("llama", hidden_act="relu"))
    assert patch(relu).backends["glu"] == "stock"
    dropping = with_packed_attention(tiny.model("phi3", resid_pdrop=0.1))
    assert "add_rms_norm" not in patch(dropping).backends and "forward" not in vars(dropping.model.layers[0])
    off = with_packed_attention(tiny.model("llama"))
    report = patch(off, enabled=False)
    assert "model.fused_kernels is off" in str(report) and report.backends.keys() == {"attention", "linear cross entropy"}
    assert not any("forward" in vars(module) for module in off.modules())


@pytest.mark.parametrize("mode, interpreted, message", [
    ("fast", False, "KERNELS_BACKEND: expected one of auto, triton, reference, got 'fast'"),
    ("triton", False, "KERNELS_BACKEND=triton: expected a tensor on a GPU, got one on cpu; use KERNELS_BACKEND=auto"),
])
def test_backend_that_cannot_be_had_is_one_line(mode, interpreted, message, monkeypatch):
    if _launch.triton is None and mode == "triton":
        message = "KERNELS_BACKEND=triton: expected Triton to be installed"
    monkeypatch.setattr(_dispatch, "_mode", mode)
    monkeypatch.setattr(_launch, "INTERPRETED", interpreted)
    with pytest.raises(UserError, match=message) as caught:
        patch(tiny.model("llama"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_unknown_backend_fails_where_it_is_used_not_on_import():
    done = subprocess.run([sys.executable, "-c", "import kernels"], env=os.environ | {"KERNELS_BACKEND": "fast"}, capture_output=True,
                          text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
