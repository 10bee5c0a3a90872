"""Loading: the saved weights, packed; a model that cannot be loaded is one line."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import hub_cache, tiny
from tests.helpers.models import our_logits, pack, relative_error, stock_logits
from trainer.config import Config, Model
from trainer.errors import UserError
from trainer.model.loading import load_model, meta_model
from trainer.model.packed_attention import PACKED, is_packed


def load(**model):
    settings = {k: str(v) for k, v in model.items()}
    return load_model(Config(model=Model(**settings), precision="fp32"), "cpu")


def test_load_gives_the_saved_weights_packed(model_folder):
    model, tokenizer = load(path=model_folder)
    stock = AutoModelForCausalLM.from_pretrained(model_folder)
    batch = pack(vocab_size=len(tokenizer))
    assert is_packed(model) and model.dtype == torch.float32
    assert relative_error(our_logits(model, batch), stock_logits(stock, batch)) < 1e-5
    assert model.config.use_cache == stock.config.use_cache  # what is saved later is the user's


def test_precision_bf16_loads_bf16(model_folder):
    model, _ = load_model(Config(model=Model(path=str(model_folder)), precision="bf16"), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_random_weights_follow_the_seed_alone(model_folder):
    def weights(seed):
        torch.rand(seed)  # disturb the global generator
        state = torch.get_rng_state()
        model, _ = load_model(Config(model=Model(config=str(model_folder)), precision="fp32", seed=seed), "cpu")
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_config_file_and_tokenizer_from_elsewhere(model_folder, tmp_path):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    model, tokenizer = load(config=tmp_path / "config.json", tokenizer=model_folder)
    assert is_packed(model) and len(tokenizer) == model.config.vocab_size
    with pytest.raises(UserError, match="no tokenizer in"):
        load(config=tmp_path / "config.json")


def test_outline_has_shapes_and_no_memory(model_folder):
    model = meta_model(Config(model=Model(path=str(model_folder))))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in load(path=model_folder)[0].parameters())


def broken(folder, model_folder, change):
    """A copy of a model folder with something wrong in it."""
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    return folder


def without(*patterns):
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def edited(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


def lacking(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, message", [
    (without("config.json"), "expected a model folder with config.json"),
    (without("tokenizer*"), "no tokenizer in"),
    (without("*.safetensors"), "expected model.safetensors"),
    (pickled, "only safetensors are loaded.*convert"),
    (cut_short, "cannot load"),
    (lacking, "lacks 1 weights of LlamaForCausalLM, such as model.layers.1.mlp.up_proj.weight"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    (edited(model_type="no_such_family"), "cannot load .*no_such_family"),
    (edited(vocab_size=100), "do not fit its config.json: expected .100, 64. for lm_head.weight"),
    (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "holds an adapter; set lora.path"),
], ids=["no config", "no tokenizer", "no weights", "pickle", "cut short", "incomplete", "bad json", "unknown type", "vocabulary",
        "adapter"])
def test_unfit_folder_is_one_line(tmp_path, model_folder, change, message):
    folder = broken(tmp_path, model_folder, change)
    with pytest.raises(UserError, match=message) as caught:
        load(path=folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("settings, message", [
    (dict(), "exactly one of them, got neither"),
    (dict(path="a", config="b"), "exactly one of them, got both"),
    (dict(path="./not/there"), "there is no folder ./not/there"),
    (dict(path="nobody/nothing"), "no such folder here"),
    (dict(config="./not/there"), "expected a config.json"),
])
def test_unfit_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        load(**settings)
    assert "\n" not in str(caught.value)


def test_tokenizer_larger_than_the_embedding(model_folder, tmp_path):
    larger = tiny.tokenizer()
    larger.add_tokens(["<one more>"])
    larger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="rows of the model's embedding"):
        load(path=model_folder, tokenizer=tmp_path)


def test_implementation_name_is_ours(model_folder):
    assert load(path=model_folder)[0].config._attn_implementation == PACKED


def config_with(**values):
    def edit(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def index_of(text):
    def edit(folder):
        (folder / "model.safetensors.index.json").write_text(text)

    return edit


OWN_ALONE = r"names .*only \*.safetensors files of its own folder are loaded"


def file_of(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize("edit", [
    *(config_with(num_attention_heads=value) for value in (0, None, "two", [])),
    *(config_with(num_hidden_layers=value) for value in (0, None, "two")),
    config_with(hidden_size={}), config_with(text_config={"a": 1}), config_with(dtype="float7"), config_with(model_type=[]),
    *(file_of("config.json", text) for text in ("null", "[]", "5", "[" * 100_000)),
    *(file_of("tokenizer.json", text) for text in ("null", "[]", "5", '{"model": null}')),
    *(file_of("tokenizer_config.json", text) for text in ("null", "[]", "5")),
    *(index_of(text) for text in ("null", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": null}}', "[" * 100_000)),
])
def test_files_of_another_type_than_expected_are_one_line(model_folder, tmp_path, edit):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    edit(folder)
    try:
        load(path=folder)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["evil.bin", "../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_names_safetensors_of_its_folder_alone(model_folder, tmp_path, name):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    index_of(json.dumps({"weight_map": {"model.norm.weight": name}}))(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=OWN_ALONE):
        load(path=folder)


@pytest.mark.parametrize("name", ["evil.bin", "../model.safetensors", "a/b.safetensors"])
def test_an_index_of_the_hub_names_safetensors_of_its_folder_alone(model_folder, tmp_path, monkeypatch, name):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    index_of(json.dumps({"weight_map": {"model.norm.weight": name}}))(folder)
    (folder / "model.safetensors").unlink()
    hub_cache.cached_as(monkeypatch, folder, tmp_path / "hub")
    with pytest.raises(UserError, match=OWN_ALONE):
        load(path="someone/model")


def test_a_model_of_the_hub_is_loaded_from_its_cache(model_folder, tmp_path, monkeypatch):
    hub_cache.cached_as(monkeypatch, model_folder, tmp_path / "hub")
    assert load(path="someone/model")[0].config.model_type == "llama"
