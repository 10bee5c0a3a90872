"""Every recipe runs as it stands but for models and sizes, and explains each of its options."""

import json
import random
import re
from pathlib import Path

import pytest

from synth.config import Config, name_of
from synth.run import synthesise
from tests.helpers.scripted_server import Answer, ScriptedServer, chat_completion
from tests.helpers.synth_fakes import BASE, FakeEngine, install
from trainer.cli import parse

RECIPES = sorted((Path(__file__).parents[2] / "synth" / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
SMALL = ["--instruct.num_instructions", "60", "--instruct.reference_samples", "60", "--report.topics", "3"]
WORDS = "river stone engine garden violin harbour winter copper island lantern orchard thunder market canvas bridge meadow".split()


def fake_engine(name: str) -> FakeEngine:
    """A model that writes random words, and scores and embeds at random."""

    def text(request):
        rng = random.Random(request.seed)
        return f"Tell me about the {' '.join(rng.sample(WORDS, 6))}."

    rng = random.Random(name)
    return FakeEngine(name, complete=text, choose=lambda request: [rng.random() for _ in request.choices],
                      likelihood=lambda request: -float(len(request.continuation)), embed=lambda request: [rng.random() for _ in range(4)])


def answer_or_judge(body: dict) -> Answer:
    """The server's answer: a score where it is given the rubric."""
    judging = "Score: N" in body["messages"][-1]["content"]
    return Answer(200, chat_completion(f"It is plain.\nScore: {random.Random(body['seed']).randint(1, 5)}" if judging else "An answer."))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    config = parse(Config, ["--config", str(path), "--output", str(tmp_path), *SMALL], "synth.run")
    with ScriptedServer(otherwise=answer_or_judge) as server:
        engines = {}
        for model in (config.base, *config.responders, *config.judges):
            if model.engine == "openai":
                model.base_url = server.url
            else:
                model.name, model.path = name_of(model), BASE
                engines[model.name] = engines.get(model.name) or fake_engine(model.name)
        install(monkeypatch, **engines)
        synthesise(config)
    records = [json.loads(line) for line in (tmp_path / "replay.jsonl").read_text().splitlines()]
    assert len(records) > 20 and all(record["messages"][-1]["role"] == "assistant" for record in records)
    assert {record["source"] for record in records} <= {name_of(model) for model in (config.base, *config.responders)}
    assert all((tmp_path / name).exists() for name in ("manifest.json", "pairs.jsonl", "report.html", "config.yaml"))
    assert bool(server.requests) == (path.stem == "server")


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_begins_with_its_command_and_explains_every_option(path):
    first, *lines = path.read_text().splitlines()
    assert first == f"# python -m synth.run --config synth/recipes/{path.name}"
    options = [line for line in lines if line.strip() and not line.startswith("#") and not re.fullmatch(r"\w+:", line)]
    assert options and all("  # " in line for line in options)


def test_there_is_a_recipe_for_each_kind_of_engine():
    assert set(NAMES) == {"local", "server"}
