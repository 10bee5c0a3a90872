"""Points between a base and what was trained from it: weights and logits, as others load them; and each mistake."""

import errno
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import tiny
from tests.helpers.models import stir
from tests.helpers.wrapped import save_wrapped, tensors_of
from trainer.cli import parse
from trainer.config import Config, Lora, Model
from trainer.errors import UserError
from trainer.interpolate import Interpolate, between, interpolate
from trainer.model.export import merge_and_save, save_adapter
from trainer.model.loading import load_model
from trainer.model.lora import add_adapter

IDS = torch.arange(5, 25)[None]


def run(*arguments) -> None:
    interpolate(parse(Interpolate, list(map(str, arguments)), "trainer.interpolate"))


def refused(*arguments) -> str:
    with pytest.raises(UserError) as raised:
        run(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@torch.no_grad()
def logits(folder, adapter=None, dtype=torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    return model.eval()(IDS).logits


def made_adapter(base, folder, **settings):
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base), Lora(rank=4, **settings))
    stir(model)
    save_adapter(model, folder, AutoTokenizer.from_pretrained(base))
    return folder


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    return made_adapter(model_folder, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path_factory):
    """A base and a model tuned from it."""
    folder = tmp_path_factory.mktemp("pair")
    base = tiny.save_model(folder / "base", "llama", tie_word_embeddings=request.param)
    model = AutoModelForCausalLM.from_pretrained(base)
    stir(model)
    model.save_pretrained(folder / "tuned")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "tuned")
    return base, folder / "tuned"


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_at_alpha_adds_that_much_of_itself(model_folder, tmp_path, rslora):
    adapter = made_adapter(model_folder, tmp_path / "adapter", rslora=rslora)
    run("--model.path", model_folder, "--adapter", adapter, "--alpha", "[0,0.25,1]", "--output", tmp_path / "out")
    deltas = {}
    for folder in (adapter, *(tmp_path / "out" / f"alpha-{name}" for name in ("0", "0.25", "1"))):
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder).merge_and_unload().state_dict()
        before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
        deltas[folder.name] = torch.cat([(merged[name] - before[name]).flatten() for name in before])
    assert deltas["adapter"].norm() > 1 and not deltas["alpha-0"].any()
    torch.testing.assert_close(deltas["alpha-0.25"], 0.25 * deltas["adapter"], rtol=1e-4, atol=1e-6)
    assert torch.equal(deltas["alpha-1"], deltas["adapter"])


def test_one_alpha_is_the_output_itself_and_has_what_came_with_the_adapter(model_folder, adapter, tmp_path):
    run("--model.path", model_folder, "--adapter", adapter, "--alpha", "0.5", "--output", tmp_path / "half")
    assert {path.name for path in (tmp_path / "half").iterdir()} == {path.name for path in adapter.iterdir()}
    assert (tmp_path / "half" / "adapter_config.json").read_text() == (adapter / "adapter_config.json").read_text()
    base, half, whole = logits(model_folder), logits(model_folder, tmp_path / "half"), logits(model_folder, adapter)
    assert (half - base).norm() > 0.1 * (whole - base).norm() > 0 and not torch.allclose(half, whole, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "half").chat_template


def test_scaled_adapters_keep_their_dtype(model_folder, tmp_path):
    source = tmp_path / "adapter"
    made_adapter(model_folder, source)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source / "adapter_model.safetensors").items()}
    save_file(tensors, source / "adapter_model.safetensors")
    run("--model.path", model_folder, "--adapter", source, "--alpha", "0.3", "--output", tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        expected = (0.3 * tensors[name].float()).to(torch.bfloat16) if "lora_B" in name else tensors[name]
        assert torch.equal(tensor, expected)


# ---------------------------------------------------------------- whole models


def test_a_model_at_alpha_lies_between(pair, tmp_path):
    base, tuned = pair
    run("--model.path", base, "--tuned", tuned, "--alpha", "[0,0.5,0.7,1]", "--output", tmp_path / "out")
    ends = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in pair]
    for alpha in (0, 0.5, 0.7, 1):
        folder = tmp_path / "out" / f"alpha-{alpha:g}"
        found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for name in ends[0]:
            expected = (1 - alpha) * ends[0][name].double() + alpha * ends[1][name].double()
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert AutoTokenizer.from_pretrained(folder).chat_template
    for alpha, end in (("0", base), ("1", tuned)):
        assert torch.equal(logits(tmp_path / "out" / f"alpha-{alpha}"), logits(end))
        names = [set(load_file(folder / "model.safetensors")) for folder in (tmp_path / "out" / f"alpha-{alpha}", base)]
        assert names[0] == names[1], "a tied weight is written once"


@pytest.mark.slow
def test_a_wrapped_model_keeps_its_tower(tmp_path):
    base = save_wrapped(tmp_path / "base", "qwen3_5")
    tuned, tokenizer = load_model(Config(model=Model(path=str(base)), method="full"), "cpu")
    stir(tuned)
    merge_and_save(tuned, tokenizer, tmp_path / "tuned")
    run("--model.path", base, "--tuned", tmp_path / "tuned", "--alpha", "0.5", "--output", tmp_path / "out")
    ends, found = [tensors_of(folder) for folder in (base, tmp_path / "tuned")], tensors_of(tmp_path / "out")
    assert found.keys() == ends[0].keys() and any("visual" in name for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (ends[0][name] + ends[1][name]) / 2)


def test_the_sum_is_made_in_fp32_and_has_the_tuned_models_dtype(pair, tmp_path):
    base, tuned = pair
    AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16).save_pretrained(tmp_path / "low")
    AutoTokenizer.from_pretrained(tuned).save_pretrained(tmp_path / "low")
    run("--model.path", base, "--tuned", tmp_path / "low", "--output", tmp_path / "out")
    found, low, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "low", base))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.lerp(start[name].float(), low[name].float(), 0.5).to(torch.bfloat16))


def test_what_has_no_fractions_is_the_tuned_ones():
    assert torch.equal(between(0.5, torch.tensor([1, 2]), torch.tensor([3, 5])), torch.tensor([3, 5]))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("alpha, expected", [
    ("1.5", "alpha: expected 0 (the base) to 1 (what was trained), got 1.5"), ("[0.5,-0.25]", "got -0.25"),
    ("[0.5,0.5]", "alpha: expected one or more different numbers, got [0.5, 0.5]"), ("[]", "one or more different numbers, got []"),
    ("nan", "alpha"),
])
def test_alpha_mistakes(model_folder, adapter, tmp_path, alpha, expected):
    message = refused("--model.path", model_folder, "--adapter", adapter, "--alpha", alpha, "--output", tmp_path / "out")
    assert expected in message and not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_write_nothing(model_folder, adapter, pair, tmp_path):
    out = ("--output", tmp_path / "out")
    assert "model.path: expected the base" in refused("--adapter", adapter, *out)
    assert "adapter, tuned: expected one of them, got neither" in refused("--model.path", model_folder, *out)
    assert "got both" in refused("--model.path", model_folder, "--adapter", adapter, "--tuned", pair[1], *out)
    assert "output: expected a folder to write" in refused("--model.path", model_folder, "--adapter", adapter)
    assert "expected a folder with adapter_config.json" in refused("--model.path", model_folder, "--adapter", tmp_path, *out)
    assert "there is no folder" in refused("--model.path", "./absent/x", "--adapter", adapter, *out)
    other = tiny.save_model(tmp_path / "other", "llama", hidden_size=32)
    assert "does not fit this model" in refused("--model.path", other, "--adapter", adapter, *out)
    assert "tuned: expected weights of the same names and shapes" in refused("--model.path", other, "--tuned", pair[1], *out)
    assert not (tmp_path / "out").exists()
    used = shutil.copytree(adapter, tmp_path / "used")
    assert f"output: expected a folder that is new or empty, found {used}" in refused(
        "--model.path", model_folder, "--adapter", adapter, "--output", used)


@pytest.mark.parametrize("text", ["{} {}", "[1]", "", "{" * 100_000])
def test_a_damaged_configuration_is_one_line(model_folder, adapter, tmp_path, text):
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text(text)
    message = refused("--model.path", model_folder, "--adapter", damaged, "--output", tmp_path / "out")
    assert message.startswith("adapter: ") and str(damaged / "adapter_config.json") in message


def test_dora_has_no_adapters_between(model_folder, tmp_path):
    adapter = made_adapter(model_folder, tmp_path / "adapter", dora=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["use_dora"]
    assert "is a DoRA adapter, which cannot be scaled; merge it (--export.format merged)" in refused(
        "--model.path", model_folder, "--adapter", adapter, "--output", tmp_path / "out")


def test_several_alphas_go_on_after_a_full_disk(model_folder, adapter, tmp_path, monkeypatch, capsys):
    def fails_at_the_second(*given, **options):
        written.append(given)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*given, **options)

    written, out, whole = [], tmp_path / "out", tmp_path / "whole"
    options = ("--model.path", model_folder, "--adapter", adapter, "--alpha", "[0.25,0.5,1]", "--output")
    run(*options, whole)
    monkeypatch.setattr("trainer.interpolate.save_file", fails_at_the_second)
    assert "No space left on device" in refused(*options, out)
    (out / ".lock").touch()  # as a kill leaves it
    assert "in use" in refused(*options[:4], "--alpha", "[0.25,0.75]", "--output", out)
    kept = (out / "alpha-0.25" / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    run(*options, out)
    assert capsys.readouterr().out.count("written before") == 1
    assert (out / "alpha-0.25" / "adapter_model.safetensors").stat().st_mtime_ns == kept
    files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} for folder in (out, whole)]
    assert files[0] == files[1] and len(written) == 4
    assert "in use" in refused(*options, out)
