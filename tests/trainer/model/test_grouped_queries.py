"""Keys that several query heads share are read once on a CPU, and nothing else changes."""

import pytest
import torch
from transformers.integrations import sdpa_attention

from tests.helpers import tiny
from trainer.model.grouped_queries import grouped_queries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_logits_of_padded_batches_are_the_same_bits_without_repeated_keys(family, dtype, monkeypatch):
    model = tiny.model(family, dtype, num_attention_heads=4, num_key_value_heads=2, head_dim=16).eval()
    prompt = torch.tensor([[2, 2, 7, 8, 9], [5, 6, 7, 9, 3]])
    settings = dict(attention_mask=(prompt != 2).long(), max_new_tokens=6, do_sample=False, eos_token_id=None, output_logits=True,
                    return_dict_in_generate=True)
    repeated = []
    stock = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *args: repeated.append(1) or stock(*args))
    expected = model.generate(prompt, **settings)
    assert repeated, "stock code repeats keys where there is a mask"
    repeated.clear()
    with grouped_queries():
        found = model.generate(prompt, **settings)
    assert not repeated
    assert all(torch.equal(*pair) for pair in zip(expected.logits, found.logits, strict=True))
    model.generate(prompt, **settings)
    assert repeated, "outside of the context the code is stock"
