"""Gates from end to end: an adapter that forgets fails, one that keeps passes, and mistakes are one line."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, write_jsonl
from trainer import gate
from trainer.cli import parse
from trainer.errors import UserError
from trainer.evaluation.config import GateConfig
from trainer.model import saved_adapter

BASE = FAMILY["base"].folder


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "general.jsonl"
    write_jsonl([item.record for item in heldout_items(GENERAL, 6)], path)
    return path


def peft_adapter(folder, strength: float):
    """Write an adapter with PEFT itself, as anybody would."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, strength)
    model.save_pretrained(folder)
    return folder


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["trainer.gate", "--device", "cpu", "--generation.max_tokens", "24", *map(str, arguments)])
    status = gate.main()
    return status, capsys.readouterr().out


@pytest.mark.parametrize("strength, status, verdict", [(1e-4, 0, "PASS"), (0.4, 3, "FAIL")])
def test_an_adapter_that_keeps_passes_and_one_that_forgets_fails(strength, status, verdict, items, tmp_path, monkeypatch, capsys):
    adapter = peft_adapter(tmp_path / "adapter", strength)
    ended, out = run(monkeypatch, capsys, "--adapter", adapter, "--data.general", items, "--output", tmp_path / "out")
    assert ended == status and out.splitlines()[-2].startswith(f"{verdict}: {adapter} against {BASE}")
    assert json.loads((tmp_path / "out/gate.json").read_text())["verdict"] == verdict
    assert (tmp_path / "out/gate.md").read_text().startswith(f"## {verdict}") and (tmp_path / "out/results.jsonl").is_file()


def test_an_adapter_may_be_named_as_on_the_hub(items, tmp_path, monkeypatch, capsys):
    fetched = []
    adapter = peft_adapter(tmp_path / "adapter", 1e-4)
    monkeypatch.setattr(saved_adapter, "snapshot_download", lambda name, allow_patterns: fetched.append(name) or str(adapter))
    status, _ = run(monkeypatch, capsys, "--adapter", "someone/their-lora", "--data.general", items, "--output", tmp_path / "out")
    assert status == 0 and fetched == ["someone/their-lora"]


@pytest.mark.parametrize("arguments, expected", [
    (["--model.path", "a"], "adapter, base.path: expected an adapter, or a base beside model.path, got neither"),
    (["--adapter", "a", "--gate.logprob_margin", "-1"], "gate.logprob_margin: expected 0 or more, got -1"),
    (["--adapter", "not there/at all"], "adapter: expected a folder with adapter_config.json, found none in not there/at all"),
])
def test_gates_that_cannot_be(arguments, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        gate.judge(parse(GateConfig, [*arguments, "--output", str(tmp_path / "out")], "trainer.gate"))
