"""Every recipe runs as it stands but for paths and sizes, and explains each of its options."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.adapters import save_random_adapter
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.runs import write_chats
from trainer.cli import parse
from trainer.config import Config
from trainer.run import train

RECIPES = sorted((Path(__file__).parents[2] / "trainer" / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
SMALL = ["--device", "cpu", "--max_steps", "2", "--data.max_length", "128", "--batch.tokens_per_pack", "256",
         "--batch.tokens_per_step", "512", "--logging.tensorboard", "false", "--data.num_proc", "1"]
OWN = {  # options of one recipe alone; GENERAL and ITEMS stand for files of general chats and of questions
    "replay": ["--replay.data", "GENERAL"],
    "keep95": ["--replay.data", "GENERAL", "--forgetting.general", "ITEMS", "--forgetting.domain", "ITEMS", "--epochs", "1",
               "--replay_search.ratios", "[0.5]", "--replay_search.kl_weights", "[0.0]"],
    "fsdp": ["--fsdp.enabled", "false"],  # of several ranks; tests/trainer/model/test_sharding.py has them
    "continue": ["--replay.data", "GENERAL", "--lora.path", "ADAPTER"],
    **{name: ["--data.train", str(RECIPES[0].with_name(f"{example}.jsonl")), "--data.max_length", "1024", "--batch.tokens_per_pack", "1024",
              "--batch.tokens_per_step", "1024", *template] for name, example, template in (
        ("tools", "tool_chats", ("--data.chat_template", str(TEMPLATES / "qwen3.jinja"))),
        ("reasoning", "reasoning_chats", ("--data.chat_template", str(TEMPLATES / "qwen3.jinja"))), ("long", "documents", ()))},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that is wide enough for 4-bit weights."""
    return tiny.save_model(tmp_path_factory.mktemp("model"), "llama", hidden_size=128, intermediate_size=256, max_position_embeddings=2048)


def write_questions(path: Path) -> Path:
    """Write questions with four choices, some of which any model answers right."""
    rows = [{"prompt": f"What is {i} + {i}?", "choices": [f"{2 * i + k}" for k in range(4)], "answer": f"{2 * i + i % 4}"}
            for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.report
@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_runs(path, model, chats, tmp_path, capsys):
    if path.stem == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("qlora needs bitsandbytes")
    general = str(write_chats(tmp_path / "general.jsonl", [(f"Say {i}.", f"{i}") for i in range(40)]))
    files = {"GENERAL": general, "ITEMS": str(write_questions(tmp_path / "questions.jsonl"))}
    if path.stem == "continue":
        files["ADAPTER"] = str(save_random_adapter(model, tmp_path / "adapter", rank=4, spread=0.01))
    own = [files.get(value, value) for value in OWN.get(path.stem, [])]
    argv = ["--config", str(path), "--model.path", str(model), "--data.train", str(chats), "--output", str(tmp_path / "run"), *SMALL, *own]
    result = train(parse(Config, argv, "trainer.run"))
    assert "WARNING" not in capsys.readouterr().out
    assert result.steps == 2 and (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / ("model" if path.stem in ("full", "fsdp") else "adapter")).is_dir()


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_begins_with_its_command_and_explains_every_option(path):
    first, *lines = path.read_text().splitlines()
    assert first == f"# python -m trainer.run --config trainer/recipes/{path.name}"
    options = [line for line in lines if line.strip() and not line.startswith("#") and not re.fullmatch(r"\w+:", line)]
    assert options and all("  # " in line for line in options)


def test_there_is_a_recipe_for_each_way_to_train():
    assert set(NAMES) == {"lora", "qlora", "full", "replay", "keep95", "tools", "reasoning", "continue", "long", "fsdp"}
