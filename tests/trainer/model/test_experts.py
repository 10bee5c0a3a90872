"""Experts with adapters, computed by rows, against PEFT's sum of weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from tests.helpers import tiny
from trainer.model import experts
from trainer.model.forward import apply_activation_checkpointing
from trainer.model.lora import adapted_layers, adapters_disabled
from trainer.model.patch import patch

TARGETS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "nemotron_h", "lfm2_moe", "gemma4_text (experts)",
            "qwen3_5_moe_text")


def adapted(family, targets=TARGETS, dtype=torch.float64, **overrides):
    """A model with an adapter on the parameters of experts that it has, trained already."""
    model = tiny.model(family, dtype, **overrides)
    there = [target for target in targets if any(name.endswith(target) for name, _ in model.named_parameters())]
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=2, target_modules=[], target_parameters=there))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits_and_gradients(model, ids):
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits.detach(), embedded.grad, [p.grad for p in model.parameters() if p.requires_grad]


IDS = torch.arange(40).view(2, 20) * 7 % 400


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_pefts(family):
    model = adapted(family)
    expected = logits_and_gradients(model, IDS)
    assert experts.fuse_adapters(model) > 0
    exact = family != "nemotron_h"  # whose stock loop adds in fp32
    torch.testing.assert_close(logits_and_gradients(model, IDS), expected, rtol=1e-9 if exact else 1e-3, atol=1e-11 if exact else 1e-6)
    assert all(grad.abs().max() > 0 for grad in expected[2])


@pytest.mark.parametrize("target", TARGETS[::2])
def test_one_parameter_alone(target):
    model = adapted("qwen3_moe", [target], torch.float32)
    expected = logits_and_gradients(model, IDS)
    assert experts.fuse_adapters(model) == 2
    torch.testing.assert_close(logits_and_gradients(model, IDS), expected, rtol=1e-4, atol=5e-5)


def test_bf16_is_as_exact_as_pefts():
    model = adapted("qwen3_moe", dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    exact.get_base_model().set_experts_implementation("eager")
    truth, theirs = logits_and_gradients(exact, IDS), logits_and_gradients(model, IDS)
    experts.fuse_adapters(model)
    ours = logits_and_gradients(model, IDS)
    assert ours[2][0].dtype == torch.float32

    def error(found, of):
        return float((found.double() - of).norm() / of.norm())

    for mine, other, true in zip([*ours[:2], *ours[2]], [*theirs[:2], *theirs[2]], [*truth[:2], *truth[2]], strict=True):
        assert error(mine, true) < 1.5 * error(other, true)


def test_the_saved_adapter_is_pefts():
    model = adapted("qwen3_moe")
    before = get_peft_model_state_dict(model)
    experts.fuse_adapters(model)
    after = get_peft_model_state_dict(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_peft_changes_later_takes_effect():
    model = adapted("qwen3_moe")
    with model.disable_adapter(), torch.no_grad():
        base = model(IDS).logits
    experts.fuse_adapters(model)
    with torch.no_grad():
        tuned = model(IDS).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, base)
        with adapters_disabled(adapted_layers(model)):
            torch.testing.assert_close(model(IDS).logits, base)
        assert (tuned - base).norm() > 0.01 * base.norm()
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, tuned)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS).logits, tuned)


def test_recomputation_changes_nothing():
    model = adapted("qwen3_moe").train()
    experts.fuse_adapters(model)
    expected = logits_and_gradients(model, IDS)
    apply_activation_checkpointing(model, "full")
    torch.testing.assert_close(logits_and_gradients(model, IDS), expected)


def test_no_copy_of_the_weights_is_kept():
    model = adapted("qwen3_moe", dtype=torch.float32)
    experts.fuse_adapters(model)
    weights = {p.data_ptr() for p in model.parameters()}
    shape = experts.expert_weights(tiny.model("qwen3_moe")).pop().shape
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(IDS)
    assert all(t.data_ptr() in weights for t in kept if t.shape[-2:] == shape[-2:] and t.ndim == 3)


def test_the_start_summary_says_how_experts_are_computed():
    assert experts.describe(tiny.model("llama")) == {}
    assert experts.describe(tiny.model("llama4_text")) == {"expert products": "own code x 3"}
    assert experts.describe(tiny.model("qwen3_moe", experts_implementation="eager")) == {"expert products": "loop by expert x 2"}
    model = tiny.model("qwen3_moe")
    assert experts.describe(model) == {"expert products": "grouped x 2"}
    model = adapted("qwen3_moe")
    assert patch(model, enabled=False).backends["expert products"] == "PEFT, adapters added to all weights x 2"
    assert patch(model).backends["expert products"] == "grouped, adapters by row x 2"


def test_hooks_are_run():
    model = adapted("qwen3_moe")
    experts.fuse_adapters(model)
    expected, seen = model(IDS).logits, []
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(model(IDS).logits, expected)
    assert len(seen) == 2
