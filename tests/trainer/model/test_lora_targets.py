"""What takes an adapter in each family, what takes none and is said, and that each adapter changes what the model computes."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.families.tiny_configs import tiny_config
from tests.helpers import mixtures, tiny
from tests.helpers.models import with_packed_attention
from trainer.config import Lora
from trainer.errors import UserError
from trainer.model.lora import adapted_weights, add_adapter, describe
from trainer.model.patch import patch
from trainer.model.text_part import auto_class, keep_text_part

FAMILIES = (*mixtures.MIXTURES, "mamba2", "bamba", "falcon_h1", "gemma3n_text")
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
READ = "read by other code, which would ignore an adapter: "
ROUTERS = "routers and gates: "


def mlp(part):
    return {f"{part}.{name}_proj" for name in ("gate", "up", "down")}


ADAPTED = {  # ends of the names of adapted layers, and what the run says of the others
    "qwen2_moe": (ATTENTION | mlp("mlp.shared_expert"), ROUTERS + "2 x mlp.shared_expert_gate"),
    "qwen3_next": (ATTENTION | mlp("mlp.shared_expert") | {f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")},
                   ROUTERS + "3 x mlp.shared_expert_gate"),
    "gpt_oss": (ATTENTION, None),
    "glm4_moe": (ATTENTION | mlp("mlp") | mlp("mlp.shared_experts"), None),
    "phimoe": (ATTENTION, ROUTERS + "2 x mlp.router"),
    "llama4_text": (ATTENTION | mlp("feed_forward.shared_expert"), ROUTERS + "3 x feed_forward.router"),
    "mamba2": ({"mixer.in_proj"}, READ + "2 x mixer.out_proj"),
    "jamba": (ATTENTION | mlp("feed_forward") | {f"mamba.{name}" for name in ("in_proj", "x_proj", "out_proj")},
              ROUTERS + "1 x feed_forward.router; " + READ + "1 x mamba.dt_proj"),
    "nemotron_h": ({f"mixer.{name}" for name in ("in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj",
                                                 "shared_experts.up_proj", "shared_experts.down_proj")}, READ + "1 x mixer.out_proj"),
    "granitemoehybrid": (ATTENTION | {"mamba.in_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"},
                         READ + "1 x mamba.out_proj"),
}


def kinds(names):
    return {re.sub(r".*\.\d+\.|\.weight$", "", name) for name in names}


@pytest.mark.parametrize("family", ADAPTED)
def test_layers_of_families(family):
    layers, said = ADAPTED[family]
    model = add_adapter(mixtures.sketch(family), Lora(rank=4))
    assert kinds(adapted_weights(model.get_base_model())) == layers
    assert describe(model).get("no adapter") == said


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_changes_the_logits(family):
    model = mixtures.model(family)
    with_packed_attention(model)
    model = add_adapter(model, Lora(rank=4, experts=family in mixtures.MIXTURES))
    patch(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(5)
    for parameter in trained.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    ids = torch.randint(5, 400, (1, 32), generator=generator)
    logits = model.train()(input_ids=ids, use_cache=False).logits
    logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum().backward()
    assert trained and not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]


def test_narrow_layers_are_left_out_and_said():
    model = add_adapter(mixtures.sketch("qwen3_5_moe_text"), Lora(rank=8))
    assert describe(model)["no adapter"] == (ROUTERS + "3 x mlp.shared_expert_gate; "
                                             "narrower than lora.rank: 2 x linear_attn.in_proj_b, 2 x linear_attn.in_proj_a")


def test_layers_that_are_never_called_are_left_out_and_said():
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.spare = nn.Linear(64, 64)
    with pytest.raises(UserError, match="but model.layers.0.spare is among those without a gradient"):
        add_adapter(model, Lora(rank=4, target_modules=["q_proj", "spare"]))
    adapted = add_adapter(model, Lora(rank=4))
    assert describe(adapted) == {"no adapter": "without a gradient: 2 x spare"}
    assert not any("spare" in name for name in adapted_weights(model))


@pytest.mark.parametrize(("family", "idle"), [
    ("deepseek_v32", "indexer"), ("blt", "patcher"), ("ernie4_5_vl_moe", "vision_moe"),
])
def test_layers_that_only_choose_or_serve_images_are_left_out(family, idle):
    """Nothing that is learnt from text reaches them."""
    config = tiny_config(family)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    keep_text_part(model)
    names = [name for name, _ in model.named_parameters() if idle in name]
    adapted = adapted_weights(add_adapter(model, Lora(rank=2, experts=family.endswith("moe"))).get_base_model())
    assert names and adapted and not [name for name in adapted if idle in name]


class Grouped(nn.Linear):
    """A linear layer that takes another shape."""

    def forward(self, x):
        return torch.stack([x @ self.weight[0], x @ self.weight[1]])


def test_layers_that_are_more_than_linear_are_left_out_and_said():
    model = tiny.model("llama")
    model.model.layers[0].mlp.router_like = Grouped(64, 64)
    model.model.layers[1].mlp.half = nn.utils.skip_init(nn.Linear, 64, 64)
    assert describe(add_adapter(model, Lora(rank=4)))["no adapter"] == (
        "routers and gates: 1 x mlp.router_like; without a gradient: 1 x mlp.half")
    model = tiny.model("llama")
    model.model.layers[0].mlp.grouped = Grouped(64, 64)
    assert describe(add_adapter(model, Lora(rank=4)))["no adapter"] == "more than linear layers: 1 x mlp.grouped"


# ---------------------------------------------------------------- a vision tower


def vision_model():
    config = AutoConfig.for_model(
        "gemma3", text_config=tiny.model_config("gemma3_text").to_dict(), mm_tokens_per_image=4, image_token_index=399,
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"], r".*\.(q_proj|up_proj)"])
def test_adapters_stay_in_the_text_decoder(targets):
    model = add_adapter(vision_model(), Lora(rank=4, target_modules=targets))
    adapted = adapted_weights(model.get_base_model())
    assert len(adapted) == (14 if targets == "all-linear" else 4)
    assert all(name.startswith("model.language_model.layers.") for name in adapted)
    assert describe(model)["no adapter"].startswith("outside the text decoder: 1 x ")


# ---------------------------------------------------------------- targets by name


@pytest.mark.parametrize(("family", "settings", "message"), [
    ("mamba2", dict(target_modules=["in_proj", "out_proj"]), "lora.target_modules: expected layers that can take an adapter, but "
     "backbone.layers.0.mixer.out_proj is among those read by other code"),
    ("phimoe", dict(target_modules=["q_proj", "router"]), "model.layers.0.mlp.router is among those more than linear layers"),
    ("qwen2_moe", dict(target_modules=["shared_expert_gate"]),
     r"lora.rank: expected at most 1, the smaller side of model.layers.0.mlp.shared_expert_gate \(1 x 64\), got 4"),
    ("qwen3_moe", dict(target_modules=["q_proj", "gate_proj"]),
     "no layer is called gate_proj; the model has: k_proj, o_proj, q_proj, v_proj; experts are adapted by lora.experts true"),
    ("glm4_moe", dict(target_modules=["gate_proj"], dora=True), "gate_proj is among those loaded by PEFT only without dropout and DoRA"),
    ("qwen3_moe", dict(experts=True, dropout=0.1), "lora.experts: expected lora.dropout 0 and lora.dora false beside it, .*, got 0.1 and"),
    ("qwen3_moe", dict(experts=True, dora=True), "got 0.0 and true"),
    ("qwen3_moe", dict(experts=True, rank=33), "expected at most 32 beside lora.experts, the smaller side of .*experts.down_proj"),
    ("mamba2", dict(experts=True), "lora.experts: expected a mixture of experts, found none in mamba2; set it to false"),
    ("mamba2", dict(rank=65), "expected layers that can take an adapter, found none in 'all-linear': .*narrower than lora.rank: 2 x"),
])
def test_unfit_targets_are_one_line(family, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        add_adapter(mixtures.sketch(family), Lora(**({"rank": 4} | settings)))
    assert "\n" not in str(caught.value)


def test_named_ends_are_kept_where_they_say_it_all():
    model = add_adapter(mixtures.sketch("qwen2_moe"), Lora(rank=4, target_modules=["q_proj", "up_proj"]))
    assert model.peft_config["default"].target_modules == {"q_proj", "up_proj"}
    assert kinds(adapted_weights(model.get_base_model())) == {"self_attn.q_proj", "mlp.shared_expert.up_proj"}
