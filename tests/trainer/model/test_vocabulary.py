"""New tokens, and embeddings and heads that train beside an adapter, give stock PEFT's results, merged and resumed too."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import tiny
from tests.helpers.models import our_logits, pack, relative_error, stir, stock_logits
from tests.helpers.runs import arguments, write_chats
from trainer import config as options
from trainer import config_rules
from trainer.cli import parse
from trainer.config import Config, Lora, Model
from trainer.errors import UserError
from trainer.evaluation import config as evaluation
from trainer.evaluation.models import find_models, load_each
from trainer.interpolate import Interpolate, interpolate
from trainer.model.export import merge_and_save, save_adapter
from trainer.model.forward import lm_head
from trainer.model.loading import load_model
from trainer.model.lora import adapted_layers, adapters_disabled, add_adapter, describe
from trainer.model.patch import patch
from trainer.run import train

TOKENS = ["<think>", "</think>"]
KINDS = {"tokens": (TOKENS, []), "embedding": ([], ["embed_tokens"]), "both": ([], ["embed_tokens", "lm_head"]),
         "tokens and head": (TOKENS, ["lm_head"])}


def base_folder(folder, family, spare=0):
    """A base with as many rows as its tokenizer has tokens, and `spare` more."""
    tokenizer = tiny.tokenizer()
    tiny.model(family, vocab_size=len(tokenizer) + spare).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(folder, kind, precision="fp32", method="lora"):
    tokens, modules = KINDS[kind]
    model, tokenizer = load_model(Config(model=Model(path=str(folder), new_tokens=tokens), precision=precision, method=method), "cpu")
    model = add_adapter(model, Lora(rank=4, modules_to_save=modules), tokenizer.convert_tokens_to_ids(tokens))
    patch(model)
    stir(model)
    return model.eval(), tokenizer


def batch_with(tokenizer):
    """A pack in which new tokens are read and predicted."""
    batch = pack(vocab_size=260)
    batch.input_ids[3], batch.input_ids[20] = len(tokenizer) - 1, len(tokenizer) - 2
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_stock_peft_and_transformers_compute_what_was_trained(tmp_path, family, kind, spare):
    """Llama's head has weights of its own, Gemma's is tied to the embedding, which it scales."""
    folder = base_folder(tmp_path / "base", family, spare)
    model, tokenizer = trained(folder, kind)
    batch = batch_with(tokenizer)
    ours = our_logits(model, batch)
    save_adapter(model, tmp_path / "adapter", tokenizer)
    merge_and_save(model, tokenizer, tmp_path / "merged")
    assert torch.equal(our_logits(model, batch), ours)  # the model in memory is as it was

    stock = AutoModelForCausalLM.from_pretrained(folder)
    rows = len(AutoTokenizer.from_pretrained(tmp_path / "adapter"))
    if rows > len(stock.get_input_embeddings().weight):
        stock.resize_token_embeddings(rows)
    stock = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    assert relative_error(stock_logits(stock, batch), ours) < 1e-5
    merged, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and relative_error(stock_logits(merged, batch), ours) < 1e-5
    assert merged.config.vocab_size == len(lm_head(model).weight) and not merged.state_dict().keys() ^ {
        *AutoModelForCausalLM.from_pretrained(folder).state_dict()}

    reloaded, _ = load_model(Config(model=Model(path=str(folder), tokenizer=str(tmp_path / "adapter")), precision="fp32",
                                    lora=Lora(path=str(tmp_path / "adapter"))), "cpu")
    reloaded = add_adapter(reloaded, Lora(path=str(tmp_path / "adapter"))).eval()
    patch(reloaded)
    assert relative_error(our_logits(reloaded, batch), ours) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "both"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_are_those_of_stock_peft(tmp_path, family, kind):
    folder = base_folder(tmp_path / "base", family)
    model, tokenizer = trained(folder, kind)
    batch = batch_with(tokenizer)
    weight = torch.randn(len(batch.input_ids), len(lm_head(model).weight), generator=torch.Generator().manual_seed(3))
    found = []
    for logits in (our_logits, stock_logits):
        model.zero_grad()
        (logits(model, batch) * weight).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert any("embed" in name for name in found[0]) and all(relative_error(found[0][name], found[1][name]) < 1e-4 for name in found[1])


def test_the_base_is_the_model_without_what_trains_beside_the_adapter(tmp_path):
    folder = base_folder(tmp_path / "base", "llama")
    model, tokenizer = trained(folder, "both")
    base, batch = AutoModelForCausalLM.from_pretrained(folder), pack(vocab_size=260)
    with adapters_disabled(adapted_layers(model)):
        assert relative_error(our_logits(model, batch), stock_logits(base, batch)) < 1e-6
    assert relative_error(our_logits(model, batch), stock_logits(base, batch)) > 1e-2
    assert describe(model)["trained beside the adapter"] == "model.embed_tokens whole, lm_head whole"


def test_rows_of_new_tokens_alone_are_trained_and_start_as_the_mean(tmp_path):
    folder = base_folder(tmp_path / "base", "llama", spare=1)
    model, tokenizer = load_model(Config(model=Model(path=str(folder), new_tokens=TOKENS), precision="fp32"), "cpu")
    base = AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight
    assert len(model.model.embed_tokens.weight) == len(base) + 1
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    expected = base[: ids[0]].mean(0)
    torch.testing.assert_close(model.model.embed_tokens.weight[ids], torch.stack([expected, expected]))
    model = add_adapter(model, Lora(rank=4), ids)
    rows = {name: p.shape for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {shape for shape in rows.values()} == {(2, 64)} and len(rows) == 2
    save_adapter(model, tmp_path / "adapter", tokenizer)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sorted(name for name in saved if ".lora_" not in name) == [
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]


# ---------------------------------------------------------------- whole runs

RUN = ("--max_steps", "4", "--export.check", "true", "--export.format", "both")


@pytest.fixture
def thoughts(tmp_path):
    return write_chats(tmp_path / "thoughts.jsonl", [(f"What is {a} + 1?", f"<think>{a} + 1</think>{a + 1}") for a in range(40)])


def run(*args):
    return train(parse(Config, arguments(*args), "trainer.run"))


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    (), ("--method", "qlora", "--precision", "bf16"), ("--lora.modules_to_save", "[embed_tokens,lm_head]"), ("--method", "full"),
    ("--retention.kl_weight", "0.5", "--retention.kl_sources", "all")], ids=lambda more: " ".join(more))
def test_a_run_exports_resumes_and_evaluates_new_tokens(tmp_path, thoughts, capsys, more):
    folder = base_folder(tmp_path / "base", "llama")
    (tmp_path / "tokens.txt").write_text("\n".join(TOKENS) + "\n")
    options = (*RUN, "--model.new_tokens", str(tmp_path / "tokens.txt"), *more)
    run(folder, thoughts, tmp_path / "dry", *options, "--dry_run")
    run(folder, thoughts, tmp_path / "run", *options)
    assert capsys.readouterr().out.count("checked: ") == (1 if "full" in more else 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert [len(tokenizer.encode(token)) for token in TOKENS] == [1, 1]
    run(folder, thoughts, tmp_path / "cut", *options, "--checkpoint.every", "2")
    for name in ("checkpoints/step-00000004", "adapter", "model"):
        if (tmp_path / "cut" / name).exists():
            (tmp_path / "cut" / name).rename(tmp_path / name.replace("/", "-"))
    run(folder, thoughts, tmp_path / "cut", *options, "--checkpoint.every", "2", "--resume", "auto")
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("model, lora, expected", [
    (dict(new_tokens=["a", "a"]), {}, "model.new_tokens: expected different tokens"),
    (dict(new_tokens=["<s>"]), {}, "model.new_tokens: expected tokens that the tokenizer lacks, it has '<s>'"),
    (dict(new_tokens="absent.txt"), {}, "model.new_tokens: expected a list of tokens, or a file"),
    ({}, dict(modules_to_save=["norm"]), "lora.modules_to_save: expected embed_tokens or lm_head"),
])
def test_what_cannot_be_is_one_line(tmp_path, model, lora, expected):
    folder = base_folder(tmp_path / "base", "llama")
    with pytest.raises(UserError, match=expected):
        made, _ = load_model(Config(model=Model(path=str(folder), **model)), "cpu")
        add_adapter(made, Lora(**lora))


@pytest.mark.parametrize("settings, expected", [
    (dict(method="full", lora=Lora(modules_to_save=["lm_head"])), "lora.modules_to_save: expected method lora or qlora"),
    (dict(model=Model(path="m", new_tokens=["x"]), lora=Lora(path="a")), "model.new_tokens: expected no lora.path"),
])
def test_options_that_exclude_each_other_are_refused(settings, expected):
    with pytest.raises(UserError, match=expected):
        config_rules.validate(Config(**({"model": Model(path="m"), "data": options.Data(train="x")} | settings)))


def test_a_model_with_other_rows_for_each_token_takes_no_new_ones(tmp_path):
    tiny.model("gemma4_text").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    assert settings["hidden_size_per_layer_input"]
    with pytest.raises(UserError, match="model.new_tokens: .* also holds rows for each token in .*per_layer"):
        load_model(Config(model=Model(path=str(tmp_path / "base"), new_tokens=TOKENS)), "cpu")


@pytest.mark.parametrize("family, settings, expected", [
    ("gemma3_text", dict(modules_to_save=["embed_tokens", "lm_head"]), "apart, which the base ties"), ("gemma3_text", dict(
        modules_to_save=["lm_head"]), "apart, which the base ties"), ("llama", dict(modules_to_save=["norm"]), "trains model.*norm whole")])
def test_saved_adapters_that_train_what_cannot_be_run_are_refused(tmp_path, family, settings, expected):
    made = get_peft_model(tiny.model(family), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **settings))
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"lora.path: the adapter .* does not fit this model: .*{expected}"):
        add_adapter(tiny.model(family), Lora(path=str(tmp_path)))


@pytest.mark.slow
def test_an_adapter_with_new_tokens_is_evaluated_with_its_tokenizer(tmp_path):
    folder = base_folder(tmp_path / "base", "llama")
    model, tokenizer = trained(folder, "tokens")
    save_adapter(model, tmp_path / "adapter", tokenizer)
    config = evaluation.Config(adapter=str(tmp_path / "adapter"))
    (base, _), (tuned, _) = [(lm_head(loaded.model).weight.clone(), loaded.template) for loaded in load_each(
        find_models(config), config, torch.device("cpu"))]
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    assert torch.equal(tuned[ids], lm_head(model).weight[ids]) and torch.equal(tuned[: ids[0]], base[: ids[0]])
    assert not torch.equal(base[ids], tuned[ids])
    with pytest.raises(UserError, match="adapter: .* trains rows of the embedding or head, which cannot be scaled"):
        interpolate(Interpolate(str(tmp_path / "out"), Model(path=str(folder)), adapter=str(tmp_path / "adapter")))
