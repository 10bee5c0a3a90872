"""Packed and patched models give the logits and gradients of stock ones; what cannot be loaded is said in one line."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels import _dispatch, _launch
from tests.helpers import tiny
from tests.helpers.kernels import triton_mode
from trainer.config import Config, Model
from trainer.data.batch import NO_PADDING, collate
from trainer.data.samples import Piece
from trainer.errors import UserError
from trainer.model import families
from trainer.model.families import FAMILIES
from trainer.model.forward import CPU_16BIT_PADDING, apply_activation_checkpointing, forward_hidden, lm_head, padding_for
from trainer.model.fused_layers import row_selecting_layer
from trainer.model.loading import load_model, meta_model, use_packed_attention
from trainer.model.packed_attention import PACKED, is_packed
from trainer.model.patch import patch

LENGTHS = (13, 1, 20, 13)
SETTINGS = {  # what tiny.py leaves at its default
    "qwen2": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "smollm3": dict(no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "phi3": dict(sliding_window=7),
    "gemma2": dict(attn_logit_softcapping=0.5),
}
UNKNOWN = {  # family: (settings, whether it packs)
    "gpt_neox": ({}, True),
    "starcoder2": (dict(sliding_window=8), True),
    "opt": (dict(ffn_dim=112, word_embed_proj_dim=32), True),
    "cohere": (dict(logit_scale=0.25), True),
    "gemma3_text": (dict(use_bidirectional_attention=True, sliding_window=8), False),
    "stablelm": ({}, False),  # its layers drop keyword arguments
    "bloom": (dict(n_head=4, n_layer=2), False),  # its attention has a bias by distance
    "mamba": (dict(state_size=4), False),  # a recurrence crosses from sample to sample
    "gpt_oss": (dict(head_dim=16, num_local_experts=2, num_experts_per_tok=1), False),  # its attention has sinks
    "llama4_text": (dict(head_dim=16, num_local_experts=2, intermediate_size_mlp=64, attention_chunk_size=8), False),  # chunked
}


def pack(lengths=LENGTHS, vocab_size=400):
    rng = np.random.default_rng(1)
    return collate([Piece(rng.integers(5, vocab_size, n).astype(np.int32), np.ones(n, bool)) for n in lengths])


def unlike_initial(model):
    """Give norms and biases values that matter, in place."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.empty_like(parameter).normal_(0.5, 0.3, generator=generator)
    return model


def stock_logits(model, batch):
    """Each sample alone through the model's own forward."""
    lengths = batch.cu_seqlens.diff().tolist()
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in batch.input_ids.split(lengths)])


def our_logits(model, batch):
    return lm_head(model).logits(forward_hidden(model, batch))


def ready(model):
    """What load_model does to a model after loading it."""
    use_packed_attention(model)
    return model


def relative_error(ours, exact):
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())


def gradients(model, logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(logits.dtype)
    (logits * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [True, False], ids=["patched", "registered attention only"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_model_equals_stock_model(family, fused):
    """In fp64; the stock norms compute in fp32 all the same, and a softmax that cancels enlarges what they round: hence 3e-5."""
    settings = SETTINGS.get(family, {})
    stock = unlike_initial(tiny.model(family, dtype=torch.float64, **settings))
    ours = ready(unlike_initial(tiny.model(family, dtype=torch.float64, **settings)))
    stock.set_attn_implementation("eager")
    report = patch(ours, fused)
    batch = pack()
    expected, found = stock_logits(stock, batch), our_logits(ours, batch)
    assert relative_error(found, expected) < 1e-6
    expected, found = gradients(stock, expected), gradients(ours, found)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 3e-5, name
    assert report.backends["attention"].startswith("packed")


def test_families_are_tested():
    assert set(FAMILIES) == set(tiny.FAMILIES)


@pytest.mark.parametrize("how", ["plain", "checkpointed", "a hook on the last norm"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_some_rows_of_the_last_layer_equal_those_of_all(family, how):
    """Hidden states and gradients in fp64; what is left out is not computed where our layers serve the family."""
    model = ready(unlike_initial(tiny.model(family, dtype=torch.float64, **SETTINGS.get(family, {}))))
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


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_bf16_is_as_exact_as_stock_bf16(family):
    batch = pack()
    exact_model = unlike_initial(tiny.model(family, dtype=torch.float64))
    exact = stock_logits(exact_model, batch)
    exact_gradients = gradients(exact_model, exact)
    errors = {}
    for ours in (True, False):
        model = unlike_initial(tiny.model(family, dtype=torch.float64)).to(torch.bfloat16)
        if ours:
            patch(ready(model))
        logits = our_logits(model, batch) if ours else stock_logits(model, batch)
        found = gradients(model, logits)
        flat = [torch.cat([g[name].double().flatten() for name in exact_gradients]) for g in (found, exact_gradients)]
        errors[ours] = relative_error(logits, exact), relative_error(*flat)
    assert errors[True][0] <= 2 * errors[False][0]
    assert errors[True][1] <= 2 * errors[False][1]


@pytest.mark.parametrize("family", UNKNOWN)
def test_unknown_family_is_right_and_says_so(family, caplog):
    settings, packs = UNKNOWN[family]
    shape = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=512, vocab_size=400, pad_token_id=2)
    config = AutoConfig.for_model(family, **(shape | settings))
    stock, ours = (AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for _ in range(2))
    ours.load_state_dict(stock.state_dict())
    with caplog.at_level(logging.WARNING, "trainer"):
        report = patch(ready(ours))
    batch = pack()
    expected = stock_logits(stock, batch)
    assert is_packed(ours) == packs
    assert relative_error(our_logits(ours, batch), expected) < 1e-5
    assert "unknown family" in str(report)
    assert ("one at a time" in caplog.text) != packs


def test_unknown_head_is_refused():
    model = tiny.model("llama")
    model.config.model_type = "unheard-of"
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x).tanh()
    with pytest.raises(UserError, match="head of unheard-of"):
        ready(model)


def test_window_counts_the_token_itself():
    """Seven tokens back is seen with a window of 8, eight is not; in stock layers, and in ours."""
    for patched in (False, True):
        model = tiny.model("mistral", num_hidden_layers=1)
        if patched:
            patch(ready(model))
        batch = pack((20,))
        for distance, seen in ((7, True), (8, False)):
            changed = batch.input_ids.clone()
            changed[19 - distance] += 1
            with torch.no_grad():
                before, after = (our_logits(model, replace(batch, input_ids=ids))[19] for ids in (batch.input_ids, changed))
            assert (not torch.equal(before, after)) == seen


def test_no_mask_is_built():
    model = ready(tiny.model("mistral"))
    batch = pack()
    arguments = dict(config=model.config, inputs_embeds=torch.zeros(1, batch.tokens, 64), attention_mask=None, past_key_values=None,
                     position_ids=batch.position_ids[None])
    assert create_causal_mask(**arguments) is None
    assert create_sliding_window_causal_mask(**arguments) is None


@pytest.mark.parametrize("patched", [False, True])
def test_rows_without_boundaries_are_one_sample_each(patched):
    model, ids = tiny.model("qwen3"), torch.arange(24).view(2, 12)
    expected = model(input_ids=ids, use_cache=False).logits
    ready(model)
    if patched:
        patch(model)
    assert relative_error(model(input_ids=ids, use_cache=False).logits, expected) < 1e-5


@pytest.mark.parametrize("patched", [False, True])
def test_masks_and_caches_are_refused(patched):
    model, ids = ready(tiny.model("llama")), torch.arange(12).view(2, 6)
    if patched:
        patch(model)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with pytest.raises(ValueError, match="expected no attention_mask.*set_attn_implementation"):
        model(input_ids=ids, attention_mask=padded)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="neither mask nor cache, got 6 cached tokens"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_patched_model_generates_with_stock_attention():
    model, prompt = tiny.model("gemma3_text"), torch.tensor([[2, 2, 7, 8], [5, 6, 7, 9]])
    settings = dict(attention_mask=(prompt != 2).long(), max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = model.generate(prompt, **settings)
    patch(ready(model))
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(prompt, **settings), expected)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_patched_model_copies_pickles_and_keeps_its_names(family):
    model, batch = ready(tiny.model(family)), pack()
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
    model, batch = ready(tiny.model("llama")), pack()
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
        monkeypatch.setattr(families, op, counted(op, getattr(families, op)))
    model = ready(tiny.model(family, **SETTINGS.get(family, {})))
    report = patch(model)
    forward_hidden(model, pack())
    assert calls == COVERED[family]
    assert report.backends == {"attention": "packed (tiles)", "linear cross entropy": "reference",
                               **{op: f"reference x {n}" for op, n in COVERED[family].items()}}
    assert f"  add_rms_norm: reference x {calls['add_rms_norm']}\n" in str(report) or not calls["add_rms_norm"]


def test_report_says_what_stays_stock():
    relu = ready(tiny.model("llama", hidden_act="relu"))
    assert patch(relu).backends["glu"] == "stock"
    dropping = ready(tiny.model("phi3", resid_pdrop=0.1))
    assert "add_rms_norm" not in patch(dropping).backends and "forward" not in vars(dropping.model.layers[0])
    off = ready(tiny.model("llama"))
    report = patch(off, enabled=False)
    assert "model.fused_kernels is off" in str(report) and report.backends.keys() == {"attention", "linear cross entropy"}
    assert not any("forward" in vars(module) for module in off.modules())


@pytest.mark.skipif(not _launch.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_models_run_on_the_kernels(family):
    settings, batch = SETTINGS.get(family, {}), pack((5, 1, 7))
    stock, ours = (unlike_initial(tiny.model(family, **settings)) for _ in range(2))
    expected = stock_logits(stock, batch)
    with triton_mode():
        report = patch(ready(ours))
        found = our_logits(ours, batch)
        gradient = gradients(ours, found)
    assert report.backends["rms_norm"].startswith("triton x ") and report.backends["linear cross entropy"] == "triton"
    assert relative_error(found, expected) < 1e-5
    for name, true in gradients(stock, expected).items():
        assert relative_error(gradient[name], true) < 1e-4, name


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


def test_unknown_backend_fails_where_it_is_used_not_on_import():
    done = subprocess.run([sys.executable, "-c", "import kernels"], env=os.environ | {"KERNELS_BACKEND": "fast"}, capture_output=True,
                          text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_hidden_states_of_a_patched_model_are_those_of_the_stock_one(family):
    """transformers collects them with hooks on decoder layers, installed at the first call that asks."""
    model, ids = tiny.model(family), torch.arange(24).view(2, 12)
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    patch(ready(model))
    for fresh in (model, pickle.loads(pickle.dumps(patched_in_training(family)))):
        found = fresh.eval()(input_ids=ids, output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == 3
        for mine, true in zip(found, expected):
            assert relative_error(mine, true) < 1e-5


def test_hooks_on_norms_that_an_operation_covers():
    """The norm of a layer and those of queries and keys are covered by larger operations, unless someone watches or replaces them."""
    model, batch = ready(tiny.model("qwen3")), pack()
    patch(model)
    expected, calls = our_logits(model, batch), Counter()
    layer = model.model.layers[1]
    for name, norm in (("stream", layer.post_attention_layernorm), ("q", layer.self_attn.q_norm), ("k", layer.self_attn.k_norm)):
        norm.register_forward_hook(lambda *_, name=name: calls.update([name]))
    assert torch.equal(our_logits(model, batch), expected)
    assert calls == {"stream": 1, "q": 1, "k": 1}
    model.model.layers[0].post_attention_layernorm = torch.nn.Identity()
    assert not torch.equal(our_logits(model, batch), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compiled_layers_equal_eager_ones(family):
    model, batch = ready(tiny.model(family)), pack()
    patch(model)
    expected = gradients(model, our_logits(model, batch))
    model.zero_grad()
    model.model.layers[0].compile(backend="aot_eager")
    found = gradients(model, our_logits(model, batch))
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name


# ---------------------------------------------------------------- activation checkpointing


def patched_in_training(family="llama", **overrides):
    model = ready(tiny.model(family, **overrides)).train()
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


# ---------------------------------------------------------------- loading


def load(**model):
    settings = {k: str(v) for k, v in model.items()}
    return load_model(Config(model=Model(**settings), precision="fp32"), "cpu")


def test_load_gives_the_saved_weights_packed(model_folder):
    model, tokenizer = load(path=model_folder)
    stock = AutoModelForCausalLM.from_pretrained(model_folder)
    batch = pack(vocab_size=len(tokenizer))
    assert is_packed(model) and model.dtype == torch.float32
    assert relative_error(our_logits(model, batch), stock_logits(stock, batch)) < 1e-5
    assert model.config.use_cache == stock.config.use_cache  # what is saved later is the user's


def test_precision_bf16_loads_bf16(model_folder):
    model, _ = load_model(Config(model=Model(path=str(model_folder)), precision="bf16"), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_packs_are_filled_up_for_16_bit_products_on_a_cpu_alone(model_folder):
    models = [load_model(Config(model=Model(path=str(model_folder)), precision=precision), "cpu")[0] for precision in ("fp32", "bf16")]
    assert [padding_for(model) for model in models] == [NO_PADDING, CPU_16BIT_PADDING]
    models[1].set_attn_implementation("sdpa")  # one sample at a time
    assert padding_for(models[1]) == NO_PADDING


def test_random_weights_follow_the_seed_alone(model_folder):
    def weights(seed):
        torch.rand(seed)  # disturb the global generator
        state = torch.get_rng_state()
        model, _ = load_model(Config(model=Model(config=str(model_folder)), precision="fp32", seed=seed), "cpu")
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_config_file_and_tokenizer_from_elsewhere(model_folder, tmp_path):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    model, tokenizer = load(config=tmp_path / "config.json", tokenizer=model_folder)
    assert is_packed(model) and len(tokenizer) == model.config.vocab_size
    with pytest.raises(UserError, match="no tokenizer in"):
        load(config=tmp_path / "config.json")


def test_outline_has_shapes_and_no_memory(model_folder):
    model = meta_model(Config(model=Model(path=str(model_folder))))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in load(path=model_folder)[0].parameters())


def broken(folder, model_folder, change):
    """A copy of a model folder with something wrong in it."""
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    return folder


def without(*patterns):
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def edited(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


def lacking(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, message", [
    (without("config.json"), "expected a model folder with config.json"),
    (without("tokenizer*"), "no tokenizer in"),
    (without("*.safetensors"), "expected model.safetensors"),
    (pickled, "only safetensors are loaded.*convert"),
    (cut_short, "cannot load"),
    (lacking, "lacks 1 weights of LlamaForCausalLM, such as model.layers.1.mlp.up_proj.weight"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    (edited(model_type="no_such_family"), "cannot load .*no_such_family"),
    (edited(vocab_size=100), "do not fit its config.json: expected .100, 64. for lm_head.weight"),
    (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "holds an adapter; set lora.path"),
], ids=["no config", "no tokenizer", "no weights", "pickle", "cut short", "incomplete", "bad json", "unknown type", "vocabulary",
        "adapter"])
def test_unfit_folder_is_one_line(tmp_path, model_folder, change, message):
    folder = broken(tmp_path, model_folder, change)
    with pytest.raises(UserError, match=message) as caught:
        load(path=folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("settings, message", [
    (dict(), "exactly one of them, got neither"),
    (dict(path="a", config="b"), "exactly one of them, got both"),
    (dict(path="./not/there"), "there is no folder ./not/there"),
    (dict(path="nobody/nothing"), "no such folder here"),
    (dict(config="./not/there"), "expected a config.json"),
])
def test_unfit_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        load(**settings)
    assert "\n" not in str(caught.value)


def test_tokenizer_larger_than_the_embedding(model_folder, tmp_path):
    larger = tiny.tokenizer()
    larger.add_tokens(["<one more>"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="rows of the model's embedding"):
        load(path=model_folder, tokenizer=tmp_path)


def test_implementation_name_is_ours(model_folder):
    assert load(path=model_folder)[0].config._attn_implementation == PACKED
