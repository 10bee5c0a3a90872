"""Mixtures of experts are found by their structure, in every family and under an adapter."""

import re

import pytest
import torch
from torch import nn

from tests.helpers import mixtures, tiny
from trainer.config import Lora
from trainer.model.lora import add_adapter
from trainer.model.mixtures import find_mixtures

EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
EXPECTED = {  # ends of names of experts' weights, and of the linear layers that are routers or gates
    "qwen3_moe": (EXPERTS, set()),
    "qwen2_moe": (EXPERTS, {"mlp.shared_expert_gate"}),
    "mixtral": (EXPERTS, set()),
    "gpt_oss": (EXPERTS, set()),
    "granitemoe": ({"block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"}, set()),
    "phimoe": (EXPERTS, {"mlp.router"}),
    "llama4_text": ({"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"}, {"feed_forward.router"}),
    "gemma4_text (experts)": ({"experts.gate_up_proj", "experts.down_proj"}, {"router.proj"}),
    "afmoe": (EXPERTS, {"mlp.router.gate"}),
    "jetmoe": ({f"{part}.{side}_linear.weight" for part in ("mlp", "self_attention.experts") for side in ("input", "output")},
               {"mlp.router.layer", "self_attention.experts.router.layer"}),
    "longcat_flash": (EXPERTS, {"mlp.router.classifier"}),
    "hunyuan_v1_moe": (EXPERTS, {"mlp.gate.wg"}),
    "jamba": ({"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"}, {"feed_forward.router"}),
    "nemotron_h": ({"mixer.experts.up_proj", "mixer.experts.down_proj"}, set()),
}


def kinds(names):
    return {re.sub(r".*\.\d+\.", "", name) for name in names}


@pytest.mark.parametrize("family", EXPECTED)
def test_experts_and_routers_of_families(family):
    found = find_mixtures(mixtures.sketch(family))
    assert (kinds(found.weights), kinds(found.routers)) == EXPECTED[family] and not found.layers


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_dense_models_have_none(family):
    found = find_mixtures(tiny.model(family))
    assert not found.weights and not found.layers and not found.routers


def test_decoder_layers_beside_what_writes_as_many_are_no_experts():
    """DeepSeek V4 ends in four streams, and has four layers here."""
    assert not find_mixtures(mixtures.sketch("deepseek_v4")).layers


class OlderMixture(nn.Module):
    """Experts that are modules of their own, as transformers 4 and code beside checkpoints have them."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, width)) for _ in range(experts))
        self.shared = nn.Linear(width, width)
        self.shared_gate = nn.Linear(width, 1)

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        routed = sum(scores[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        return routed + self.shared_gate(x).sigmoid() * self.shared(x)


def older_model(family="llama", experts=3):
    """A model whose second layer has such a mixture."""
    model = tiny.model(family)
    torch.manual_seed(1)
    model.model.layers[1].mlp = OlderMixture(64, experts)
    return model


def test_experts_that_are_modules():
    model = older_model()
    found = find_mixtures(model)
    assert kinds(found.routers) == {"mlp.gate", "mlp.shared_gate"} and not found.weights
    assert set(found.layers) == {f"model.layers.1.mlp.experts.{i}.{part}" for i in range(3) for part in (0, 2)}
    assert find_mixtures(add_adapter(model, Lora(rank=4, experts=True)).get_base_model()).layers.keys() == found.layers.keys()


def test_an_adapter_does_not_hide_them():
    model = mixtures.sketch("qwen2_moe")
    before = find_mixtures(model)
    after = find_mixtures(add_adapter(model, Lora(rank=4, experts=True)).get_base_model())
    assert after.weights.keys() == before.weights.keys() and after.routers.keys() == before.routers.keys()
    assert all(after.weights[name] is weight for name, weight in before.weights.items())
