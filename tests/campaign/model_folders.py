"""Attack with model and adapter folders: JSON of another type, bytes that are damaged, odd headers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

from tests.campaign.configurations import ruined
from tests.campaign.forked import complete
from tests.campaign.material import Material, without_report
from tests.campaign.odd_values import JUNK, damaged, json_text, mutated, odd_value
from tests.campaign.oracle import Verdict, judge

FILES = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors",
         "model.safetensors", "model.safetensors.index.json", "chat_template.jinja", "special_tokens_map.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_config.json", "adapter_model.safetensors")
MORE = {  # keys that files may have beside those of the tiny model
    "config.json": {"quantization_config": {"quant_method": "x"}, "text_config": {"hidden_size": 8}, "auto_map": {"AutoConfig": "x.Y"},
                    "rope_parameters": {"rope_type": "yarn"}, "layer_types": ["full_attention"], "dtype": "float99", "model_type": "gpt2",
                    "architectures": ["Nothing"], "num_attention_heads": 0, "num_hidden_layers": 0, "vocab_size": 3, "hidden_size": 7},
    "tokenizer_config.json": {"tokenizer_class": "Nothing", "chat_template": [{"name": "default", "template": 5}], "auto_map": {},
                              "added_tokens_decoder": {"x": {"content": 5}}, "model_max_length": -1, "extra_special_tokens": [5]},
    "generation_config.json": {"temperature": -1, "do_sample": False, "eos_token_id": ["x"], "max_length": -5, "cache_implementation": "x"},
    "tokenizer.json": {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}, "added_tokens": [5], "version": 9},
    "special_tokens_map.json": {"pad_token": 5, "eos_token": {"content": None}, "additional_special_tokens": "x"},
}


def attack(dice: Random, folder: Path, material: Material) -> Verdict:
    """Change one file of a model or an adapter, and let a command read it."""
    model = material.copy_of_model(folder / "model")
    adapter = shutil.copytree(material.adapter, folder / "adapter")
    if of_adapter := dice.random() < 0.25:
        path = adapter / dice.choice(ADAPTER_FILES)
    else:
        path = model / dice.choice(FILES)
    change(dice, path)
    of_evaluation = ["--data.general", material.items, "--output", "out", "--generation.max_tokens", "2", "--statistics.bootstrap", "100"]
    used = ["--adapter", adapter] if of_adapter else []
    module, arguments = dice.choice((
        ("trainer.run", material.options("out", "--model.path", model, "--dry_run")),
        ("trainer.run", material.options("out", "--model.path", model, "--max_steps", "1",
                                       "--export.format", dice.choice(("adapter", "both")))),
        ("trainer.evaluate", ["--model.path", model, *used, *of_evaluation]),
        ("trainer.interpolate", ["--model.path", model, *(used or ["--tuned", material.model]), "--output", "out"]),
        ("synth.run", ["--base.path", model, "--base.engine", "transformers", "--output", "out", "--stages", "[select]"]),
    ))
    if module == "trainer.run" and of_adapter:
        arguments += ["--lora.path", adapter]
    ended = complete(module, arguments, folder, without_report)
    return judge(ended, ruined(folder, ended), quotes_python=True)


def change(dice: Random, path: Path) -> None:
    """Change a file: its JSON, its header, or its bytes; or remove it, or put a folder in its place."""
    way = dice.random()
    if path.name == "model.safetensors.index.json":
        return write_index(dice, path)
    if not path.exists():
        path.write_bytes(b"{}")
    content = path.read_bytes()
    if way < 0.04:
        path.unlink()
    elif way < 0.07:
        path.unlink()
        path.mkdir()
    elif way < 0.2:
        path.write_bytes(damaged(dice, content))
    elif path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = json_text(mutated(dice, json.loads(content[8:8 + size]), dice.choice((1, 1, 3))) if way < 0.9 else odd_value(dice, 3))
        told = len(header) if dice.random() < 0.9 else dice.choice((0, len(header) - 1, 2**40, 2**64 - 1))
        path.write_bytes(told.to_bytes(8, "little") + header + content[8 + size:])
    elif path.suffix == ".json":
        value = json.loads(content)
        if dice.random() < 0.4 and path.name in MORE:
            key = dice.choice(sorted(MORE[path.name]))
            value[key] = MORE[path.name][key]
        path.write_bytes(json_text(mutated(dice, value, dice.choice((1, 1, 1, 3))) if way < 0.9 else odd_value(dice, 3)))
    else:
        path.write_bytes(dice.choice((damaged(dice, content), dice.choice(JUNK))))


def write_index(dice: Random, path: Path) -> None:
    """Write an index of weights in the place of the one file, or beside it."""
    weights = path.with_name("model.safetensors")
    header = json.loads(weights.read_bytes()[8:8 + int.from_bytes(weights.read_bytes()[:8], "little")])
    shard = dice.choice(("model-00001-of-00001.safetensors", "../x.safetensors", "/etc/passwd", "x.bin", "pytorch_model.bin", "",
                         "a/b.safetensors"))
    if dice.random() < 0.7:
        weights.rename(path.with_name("model-00001-of-00001.safetensors"))
    index = {"metadata": {"total_size": 5}, "weight_map": {name: shard for name in header if name != "__metadata__"}}
    path.write_bytes(json_text(mutated(dice, index) if dice.random() < 0.6 else index))
