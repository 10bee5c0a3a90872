"""Names of an adapter's tensors, beside vLLM's own maps of names."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from benchmarks.families.examine import save_loud_model
from benchmarks.families.served import vllm_environment
from tests.helpers.models import our_logits, pack, relative_error, stir, stock_logits
from trainer.config import Config, Lora, Model
from trainer.model.export import save_adapter
from trainer.model.peft_targets import NAMED_AS_IN_FILES
from trainer.training.build import build_model


@pytest.mark.slow
def test_an_adapter_is_named_as_in_files_where_vllm_knows_no_other_names(tmp_path):
    save_loud_model("laguna", tmp_path / "base")
    model, _ = build_model(Config(model=Model(path=str(tmp_path / "base")), precision="fp32", lora=Lora(rank=4)), torch.device("cpu"))
    stir(model.eval())
    save_adapter(model, tmp_path / "adapter", None)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as adapter, \
            safe_open(tmp_path / "base" / "model.safetensors", "pt") as base:
        layers = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in adapter.keys()}
        assert {f"{layer}.weight" for layer in layers} <= set(base.keys())
    assert not {f"{layer}.weight" for layer in layers} <= set(model.get_base_model().state_dict())
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    batch = pack(vocab_size=64)
    assert relative_error(stock_logits(served, batch), our_logits(model, batch)) < 1e-5


@pytest.mark.slow(60)
def test_the_types_named_as_in_files_are_those_that_vllm_knows_no_other_way(tmp_path):
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "tests.helpers.vllm_names"]
    done = subprocess.run(command, env=vllm_environment(tmp_path), capture_output=True, text=True)
    assert set(json.loads(done.stdout.splitlines()[-1])) == NAMED_AS_IN_FILES, done.stderr
