"""Modules that carry a state along the sequence: each sample of a pack as if alone, everything else in one call."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import tiny
from tests.helpers.models import gradients, our_logits, pack, relative_error, stock_logits, with_packed_attention
from trainer.model.forward import apply_activation_checkpointing
from trainer.model.mixers import PADDING, SHORT, batches_of_like_length, run_by_sample, runs_by_sample
from trainer.model.pack_context import pack_of, run_pack
from trainer.model.packed_attention import is_packed
from trainer.model.patch import patch

MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
DELTA = dict(head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
HYBRIDS = {  # family: (settings, mixers in four layers)
    "qwen3_5_text": (DELTA, 3),
    "qwen3_next": (DELTA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32), 3),
    "lfm2": (dict(layer_types=["conv", "conv", "full_attention", "conv"]), 3),
    "granitemoehybrid": (MAMBA | dict(layer_types=["mamba", "attention"] * 2, num_local_experts=2, num_experts_per_tok=1,
                                      shared_intermediate_size=32), 2),
    "falcon_h1": (MAMBA | dict(mamba_d_ssm=128, head_dim=16), 4),
    "jamba": (dict(mamba_d_state=4, mamba_dt_rank=4, num_experts=2, attn_layer_period=2, attn_layer_offset=1), 2),
    "minimax": (dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1), 2),
}


def hybrid(family):
    shape = dict(vocab_size=400, hidden_size=64, intermediate_size=112, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=512, bos_token_id=0, eos_token_id=4, pad_token_id=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(shape | HYBRIDS[family][0])), dtype=torch.float32).eval()


def test_a_residual_stream_in_fp32_meets_a_head_in_bf16():
    """Mamba keeps its residual stream in fp32, and so returns it."""
    settings = dict(vocab_size=400, hidden_size=64, num_hidden_layers=2, state_size=4, pad_token_id=2, bos_token_id=0, eos_token_id=4)
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings), dtype=torch.bfloat16).eval()
    ours = with_packed_attention(copy.deepcopy(stock))
    assert is_packed(ours) and relative_error(our_logits(ours, pack()), stock_logits(stock, pack())) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_run_packed_and_exact(family, caplog):
    stock, ours = hybrid(family), with_packed_attention(hybrid(family))
    report = patch(ours)
    apply_activation_checkpointing(ours.train(), "full")
    mixers = HYBRIDS[family][1]
    assert is_packed(ours) and "one at a time" not in caplog.text
    assert report.backends["mixers"] == f"stock x {mixers}, each sample by itself"
    batch = pack()
    expected, found = stock_logits(stock, batch), our_logits(ours, batch)
    assert relative_error(found, expected) < 1e-5
    exact, ours = gradients(stock, expected), gradients(ours, found)
    assert set(exact) == set(ours)
    scale = max(float(gradient.norm()) for gradient in exact.values())
    assert all(float((ours[name] - gradient).norm()) < 1e-5 * scale for name, gradient in exact.items())


class RunningSum(nn.Module):
    """Sums of all tokens so far, with the arguments that layers pass to mixers."""

    calls = 0

    def forward(self, hidden_states, position_ids=None, position_embeddings=None, cache=None):
        self.calls += 1
        assert hidden_states.shape[:2] == position_ids.shape == position_embeddings[0].shape[:2]
        assert position_ids.amin(1).eq(0).all() and cache is None
        return hidden_states.cumsum(1) + position_embeddings[0], position_ids


@pytest.mark.parametrize("lengths", [(1,), (5, 5, 5), (300, 3, 70, 1, 290, 64)])
def test_a_mixer_sees_each_sample_from_its_start(lengths):
    mixer = RunningSum()
    run_by_sample(mixer)
    run_by_sample(mixer)
    assert runs_by_sample(mixer)
    x, bounds = torch.randint(9, (1, sum(lengths), 4)).double(), torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with run_pack(pack_of(bounds, max(lengths))):
        found, where = mixer(x, position_ids=positions, position_embeddings=(x + 1, None))
    expected = torch.cat([part.cumsum(1) for part in x.split(lengths, 1)], 1) + x + 1
    assert torch.equal(found, expected)
    assert torch.equal(where, positions)
    assert mixer.calls <= 4
    plain = mixer(x[:, :lengths[0]], position_ids=positions[:, :lengths[0]], position_embeddings=(x[:, :lengths[0]], None))[0]
    assert torch.equal(plain, x[:, :lengths[0]].cumsum(1) + x[:, :lengths[0]])


def test_batches_hold_every_token_once_and_little_padding():
    lengths = torch.randint(1, 500, (60,), generator=torch.Generator().manual_seed(0))
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    batches = batches_of_like_length(bounds)
    assert torch.equal(torch.cat([tokens.flatten() for tokens in batches.tokens])[batches.places], torch.arange(int(bounds[-1])))
    for tokens in batches.tokens:
        real = (tokens.diff(dim=1) > 0).sum(1) + 1
        assert real.min() >= tokens.shape[1] - max(SHORT, int(PADDING * tokens.shape[1]))
    assert sum(tokens.numel() for tokens in batches.tokens) < 1.2 * lengths.sum()
    assert len(batches.tokens) < 20


def test_a_family_of_attention_alone_has_no_mixers():
    model = with_packed_attention(tiny.model("llama"))
    assert not any(map(runs_by_sample, model.modules()))
    assert "mixers" not in patch(model).backends
