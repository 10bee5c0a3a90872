"""A base's outcomes taken from an earlier evaluation: figures as if it had been scored, and refusals of what does not fit."""

import json
import shutil

import pytest

from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, write_jsonl
from tests.helpers.adapters import save_random_adapter
from trainer.cli import parse
from trainer.errors import UserError
from trainer.evaluate import evaluate
from trainer.evaluation.config import Config

BASE = FAMILY["base"].folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_random_adapter(BASE, tmp_path_factory.mktemp("adapter") / "adapter", rank=2, spread=0.2)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    for name, count in (("general", 3), ("other", 2)):
        write_jsonl([item.record for item in heldout_items(GENERAL, count)], folder / f"{name}.jsonl")
    return folder


def run(output, items, *arguments, file="general") -> dict:
    return evaluate(parse(Config, ["--output", str(output), "--device", "cpu", "--generation.max_tokens", "24", "--data.general",
                                   str(items / f"{file}.jsonl"), "--data.metric", "exact", *map(str, arguments)], "trainer.evaluate"))


@pytest.fixture(scope="module")
def both(tmp_path_factory, adapter, items):
    """Return the folder of the adapter's evaluation with its base, and its results."""
    folder = tmp_path_factory.mktemp("evaluations") / "both"
    return folder, run(folder, items, "--adapter", adapter)


def without_notes(results: dict) -> dict:
    return {name: value for name, value in results.items() if name != "notes"}


@pytest.mark.slow
def test_figures_are_those_of_a_base_that_is_scored(tmp_path, adapter, items, both):
    again = run(tmp_path / "again", items, "--adapter", adapter, "--base.results", both[0])
    assert without_notes(again) == without_notes(both[1]) and again["roles"]["general"]["change"]["lost"] > 0
    assert again["roles"]["general"]["change"]["kl_per_token"] > 0
    run(tmp_path / "base", items, "--model.path", BASE)
    alone = run(tmp_path / "alone", items, "--adapter", adapter, "--base.results", tmp_path / "base")
    assert without_notes(alone) == without_notes(both[1])
    assert alone["notes"] == [f"the base's outcomes are those of {tmp_path / 'base'}"]


@pytest.mark.slow
def test_the_base_generates_nothing(tmp_path, adapter, items, both, monkeypatch):
    calls = []
    import trainer.evaluation.score_items as scored
    generate = scored.generate_completions
    monkeypatch.setattr(scored, "generate_completions", lambda *arguments: calls.append(1) or generate(*arguments))
    run(tmp_path / "again", items, "--adapter", adapter, "--base.results", both[0])
    assert len(calls) == 1


@pytest.mark.parametrize("arguments, file, message", [
    ([], "other", "expected 16 items, found 0"),
    (["--generation.stop", "[x]"], "general", r"expected an evaluation with generation.stop \['x'\], found \[\]"),
    (["--tasks", "arc_easy"], "general", "expected item files alone"),
])
def test_what_does_not_fit_is_refused(tmp_path, adapter, items, both, arguments, file, message):
    with pytest.raises(UserError, match=f"base.results: {message}"):
        run(tmp_path / "again", items, "--adapter", adapter, "--base.results", both[0], *arguments, file=file)


def test_another_base_of_the_name_is_found_out_by_its_log_probs(tmp_path, adapter, items, both):
    folder = tmp_path / "changed"
    shutil.copytree(both[0], folder)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for record in records:
        record["base"]["logprob"] -= 1
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match="base.results: expected the base of then, whose log-prob of item"):
        run(tmp_path / "again", items, "--adapter", adapter, "--base.results", folder)


def test_a_folder_without_results_is_refused(tmp_path, adapter, items):
    with pytest.raises(UserError, match="base.results: expected the output folder of an evaluation"):
        run(tmp_path / "again", items, "--adapter", adapter, "--base.results", tmp_path)
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="base.results: expected the output folder of an evaluation"):
        run(tmp_path / "again", items, "--adapter", adapter, "--base.results", tmp_path)
