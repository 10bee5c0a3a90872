"""QLoRA with the real bitsandbytes, on a CPU: against PEFT, transformers and bitsandbytes as they come."""

import copy
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import benchmarks
from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.world import training_records, write_jsonl
from kernels.nf4 import Nf4, dequantize_nf4
from tests.helpers import mixtures, tiny
from tests.helpers.models import gradients, our_logits, pack, relative_error, stock_logits
from tests.helpers.runs import Readbacks, arguments, records, samples, write_chats
from trainer import run
from trainer.cli import parse
from trainer.config import Config, Lora, Model, Optim, Quantization
from trainer.data.batch import collate
from trainer.errors import UserError
from trainer.metrics.throughput import model_size
from trainer.model import quantization
from trainer.model.bitsandbytes_cpu_check import refuse_misread_layers
from trainer.model.export import merge_and_save, save_adapter
from trainer.model.forward import forward_hidden
from trainer.model.loading import load_model, meta_model
from trainer.model.lora import add_adapter, is_adapted, projection, unfused_layers, why_not_fused
from trainer.model.mixtures import find_mixtures
from trainer.model.patch import patch
from trainer.model.quantization import is_quantized, nf4_of, quantized_layers
from trainer.optim.adamw import FlatAdamW
from trainer.training.memory_estimate import estimate

bitsandbytes = pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
WHOLE = dict(intermediate_size=128)  # every row of every layer is whole blocks
ADAPTERS = {"lora": {}, "rslora": dict(rslora=True), "dora": dict(dora=True), "some": dict(target_modules=["q_proj", "down_proj"])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Dense models by family, saved."""
    made = {}

    def folder(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny.model(family, **WHOLE).save_pretrained(made[family])
            tiny.tokenizer().save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def sound_bitsandbytes():
    """bitsandbytes' generic dequantisation for its CPU kernel, which (0.50.2, with AVX-512) misreads rows that end inside a block."""
    from bitsandbytes.backends.default import ops

    def generic(A, absmax, blocksize, quant_type, shape, dtype):
        code = ops._get_4bit_code(quant_type, A.device)
        return ops._dequantize_4bit_compute.__wrapped__(A.view(torch.uint8).reshape(-1), absmax, code, blocksize, shape, dtype)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings(action="ignore"):
        library.impl("dequantize_4bit", generic, "CPU", allow_override=True)
    yield
    library._destroy()


def settings(folder, precision="fp32", **more) -> Config:
    return Config(model=Model(path=str(folder)), method="qlora", precision=precision, **more)


def stock_base(folder, dtype=torch.float32):
    """The 4-bit model as transformers makes it, in training mode: in eval mode bitsandbytes may compute in bf16 on a CPU."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).train()


def adapted(folder, precision="fp32", stock=False, **adapter):
    """A 4-bit model, loaded by us or by transformers, with an adapter that is not where it began."""
    model, tokenizer = load_model(settings(folder, precision), "cpu")
    model = stock_base(folder, model.dtype) if stock else model
    torch.manual_seed(0)
    model = add_adapter(model, Lora(rank=4, alpha=8, **adapter))
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model, tokenizer


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_linear_layer_but_the_head_is_quantised_as_bitsandbytes_does(folders, precision, double_quant):
    cfg = settings(folders("llama"), precision, quantization=Quantization(double_quant=double_quant))
    model, _ = load_model(cfg, "cpu")
    dense, _ = load_model(Config(model=cfg.model, precision=precision), "cpu")
    assert len(quantized_layers(model)) == 14 and type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    for name, module in model.named_modules():
        if is_quantized(module):
            weight = dense.get_submodule(name).weight
            codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
            found = nf4_of(module)
            assert torch.equal(found.codes, codes) and found.shape == weight.shape and found.dtype == dense.dtype
            assert torch.equal(dequantize_nf4(found), bitsandbytes.functional.dequantize_4bit(codes, state)), name
            assert found.codes.data_ptr() == module.weight.data_ptr() and (found.nested_code is None) != double_quant


def test_layers_to_skip_stay_dense(folders):
    skip = Quantization(skip_modules=["down_proj", "layers.1.self_attn.q_proj"])
    model, _ = load_model(settings(folders("llama"), quantization=skip), "cpu")
    assert len(quantized_layers(model)) == 14 - 2 - 1
    assert type(model.model.layers[0].mlp.down_proj) is type(model.model.layers[1].self_attn.q_proj) is nn.Linear
    assert is_quantized(model.model.layers[0].self_attn.q_proj)


def test_a_checkpoint_in_4_bits_loads_as_it_is(folders, tmp_path):
    stock = stock_base(folders("llama"), torch.bfloat16)
    stock.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders("llama")).save_pretrained(tmp_path)
    model, _ = load_model(settings(tmp_path), "cpu")
    for ours, theirs in zip(quantized_layers(model), quantized_layers(stock), strict=True):
        assert torch.equal(ours.weight, theirs.weight) and nf4_of(ours).dtype == torch.float32
    assert meta_model(settings(tmp_path)).num_parameters() == meta_model(settings(folders("llama"))).num_parameters()


def test_evaluating_does_not_repack_the_weights(folders):
    """bitsandbytes would, on CPUs with bf16 products, and the layer would have no gradient from then on."""
    model, _ = load_model(settings(folders("llama"), "bf16"), "cpu")
    layer = model.eval().model.layers[0].self_attn.q_proj
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer(torch.randn(3, 64, dtype=torch.bfloat16))
    assert torch.equal(layer.weight.data, before) and not quantization.why_not_nf4(layer)


# ---------------------------------------------------------------- fused layers


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_fused_4_bit_layers_equal_pefts(folders, family, adapter):
    batch = pack(vocab_size=260)
    stock, _ = adapted(folders(family), stock=True, **ADAPTERS[adapter])
    ours, _ = adapted(folders(family), **ADAPTERS[adapter])
    layers = [module for module in ours.modules() if is_adapted(module)]
    report = patch(ours)
    assert report.backends["adapter"].endswith(f"x {len(layers)}") and "PEFT" not in report.backends["adapter"]
    assert all(type(projection(module).weight) is Nf4 for module in layers)
    expected, found = stock_logits(stock, batch), our_logits(ours, batch)
    assert relative_error(found, expected) < 1e-5
    expected, found = gradients(stock, expected), gradients(ours, found)
    assert found.keys() == expected.keys() and all("lora_" in name for name in found)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-4, name


def test_fused_gate_and_up_in_4_bits(folders):
    """Phi-3's projections are one layer each."""
    batch = pack(vocab_size=260)
    stock, ours = adapted(folders("phi3"), stock=True)[0], adapted(folders("phi3"))[0]
    assert "PEFT" not in patch(ours).backends["adapter"]
    assert relative_error(our_logits(ours, batch), stock_logits(stock, batch)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{}, dict(dora=True)], ids=["lora", "dora"])
def test_bf16_is_as_exact_as_pefts_bf16(folders, adapter):
    batch = pack(vocab_size=260)
    exact_model, stock, ours = (adapted(folders("llama"), precision, stock, **adapter)[0]
                                for precision, stock in (("fp32", True), ("bf16", True), ("bf16", False)))
    for module, other in zip(quantized_layers(exact_model), quantized_layers(stock), strict=True):
        module.weight = copy.deepcopy(other.weight)  # bf16 rounds the weights before it quantises them
    for p, q in zip(exact_model.parameters(), stock.parameters(), strict=True):
        if p.dtype != torch.uint8:
            p.data = q.data.float()
    exact = stock_logits(exact_model, batch)
    patch(ours)
    assert relative_error(our_logits(ours, batch), exact) <= 2 * relative_error(stock_logits(stock, batch), exact)


@pytest.mark.slow
def test_a_fused_4_bit_layer_compiles_in_one_graph(folders):
    torch._dynamo.reset()
    model = adapted(folders("llama"))[0]
    patch(model)
    layer, x = model.get_base_model().model.layers[0].self_attn.o_proj, torch.randn(7, 64, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    eager, compiled = layer(x), torch.compile(layer.forward, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), trained) for y in (compiled, eager)))


def test_what_cannot_be_fused_says_why(folders):
    model, _ = adapted(folders("llama"))
    module = model.get_base_model().model.layers[0].mlp.up_proj
    state = module.base_layer.weight.quant_state
    assert why_not_fused(module) is why_not_fused(module.base_layer) is None
    for name, value, reason in (("quant_type", "fp4", "a 4-bit layer is fp4"), ("packing_format_for_cpu", True, "packed for inference")):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(state, name, value, raising=False)
            assert reason in why_not_fused(module) and reason in why_not_fused(module.base_layer)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(state.state2, "blocksize", 64)
        assert why_not_fused(module) == "a 4-bit layer has groups of 64 blocks"
    with model.disable_adapter():
        assert why_not_fused(module) == "the adapter is disabled"


def test_layers_that_bitsandbytes_would_misread_are_refused(folders, monkeypatch):
    model, _ = adapted(folders("llama"))
    patch(model)
    refuse_misread_layers(unfused_layers(model, patched=False))  # whole blocks are read right
    true = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *args: true(*args) * 2)
    refuse_misread_layers(unfused_layers(model, patched=True))  # ours alone read these
    for doomed in (unfused_layers(model, patched=False), unfused_layers(adapted(folders("llama"), dora=True)[0], patched=True)):
        with pytest.raises(UserError, match="bitsandbytes misreads layers of width 64"):
            refuse_misread_layers(doomed)


# ---------------------------------------------------------------- mixtures of experts


@pytest.fixture(scope="module")
def mixture_folder(tmp_path_factory):
    """Return the folder of a mixture whose layers are whole blocks, with experts, a router and a dense layer."""
    made = {}

    def folder(family: str, **overrides):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            mixtures.model(family, **WHOLE, **overrides).save_pretrained(made[family])
            tiny.tokenizer().save_pretrained(made[family])
        return made[family]

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "jamba", "glm4_moe"])
def test_a_mixture_in_4_bits_says_what_stays_dense_and_exports(mixture_folder, tmp_path, family, experts):
    folder = mixture_folder(family)
    model, tokenizer = adapted(folder, experts=experts)
    patch(model)
    base, batch = model.get_base_model(), pack(vocab_size=260)
    found = find_mixtures(base)
    assert not any(is_quantized(layer) for layer in found.routers.values())
    assert all(weight.dtype == torch.float32 for weight in found.weights.values())
    share = sum(w.numel() for w in found.weights.values()) / sum(p.numel() for p in mixtures.sketch(family, **WHOLE).parameters())
    line = quantization.describe(model)["4-bit base"]
    assert line.endswith(f"; experts stay dense, {share:.0%} of the weights, as bitsandbytes quantises linear layers only")

    before = our_logits(model, batch)
    merge_and_save(model, tokenizer, tmp_path / "merged")
    stock, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert relative_error(stock_logits(stock, batch), before) < 1e-5
    save_adapter(model, tmp_path / "adapter", tokenizer)
    again = add_adapter(load_model(settings(folder), "cpu")[0], Lora(path=str(tmp_path / "adapter")))
    patch(again)
    assert torch.equal(our_logits(again, batch), before)


def test_layers_whose_weight_other_code_reads_stay_dense(mixture_folder):
    model, _ = load_model(settings(mixture_folder("mamba2")), "cpu")
    assert {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if is_quantized(layer)} == {"in_proj"}


def test_memory_knows_that_experts_and_routers_stay_dense(mixture_folder):
    cfg = settings(mixture_folder("jamba"))
    model = add_adapter(load_model(cfg, "cpu")[0], cfg.lora)
    with torch.device("meta"):
        sketch = add_adapter(meta_model(cfg), cfg.lora)
    names = {name.removesuffix(".base_layer") for name, layer in model.get_base_model().named_modules() if is_quantized(layer)}
    planned = quantization.layers_to_quantize(sketch.get_base_model(), [])
    assert len(names) == len(planned)


# ---------------------------------------------------------------- what is left for others


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_stock_peft_loads_the_adapter_on_a_4_bit_base(folders, tmp_path, adapter):
    model, tokenizer = adapted(folders("llama"), **ADAPTERS[adapter])
    patch(model)
    save_adapter(model, tmp_path / "adapter", tokenizer)
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    stock, batch = PeftModel.from_pretrained(stock_base(base), tmp_path / "adapter").train(), pack(vocab_size=260)
    assert relative_error(stock_logits(stock, batch), our_logits(model, batch)) < 1e-5
    assert relative_error(stock_logits(stock.get_base_model(), batch), stock_logits(stock, batch)) == 0


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merging_onto_the_dequantised_weights_makes_a_dense_stock_model(folders, tmp_path, adapter, precision):
    model, tokenizer = adapted(folders("llama"), precision, **ADAPTERS[adapter])
    patch(model)
    batch, parts = pack(vocab_size=260), [p.data.clone() for p in model.parameters()]
    before = our_logits(model, batch)
    merge_and_save(model, tokenizer, tmp_path / "merged")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parts)), "the model in memory is as it was"
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "merged", folders("llama")))
    assert ours == theirs | {"dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision]}
    stock, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and stock.dtype == before.dtype or precision == "bf16"
    assert relative_error(stock_logits(stock, batch), before) < (1e-5 if precision == "fp32" else 2e-2)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    if not is_adapted(layer):  # a layer without an adapter is its dequantised self
        assert torch.equal(stock.model.layers[0].self_attn.v_proj.weight, dequantize_nf4(nf4_of(layer)))


def test_an_adapter_that_is_not_finite_or_not_ours_is_not_merged(folders, tmp_path):
    model, tokenizer = adapted(folders("llama"))
    module = model.get_base_model().model.layers[0].mlp.up_proj
    module.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="cannot merge the adapter: its weights are not finite"):
        merge_and_save(model, tokenizer, tmp_path / "merged")
    with model.disable_adapter(), pytest.raises(UserError, match="cannot merge the adapter: the adapter is disabled"):
        merge_and_save(model, tokenizer, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("double_quant", [True, False])
def test_memory_and_work_know_of_4_bits(folders, double_quant):
    cfg = settings(folders("llama"), quantization=Quantization(double_quant=double_quant, skip_modules=["o_proj"]), lora=Lora(rank=32))
    model = add_adapter(load_model(cfg, "cpu")[0], cfg.lora)
    dense = add_adapter(load_model(Config(model=cfg.model), "cpu")[0], cfg.lora)
    assert model_size(model) == model_size(dense)
    largest = max(layer.in_features * layer.out_features for layer in quantized_layers(model))
    packed = sum(nf4_of(layer).nbytes for layer in quantized_layers(model))
    tables = len(quantized_layers(model)) * (256 + 1) * 4 * double_quant  # of a size that is nothing beside a real layer
    others = sum(p.numel() * 4 for p in model.parameters() if p.dtype == torch.float32)
    with torch.device("meta"):
        sketch = add_adapter(meta_model(cfg), cfg.lora)
    estimated = estimate(sketch, cfg, torch.float32, CPU)
    assert estimated.weights == pytest.approx(packed - tables + others + largest * 4, rel=1e-3)
    cfg.optim.name = "adamw_8bit"
    eight = estimate(sketch, cfg, torch.float32, CPU)
    optimizer = FlatAdamW(model.parameters(), Optim(name="adamw_8bit", lr=1e-3))
    optimizer.step(1e-3)
    held = sum(t.nbytes for name, t in optimizer.state().items() if "exp_avg" in name)
    assert eight.moments == pytest.approx(held, rel=0.1) and eight.moments < estimated.moments


# ---------------------------------------------------------------- whole runs


def test_layers_and_optimizer_read_nothing_back(folders):
    model = adapted(folders("llama"))[0]
    patch(model)
    optimizer, batch = FlatAdamW(model.parameters(), Optim(name="adamw_8bit")), collate(samples())
    optimizer.zero_grad()
    with Readbacks() as readbacks:
        forward_hidden(model, batch).square().sum().backward()
        optimizer.step(1e-3)
    assert readbacks.found == []


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("data") / "sums.jsonl")


def train(*args):
    return run.train(parse(Config, arguments(*args), "trainer.run"))


QLORA = ("--method", "qlora", "--optim.name", "adamw_8bit", "--lora.rank", "32", "--lora.dropout", "0.1")


@pytest.mark.slow
def test_a_qlora_run_resumes_bit_for_bit(folders, chats, tmp_path, monkeypatch):
    options = (*QLORA, "--max_steps", "6", "--checkpoint.every", "2", "--data.eval_fraction", "0.1", "--eval.every", "3")
    whole = train(folders("llama"), chats, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "adapter")  # as if killed between the checkpoints
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    with monkeypatch.context() as patched, pytest.raises(UserError, match="quantizer was bitsandbytes .*, is bitsandbytes 9.9"):
        patched.setattr(bitsandbytes, "__version__", "9.9")
        train(folders("llama"), chats, tmp_path / "cut", *options, "--resume", "auto")
    result = train(folders("llama"), chats, tmp_path / "cut", *options, "--resume", "auto")
    assert (result.steps, result.loss, result.eval_loss) == (whole.steps, whole.loss, whole.eval_loss)
    one, two = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("extra", [("--activation_checkpointing", "full"), ("--precision", "bf16")])
def test_qlora_goes_with_other_options(folders, chats, tmp_path, extra):
    for name, more in (("plain", ()), ("other", extra)):
        train(folders("llama"), chats, tmp_path / name, "--method", "qlora", "--max_steps", "4", "--logging.every", "1", *more)
    one, two = ([r["loss"] for r in records(tmp_path / name, "step")] for name in ("plain", "other"))
    assert one == pytest.approx(two, rel=0.03 if "bf16" in extra else 1e-6)


@pytest.mark.slow
def test_a_qlora_run_of_the_miniature_base(tmp_path, sound_bitsandbytes, capsys):
    """It learns its domain; stock PEFT loads its adapter on a 4-bit base, and its merged weights are a stock model."""
    base = Path(benchmarks.__file__).parent / "forgetting" / "miniature" / "models" / "base"
    domain, heldout = (write_jsonl(training_records(DOMAIN, count, seed=seed), tmp_path / name)
                       for count, seed, name in ((200, 0, "domain.jsonl"), (40, 1, "heldout.jsonl")))
    result = run.train(parse(Config, [
        "--model.path", str(base), "--method", "qlora", "--optim.name", "adamw_8bit", "--data.train", str(domain), "--data.eval",
        str(heldout), "--output", str(tmp_path / "run"), "--data.max_length", "256", "--batch.tokens_per_pack", "256",
        "--batch.tokens_per_step", "512", "--optim.lr", "5e-3", "--epochs", "4", "--export.format", "both",
        "--logging.tensorboard", "false", "--device", "cpu", "--data.num_proc", "1"], "trainer.run"))
    first, *_, last = (r["loss"] for r in records(result.folder, "eval"))
    shown = capsys.readouterr().out
    assert last < 0.7 * first, (first, last)
    four_bit = stock_base(base)
    count = len(quantized_layers(four_bit))
    assert f"4-bit base: {count} layers in NF4, " in shown and "adapter is merged into the dequantised 4-bit weights" in shown
    assert f" x {count}\n" in shown and "PEFT" not in shown

    tokenizer = AutoTokenizer.from_pretrained(result.folder / "adapter")
    ids = tokenizer(heldout.read_text()[:400], return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=torch.float32)
    dense = sum(layer.in_features * layer.out_features * 2 for layer in quantized_layers(four_bit))
    packed = sum(nf4_of(layer).nbytes for layer in quantized_layers(four_bit))
    with torch.no_grad():
        untrained = four_bit(ids).logits
        trained = PeftModel.from_pretrained(four_bit, result.folder / "adapter").train()(ids).logits
        assert relative_error(merged(ids).logits, trained) < 1e-4 < 0.1 < relative_error(untrained, trained)
    print(f"held-out loss {first:.3f} -> {last:.3f}; its linear layers: {packed} bytes in 4 bits, {dense} in bf16")


def test_a_dry_run_estimates_4_bits(folders, chats, tmp_path, capsys):
    train(folders("llama"), chats, tmp_path / "run", "--dry_run", "--method", "qlora")
    assert "(qlora)" in capsys.readouterr().out


# ---------------------------------------------------------------- mistakes


def complaint(monkeypatch, capsys, *args) -> str:
    """The one line that the command leaves on standard error."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["trainer.run", *args])
    assert run.main() in (1, 2)
    shown = capsys.readouterr().err
    assert shown.startswith("trainer.run: error: ") and shown.count("\n") == 1, shown
    return shown


def quantized_as(folder, target, **config):
    shutil.copytree(folder, target)
    saved = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(saved | {"quantization_config": config}))
    return target


NF4 = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize(("config", "method", "expected"), [
    (NF4, "lora", "expected dense weights for method lora, found nf4 quantisation in .*; use --method qlora"),
    (NF4, "full", "expected dense weights for method full, found nf4"),
    (NF4 | dict(bnb_4bit_quant_type="fp4"), "qlora", "expected dense weights, or bitsandbytes' NF4, in .*, found fp4 quantisation"),
    (dict(quant_method="bitsandbytes", load_in_8bit=True), "qlora", "found 8-bit quantisation"),
    (dict(quant_method="bitsandbytes", load_in_8bit=True), "lora", "found 8-bit quantisation in .*; use the model that it was made from"),
    (dict(quant_method="gptq", bits=4), "qlora", "found gptq quantisation; use the model that it was made from"),
])
@pytest.mark.parametrize("dry", [(), ("--dry_run",)], ids=["run", "dry"])
def test_checkpoints_that_are_quantised_in_another_way(folders, chats, tmp_path, monkeypatch, capsys, config, method, expected, dry):
    folder = quantized_as(folders("llama"), tmp_path / "model", **config)
    line = complaint(monkeypatch, capsys, *arguments(folder, chats, tmp_path / "run", "--method", method, *dry))
    assert re.search("model.path: .*" + expected, line), line


@pytest.mark.parametrize(("options", "expected"), [
    (("--method", "qlora", "--quantization.skip_modules", "[zork]"),
     "quantization.skip_modules: no linear layer is called zork; the model has: "),
    (("--method", "qlora", "--quantization.double_quant", "half"), "quantization.double_quant: "),
    (("--method", "qlora", "--quantisation.skip_modules", "[]"), "did you mean quantization.skip_modules?"),
    (("--method", "q-lora"), "method: expected one of 'lora', 'qlora', 'full', got q-lora"),
    (("--optim.name", "adam8"), "optim.name: expected one of 'adamw', 'adamw_8bit', 'adafactor', 'muon', got adam8"),
    (("--method", "qlora", "--model.path", "null", "--model.config", "x"), "method: expected full beside model.config"),
])
def test_options_that_are_wrong(folders, chats, tmp_path, monkeypatch, capsys, options, expected):
    assert expected in complaint(monkeypatch, capsys, *arguments(folders("llama"), chats, tmp_path / "run", *options))


@pytest.mark.parametrize(("option", "value"), [("method", "qlora"), ("optim.name", "adamw_8bit")])
@pytest.mark.parametrize("dry", [(), ("--dry_run",)], ids=["run", "dry"])
def test_bitsandbytes_that_is_not_there(folders, chats, tmp_path, monkeypatch, capsys, option, value, dry):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = complaint(monkeypatch, capsys, *arguments(folders("llama"), chats, tmp_path / "run", f"--{option}", value, *dry))
    assert f"{option} {value}: expected bitsandbytes" in line and "pip install 'bitsandbytes>=0.50'" in line
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_the_config(folders, tmp_path):
    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"intermediate_size": 192}))
    with pytest.raises(UserError, match=r"do not fit .* config.json: expected \(192, 64\) for .*gate_proj.weight, found \(128, 64\)"):
        load_model(settings(folder), "cpu")
    (folder / "config.json").write_text(json.dumps(saved | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="lacks 9 weights of LlamaForCausalLM"):
        load_model(settings(folder), "cpu")


def test_a_head_in_4_bits(folders):
    model, _ = load_model(settings(folders("llama")), "cpu")
    model.set_output_embeddings(model.model.layers[0].mlp.up_proj)
    with pytest.raises(UserError, match="expected a dense head, found one in 4 bits"):
        quantization.prepare_quantized(model, torch.float32)


def test_no_layer_is_packed_on_a_cpu_with_bf16_products(monkeypatch):
    """Packing rounds the scales for good, and narrow layers fail in it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    assert bitsandbytes.nn.Linear4bit(64, 40).support_avx512bf16_for_cpu
    quantization.import_bitsandbytes("method qlora")
    assert not bitsandbytes.nn.Linear4bit(64, 40).support_avx512bf16_for_cpu
