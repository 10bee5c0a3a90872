"""Noise on embeddings: transformers' own for one sample, each sample's own size in a pack, and none where nothing is trained."""

import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from tests.helpers import tiny
from trainer.model.neftune import _noisy, add_noise
from trainer.model.pack_context import pack_of, run_pack


def test_one_sample_gets_transformers_noise():
    embedding, ids = nn.Embedding(50, 16), torch.arange(12)[None]
    embedding.neftune_noise_alpha = 5.0
    torch.manual_seed(1)
    theirs = neftune_post_forward_hook(embedding, (ids,), embedding(ids))
    torch.manual_seed(1)
    torch.testing.assert_close(_noisy(5.0, embedding, (ids,), embedding(ids)), theirs)


def test_in_a_pack_each_sample_has_its_own_length():
    embedding, ids = nn.Embedding(50, 64), torch.arange(40)[None]
    with run_pack(pack_of(torch.tensor([0, 4, 40], dtype=torch.int32), 36)):
        noise = (_noisy(5.0, embedding, (ids,), embedding(ids)) - embedding(ids))[0].abs()
    for part, tokens in ((noise[:4], 4), (noise[4:], 36)):
        assert 0.97 < float(part.max() / (5.0 / (tokens * 64) ** 0.5)) <= 1.001


def test_only_training_passes_are_noisy():
    model, ids = tiny.model("llama"), torch.arange(5, 15)[None]
    plain = model(ids).logits
    add_noise(model, 5.0)
    assert torch.equal(model(ids).logits, plain)  # evaluation mode
    model.train()
    assert not torch.equal(model(ids).logits, plain)
    with torch.no_grad():  # the base's pass in a step
        assert torch.equal(model(ids).logits, plain)
