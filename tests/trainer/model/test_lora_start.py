"""Ways in which an adapter starts, ranks and alphas by layer, and the MLP's layers alone: against PEFT, and as others load them."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.utils.loftq_utils import _low_rank_decomposition
from transformers import AutoModelForCausalLM

from kernels.nf4 import dequantize_nf4
from tests.helpers import tiny
from tests.helpers.models import our_logits, pack, relative_error, stir, stock_logits, with_packed_attention
from tests.helpers.runs import arguments
from trainer.cli import parse
from trainer.config import Config, Data, Eval, Lora, Model, Optim, Retention
from trainer.config_rules import validate
from trainer.errors import UserError
from trainer.model.export import save_adapter
from trainer.model.loading import load_model
from trainer.model.lora import adapted_weights, add_adapter
from trainer.model.patch import patch
from trainer.model.quantization import nf4_of
from trainer.run import train
from trainer.training import lora_start

IDS = torch.arange(5, 25)[None]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_4"])
def test_a_start_from_the_weights_is_pefts_and_its_export_fits_the_untouched_base(model_folder, tmp_path, init):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    ours = add_adapter(copy.deepcopy(base), Lora(rank=4, alpha=8, init=init))
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, target_modules=names))
    torch.testing.assert_close(logits(ours), logits(base), rtol=1e-3, atol=1e-4)
    found = dict(theirs.named_parameters())
    for name, tensor in ours.named_parameters():
        torch.testing.assert_close(tensor, found[name])
    stir(ours)
    trained = logits(ours)
    save_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), trained)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
    assert loaded.peft_config["default"].r == 8 and loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--lora.init", "pissa", "--export.format", "both"),
                                     ("--lora.init", "eva", "--lora.target_modules", "[v_proj]"),
                                     ("--lora.init", "loftq", "--method", "qlora", "--export.format", "both")],
                         ids=["pissa", "eva", "loftq"])
def test_a_run_starts_so_and_passes_the_check_of_its_export(model_folder, chats, tmp_path, capsys, options):
    if "qlora" in options:
        pytest.importorskip("bitsandbytes")
        model_folder = tiny.save_model(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=128)
    small = arguments(model_folder, chats, tmp_path / "run", "--max_steps", "2", *options, "--export.check", "true")
    train(parse(Config, small, "trainer.run"))
    out = capsys.readouterr().out
    assert out.count("checked: ") == 1 + ("both" in options) and ("lora.init: eva, from " in out) == ("eva" in options)


def test_ranks_and_alphas_by_layer_are_pefts():
    settings = dict(rank_pattern={"q_proj": 2, r"layers\.1\..*down_proj": 8}, alpha_pattern={"v_proj": 3.0})
    batch, models = pack(), []
    for _ in range(2):
        model = add_adapter(tiny.model("llama", dtype=torch.float64), Lora(rank=4, alpha=8, **settings))
        stir(model)
        models.append(model)
    stock, ours = models
    with_packed_attention(ours.get_base_model())
    patch(ours)
    ranks = {name.split("layers.")[1].partition(".lora_A")[0]: p.shape[0] for name, p in ours.named_parameters() if "lora_A" in name}
    assert (ranks["0.self_attn.q_proj"], ranks["0.mlp.down_proj"], ranks["1.mlp.down_proj"], ranks["1.mlp.up_proj"]) == (2, 4, 8, 4)
    assert relative_error(our_logits(ours, batch), stock_logits(stock, batch)) < 1e-6


@pytest.mark.parametrize("family, inside, outside", [("llama", "mlp.down_proj", "self_attn.q_proj"), ("gpt2", "mlp.c_fc", "attn.c_attn"),
                                                     ("opt", "fc1", "self_attn.q_proj")])
def test_mlp_linear_leaves_attention_alone(family, inside, outside):
    names = {name.partition(".lora_A")[0] for name, _ in add_adapter(tiny.model(family), Lora(rank=2, target_modules="mlp-linear"))
             .named_parameters() if "lora_A" in name}
    assert any(name.endswith(inside) for name in names) and not any(name.endswith(outside) for name in names)


def test_eva_is_pefts(model_folder):
    rng = np.random.default_rng(0)
    samples = [(rng.integers(5, 300, 20).astype(np.int32), np.ones(20, bool)) for _ in range(8)]
    ours = add_adapter(AutoModelForCausalLM.from_pretrained(model_folder), Lora(rank=4, alpha=8, target_modules=["v_proj"]))
    theirs = copy.deepcopy(ours)
    lora_start.from_inputs(ours, samples, torch.device("cpu"))
    order = np.random.default_rng(0).permutation(8)
    batches = [{"input_ids": torch.stack([torch.as_tensor(samples[i][0].astype(np.int64)) for i in order[n:n + 4]]),
                "attention_mask": torch.ones(4, 20, dtype=torch.long)} for n in (0, 4)]
    config = theirs.peft_config["default"]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    found = dict(theirs.named_parameters())
    for name, tensor in ours.named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(tensor.detach().abs(), found[name].detach().abs(), rtol=1e-3, atol=1e-3)
    assert ours.peft_config["default"].init_lora_weights is True


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_is_the_best_start_for_what_four_bits_lose(tmp_path, family):
    pytest.importorskip("bitsandbytes")
    folder = tiny.save_model(tmp_path / "model", family)
    config = Config(model=Model(path=str(folder)), method="qlora", lora=Lora(rank=4, alpha=12, init="loftq"), device="cpu")
    base, _ = load_model(config, "cpu")
    model = add_adapter(base, config.lora)
    assert "% of the error of 4-bit weights" in lora_start.from_quantization_error(model, config)
    dense = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, layer in adapted_weights(model.get_base_model()).items():
        held = dequantize_nf4(nf4_of(layer.get_base_layer()), torch.float32)
        weight = dense[name] if family == "llama" else dense[name].t()
        theirs = _low_rank_decomposition(weight - held, reduced_rank=4)
        ours = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(ours, theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-6)
        assert (weight - held - ours).norm() < (weight - held).norm()


@pytest.mark.parametrize("options, named", [
    (dict(lora=Lora(init="pissa"), method="qlora"), "lora.init"), (dict(lora=Lora(init="olora", dora=True)), "lora.init"),
    (dict(lora=Lora(init="pissa"), retention=Retention(kl_weight=0.1, kl_sources="domain")), "lora.init"),
    (dict(lora=Lora(init="pissa"), eval=Eval(show=1)), "lora.init"), (dict(lora=Lora(init="eva"), method="full"), "lora.init"),
    (dict(lora=Lora(init="loftq")), "lora.init"), (dict(lora=Lora(rank_pattern={"q_proj": 0})), "lora.rank_pattern"),
    (dict(lora=Lora(alpha_pattern={"q_proj": 0.0})), "lora.alpha_pattern"),
    (dict(lora=Lora(rank_pattern={"q_proj": 4}, path="x")), "lora.rank_pattern"),
    (dict(optim=Optim(loraplus_lr_ratio=4.0), method="full"), "optim.loraplus_lr_ratio"), (dict(optim=Optim(name="muon")), "optim.name"),
    (dict(optim=Optim(num_cycles=2)), "optim.num_cycles"), (dict(optim=Optim(ema_decay=1.0)), "optim.ema_decay"),
    (dict(optim=Optim(neftune_noise_alpha=-1.0)), "optim.neftune_noise_alpha")])
def test_options_that_do_not_compose_are_one_line(options, named):
    with pytest.raises(UserError, match=f"^{named}: expected [^\n]+$"):
        validate(Config(model=Model(path="m"), data=Data(train="d"), **options))


@pytest.mark.parametrize("settings, message", [(dict(rank_pattern={"nothing": 2}), "lora.rank_pattern: no layer"),
                                               (dict(alpha_pattern={"lm_head": 2.0}), "lora.alpha_pattern: no layer"),
                                               (dict(rank_pattern={"q_proj": 5000}), "lora.rank_pattern: expected at most"),
                                               (dict(rank_pattern={"(q_proj": 4}), "lora.rank_pattern")])
def test_patterns_that_fit_no_layer_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        add_adapter(tiny.model("llama"), Lora(rank=4, **settings))
