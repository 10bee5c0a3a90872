"""The trainer's own step on the fake GPU: every family, method and option runs, and the host never waits."""

import pytest
import torch

from benchmarks.families.tiny_configs import tiny_config
from tests.helpers.fake_gpu import LENGTHS, Calls, configured, make_run, step_calls
from trainer.config import Optim, Retention
from trainer.runtime.device import choose_device

METHODS = ("lora", "full", "qlora")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "cohere2", "glm4",
            "smollm3", "exaone4", "ministral3", "seed_oss")


def assert_lean(calls: Calls) -> None:
    assert not calls.faults, calls.faults
    assert not calls.waits, calls.waits
    assert calls.of("TRITON")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_and_method_never_waits(device, family, method):
    shape = tiny_config(family)
    shape.attention_dropout = 0.0
    assert_lean(step_calls(make_run(shape, configured(method), LENGTHS, device)))


@pytest.mark.parametrize("options", [
    {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"},
    {"retention": Retention(kl_weight=0.3, kl_sources="all")},
    {"retention": Retention(kl_weight=0.3, kl_sources="all", kl_positions="all", kl_direction="js")},
    {"retention": Retention(token_weighting="dft")}, {"retention": Retention(l2_sp=0.1)},
    {"activation_checkpointing": "full", "retention": Retention(kl_weight=0.3, kl_sources="all", token_weighting="dft")},
    {"dropout": 0.0}, {"packs": 3}, {"optim": Optim(max_grad_norm=0.0)}, {"dora": True},
], ids=lambda options: ", ".join(options))
@pytest.mark.parametrize("method", METHODS)
def test_a_step_with_options_never_waits(device, method, options):
    options = dict(options)
    dora = options.pop("dora", False)
    config = configured(method, **options)
    config.lora.dora = dora
    assert_lean(step_calls(make_run(tiny_config("llama"), config, LENGTHS * options.get("packs", 1), device)))


def test_dropout_of_attention_reads_the_bounds_of_samples_once_a_pack(device):
    """Without flash-attn no kernel of torch has this dropout in packs: the reference serves, which needs the bounds on the host."""
    shape = tiny_config("llama")
    shape.attention_dropout = 0.1
    calls = step_calls(make_run(shape, configured(), LENGTHS, device))
    assert not calls.faults and len(calls.of("SYNC")) == 1


def test_a_rank_trains_on_its_own_gpu_alone():
    """On the second of two GPUs; also in threads that never chose one, as those that load weights."""
    torch.cuda.set_device(1)
    try:
        before = torch.cuda.memory_allocated(0)
        run = make_run(tiny_config("llama"), configured(), LENGTHS, choose_device("auto", 1))
        assert_lean(step_calls(run))
        assert {tensor.device for tensor in run.state_tensors()} == {torch.device("cuda", 1)}
        assert torch.cuda.memory_allocated(0) == before and torch.cuda.memory_allocated(1)
    finally:
        torch.cuda.set_device(0)
