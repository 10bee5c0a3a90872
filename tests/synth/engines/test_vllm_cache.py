"""The KV cache that a model gets on a CPU, without running the model."""

from types import SimpleNamespace

import pytest

from tests.helpers import tiny

# Numbers that vLLM keeps of a token: keys and values of two heads, 16 wide in the sliding layer and 32 in the global one; two latents.
WIDTHS = {"gemma4_text": 2 * 2 * 16 + 2 * 2 * 32, "qwen3_5_text": 2 * 2 * 16, "deepseek_v3": 2 * (16 + 8)}


@pytest.mark.slow
@pytest.mark.parametrize("family", WIDTHS)
def test_cache_follows_each_layers_attention(tmp_path, family, monkeypatch):
    vllm = pytest.importorskip("synth.engines.vllm")
    monkeypatch.setattr(vllm, "CPU_CACHE_MIN_BYTES", 0)
    tiny.model_config(family, **({"global_head_dim": 32} if family == "gemma4_text" else {})).save_pretrained(tmp_path)
    load = SimpleNamespace(folder=str(tmp_path), workers=1, model=SimpleNamespace(path=str(tmp_path), trust_remote_code=False))
    one = 100 * 4 * WIDTHS[family]
    assert vllm._cache(load, 100, "float32") == vllm.CPU_CACHE_SEQUENCES * one
    monkeypatch.setattr(vllm, "CPU_CACHE_MOST_BYTES", 10 * one)
    assert vllm._cache(load, 100, "float32") == 10 * one
    monkeypatch.setattr(vllm, "CPU_CACHE_MOST_BYTES", one // 2)
    assert vllm._cache(load, 100, "float32") == one, "a sequence of full length fits"
    monkeypatch.setattr(vllm.psutil, "virtual_memory", lambda: SimpleNamespace(available=one))
    assert vllm._cache(load, 100, "float32") == one // 2, "half of the free memory"
