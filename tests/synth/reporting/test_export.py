"""Test the replay set with the trainer's own data loading, the pairs with TRL, and the manifest."""

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest

from synth.config import Judge, Select
from synth.stages.select import select
from tests.helpers.synth_fakes import BASE, fill, make_run, score
from trainer.data.chat_template import ChatTemplate
from trainer.data.sources import load_sources
from trainer.errors import UserError

CHATS = ["What is {0}?\nSay: \u2028 «ü» \\ \"", ["Hi?", "Hello.", "Why?"], "Name a river.", "Spell cat."]
ANSWERS = {"base": [["zero", "a letter"], ["Because."], ["Rhine"], ["unread"]],
           "other": [["{0}"], ["So."], ["Oslo"], [ValueError("empty")]]}
SCORES = {(0, "base", 0): 2, (0, "base", 1): 1, (0, "other", 0): 5, (1, "base", 0): 4, (1, "other", 0): 4, (2, "base", 0): 5,
          (2, "other", 0): 1, (3, "base", 0): None}


def exported(folder, **options):
    run = make_run(folder, ["base", "other"], **{"judge": Judge(calibrate_judges=False), "select": Select(rule="best")} | options)
    run.config.judges = [run.base]
    run.config.judge.exclude_self = False
    fill(run, CHATS, ANSWERS, systems={1: "Be brief.", 2: " "}, weights={0: 0.25, 2: 1 / 3})
    with run.pool.transaction():
        run.pool.insert("models", [("base", "scripted 1.0", BASE, "f1", 1), ("other", "scripted 1.0", BASE, "f2", 0)])
    score(run, {(*key, "base"): value for key, value in SCORES.items()})
    select(run)
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_the_replay_set_by_hand(tmp_path):
    exported(tmp_path)
    found = lines(tmp_path / "replay.jsonl")
    chosen = found[1]["source"]  # a tie
    assert found == [
        {"messages": [{"role": "user", "content": CHATS[0]}, {"role": "assistant", "content": "{0}"}],
         "id": "synth-0", "source": "other", "weight": 0.25},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"},
                      {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"},
                      {"role": "assistant", "content": {"base": "Because.", "other": "So."}[chosen]}],
         "id": "synth-1", "source": chosen, "weight": 1.0},
        {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "Rhine"}],
         "id": "synth-2", "source": "base", "weight": 1 / 3}]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_trainer_reads_it(tmp_path, ending):
    run = exported(tmp_path / "out", format=ending)
    (_, data), = load_sources(str(tmp_path / "out" / f"replay.{ending}"), "replay", cache_dir=str(tmp_path / "cache"))
    assert data["id"] == ["synth-0", "synth-1", "synth-2"] and data["weight"] == pytest.approx([0.25, 1, 1 / 3])
    assert data["source"][0] == "other" and data["source"][2] == "base"
    assert [[m["content"] for m in chat] for chat in data["messages"]][0] == [CHATS[0], "{0}"]
    assert [m["role"] for m in data["messages"][1]] == ["system", "user", "assistant", "user", "assistant"]
    template = ChatTemplate(run.tokenizer(run.base))
    chat = [{"role": m["role"], "content": m["content"]} for m in data["messages"][2]]
    encoded, = template.encode_chats([chat])
    targets = [text for text, supervised in template.segments(encoded.input_ids, encoded.supervised) if supervised]
    assert targets == ["Rhine<|eot|>"]


def test_parquet_holds_the_same_records_and_replaces_the_other_file(tmp_path):
    run = exported(tmp_path)
    expected = lines(tmp_path / "replay.jsonl")
    run.config.format = "parquet"
    select(run)
    assert pyarrow.parquet.read_table(tmp_path / "replay.parquet").to_pylist() == expected
    assert not (tmp_path / "replay.jsonl").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["replay"]["file"] == "replay.parquet"


def test_pairs_by_hand_and_as_trl_reads_them(tmp_path):
    run = exported(tmp_path)
    assert lines(tmp_path / "pairs.jsonl") == [
        {"prompt": [{"role": "user", "content": CHATS[0]}], "chosen": [{"role": "assistant", "content": "{0}"}],
         "rejected": [{"role": "assistant", "content": "a letter"}], "score_chosen": 5.0, "score_rejected": 1.0},
        {"prompt": [{"role": "user", "content": "Name a river."}], "chosen": [{"role": "assistant", "content": "Rhine"}],
         "rejected": [{"role": "assistant", "content": "Oslo"}], "score_chosen": 5.0, "score_rejected": 1.0}]
    from trl.data_utils import apply_chat_template, is_conversational

    row = lines(tmp_path / "pairs.jsonl")[1]
    assert is_conversational(row)
    assert apply_chat_template(row, run.tokenizer(run.base)) == {
        "prompt": "<|bos|><|user|>Name a river.<|eot|><|assistant|>", "chosen": "Rhine<|eot|>", "rejected": "Oslo<|eot|>"}


def test_the_manifest_by_hand(tmp_path):
    run = exported(tmp_path)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found["replay"] == {"file": "replay.jsonl", "rows": 3, "weight": pytest.approx(0.25 + 1 + 1 / 3), "pairs": 2}
    assert found["models"][1] == {"name": "other", "engine": "scripted 1.0", "path": BASE, "fingerprint": "f2", "deterministic": False}
    assert found["deterministic"] is False and found["seed"] == 0 and found["pool_version"] == 1
    assert found["counts"] == {
        "items": 4, "dropped": {"select": {"no response with all scores": 1}}, "comparisons": 0, "selected": 3,
        "responses": {"base": {"all": 5, "usable": 5}, "other": {"all": 4, "usable": 3}}, "scores": {"base": {"all": 8, "read": 7}}}
    assert found["incomplete"] == {"scores": pytest.approx(1 / 8), "responses": pytest.approx(1 / 8)}
    texts = {"base": [], "other": []}
    for record in lines(tmp_path / "replay.jsonl"):
        texts[record["source"]].append(record["messages"][-1]["content"])
    tokens = {model: sum(len(text) + 1 for text in of_model) for model, of_model in texts.items()}
    total = sum(tokens.values())
    assert found["shares"] == {model: {"rows": pytest.approx(len(of_model) / 3), "tokens": pytest.approx(tokens[model] / total)}
                               for model, of_model in texts.items()}
    assert found["settings"]["select"] == {"rule": "best", "candidates": [], "statistic": "mean", "margin": 0.5, "min_score": 0.0}
    assert "output" not in found["settings"]
    assert found["rubric"] == run.pool.get("rubric") and {"torch", "transformers", "python"} <= found["versions"].keys()
    assert found["judges"]["base"]["factor"] == 1.0 and found["judges"]["base"]["varies"] is True


def test_the_manifest_has_what_a_server_made_us_change(tmp_path):
    run = exported(tmp_path)
    assert not any("notes" in model for model in json.loads((tmp_path / "manifest.json").read_text())["models"])
    with run.pool.transaction():
        run.pool.set("notes.other", ["seed is left out, which the server refuses"])
    select(run)
    models = json.loads((tmp_path / "manifest.json").read_text())["models"]
    assert [model.get("notes") for model in models] == [None, ["seed is left out, which the server refuses"]]


def test_tokens_are_the_bases_where_it_read_all(tmp_path):
    run = exported(tmp_path)
    with run.pool.transaction():
        run.pool.connection.execute("UPDATE responses SET tokens = 1000 WHERE model = 'other'")
    before = (tmp_path / "manifest.json").read_bytes()
    select(run)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_tokens_are_the_answerers_own_where_the_base_read_not_all(tmp_path):
    run = exported(tmp_path)
    with run.pool.transaction():
        run.pool.connection.execute("UPDATE responses SET tokens = 100, base_tokens = NULL WHERE model = 'other'")
        run.pool.connection.execute("UPDATE responses SET tokens = 300 WHERE model = 'base'")
    select(run)
    found = json.loads((tmp_path / "manifest.json").read_text())["shares"]
    counts = {model: share["rows"] * 3 for model, share in found.items()}
    assert found["base"]["tokens"] == pytest.approx(300 * counts["base"] / (300 * counts["base"] + 100 * counts["other"]))


def test_equal_pools_in_other_folders_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        run = exported(tmp_path / name)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.json*")}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").glob("*.json*")} and len(first) == 3
    run.config.format = "parquet"
    select(run)
    bytes_before = (tmp_path / "b" / "replay.parquet").read_bytes()
    select(run)
    assert (tmp_path / "b" / "replay.parquet").read_bytes() == bytes_before


def test_a_disk_that_is_full_leaves_the_old_files_and_the_pool_whole(tmp_path, monkeypatch):
    run = exported(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")}
    replace = os.replace

    def full(source, target):
        if Path(target).name == "replay.jsonl":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    run.config.select.min_score = 4.5
    with pytest.raises(UserError, match="cannot write the replay set in .*: No space left on device; the pool is complete"):
        select(run)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")} == before
    assert not list(tmp_path.glob(".*.partial")) and not run.done("select")
    monkeypatch.undo()
    select(run)
    assert [row["id"] for row in lines(tmp_path / "replay.jsonl")] == ["synth-0", "synth-2"]
