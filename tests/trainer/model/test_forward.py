"""Running packs: selected rows, hidden states, padding and activation checkpointing."""

import pickle

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.helpers import tiny
from tests.helpers.models import SETTINGS, gradients, our_logits, pack, relative_error, unlike_initial, with_packed_attention
from trainer.config import Config, Model
from trainer.data.batch import NO_PADDING
from trainer.errors import UserError
from trainer.model.families import FAMILIES
from trainer.model.forward import CPU_16BIT_PADDING, apply_activation_checkpointing, forward_hidden, lm_head, padding_for
from trainer.model.fused_layers import row_selecting_layer
from trainer.model.loading import load_model
from trainer.model.packed_attention import last_hidden_states
from trainer.model.patch import patch


@pytest.mark.parametrize("how", ["plain", "checkpointed", "a hook on the last norm"])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "glm4", "hunyuan_v1_dense", "ministral3", "qwen3_5_text", "qwen3_moe"])
def test_some_rows_of_the_last_layer_equal_those_of_all(family, how):
    """Hidden states and gradients in fp64; what is left out is not computed where our layers serve the family."""
    model = with_packed_attention(unlike_initial(tiny.model(family, dtype=torch.float64, **SETTINGS.get(family, {}))))
    patch(model)
    last = row_selecting_layer(model)
    assert (last is None) == (FAMILIES[family].stream_norm is None if family in FAMILIES else True)
    if how == "checkpointed":
        model.train()
        apply_activation_checkpointing(model, "full")
    elif how == "a hook on the last norm" and last is not None:
        getattr(last, FAMILIES[family].stream_norm).register_forward_hook(lambda *_: None)
    batch, rows = pack(), torch.tensor([0, 3, 4, 9, 17])
    expected = forward_hidden(model, batch).index_select(0, rows)
    gradient = gradients(model, expected)
    model.zero_grad()
    passed = []
    if last is not None:
        last.mlp.register_forward_hook(lambda mlp, given, out: passed.append(out.shape[1]))
    found = forward_hidden(model, batch, rows)
    assert relative_error(found, expected) < 1e-12
    for name, other in gradients(model, found).items():
        assert relative_error(other, gradient[name]) < 1e-10, name
    left_out = last is not None and how != "a hook on the last norm"
    assert set(passed) == ({5} if left_out else {batch.tokens} if last is not None else set())


def test_a_pack_does_not_walk_through_the_modules(monkeypatch):
    """A walk through all modules took a fifth of a forward pass's time on the host."""
    model = with_packed_attention(tiny.model("llama"))
    patch(model)
    forward_hidden(model, pack())  # transformers looks once for layers whose outputs it may be asked for
    monkeypatch.setattr(torch.nn.Module, "modules", lambda model: pytest.fail("a walk through all modules"))
    assert forward_hidden(model, pack(), torch.tensor([0, 3])).shape[0] == 2


@pytest.mark.parametrize("family", ["cohere", "falcon_h1", "gemma2", "granite", "hyperclovax", "inkling_text", "recurrent_gemma", "xlstm"])
def test_head_gives_the_logits_of_the_model(family):
    """Scales that multiply or divide, and soft caps, under the names that families give them."""
    model, ids = tiny.model(family), torch.arange(24).view(2, 12)
    hidden = last_hidden_states(model, ids, torch.arange(12).expand(2, -1))
    assert relative_error(lm_head(model).logits(hidden), model(input_ids=ids, use_cache=False).logits) < 1e-5
    head = lm_head(model)
    assert head.softcap is not None or head.logit_scale != 1.0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_hidden_states_of_a_patched_model_are_those_of_the_stock_one(family):
    """transformers collects them with hooks on decoder layers, installed at the first call that asks."""
    model, ids = tiny.model(family), torch.arange(24).view(2, 12)
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    patch(with_packed_attention(model))
    for fresh in (model, pickle.loads(pickle.dumps(patched_in_training(family)))):
        found = fresh.eval()(input_ids=ids, output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == 3
        for mine, true in zip(found, expected):
            assert relative_error(mine, true) < 1e-5


def patched_in_training(family="llama", **overrides):
    model = with_packed_attention(tiny.model(family, **overrides)).train()
    patch(model)
    return model


def gradients_and_calls(mode, family):
    """Gradients under an activation checkpointing mode, and how often MLPs ran."""
    model, calls = patched_in_training(family, num_hidden_layers=4), []
    apply_activation_checkpointing(model, mode)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    return gradients(model, our_logits(model, pack())), len(calls)


@pytest.mark.parametrize("mode, runs", [("none", 4), ("selective", 6), ("full", 8)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointing_recomputes_and_changes_nothing(mode, runs, family):
    expected, _ = gradients_and_calls("none", family)
    found, ran = gradients_and_calls(mode, family)
    assert ran == runs
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_checkpointing_can_be_taken_back_and_needs_layers_that_support_it():
    model = patched_in_training()
    apply_activation_checkpointing(model, "full")
    apply_activation_checkpointing(model, "none")
    assert not any(layer.gradient_checkpointing for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer))
    bare = torch.nn.Module()
    bare.config = model.config
    with pytest.raises(UserError, match="activation_checkpointing"):
        apply_activation_checkpointing(bare, "full")


def test_packs_are_filled_up_for_16_bit_products_on_a_cpu_alone(model_folder):
    models = [load_model(Config(model=Model(path=str(model_folder)), precision=precision), "cpu")[0] for precision in ("fp32", "bf16")]
    assert [padding_for(model) for model in models] == [NO_PADDING, CPU_16BIT_PADDING]
    models[1].set_attn_implementation("sdpa")  # one sample at a time
    assert padding_for(models[1]) == NO_PADDING
