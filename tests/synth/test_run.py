"""`python -m synth.run` as a user calls it, with real vLLM and transformers on a CPU: every stage, kills, mistakes."""

import dataclasses
import json
import os
import pkgutil
import random
import re
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.judging import RUBRIC
from synth.config import STAGES, Config, Instruct, Model, System
from synth.pool import synthesis_run
from synth.pool.store import VERSION, Pool
from synth.run import STAGE_FUNCTIONS, synthesise
from tests.helpers.engine_here import EngineHere, put_back
from tests.helpers.processes import Command, complete
from trainer import cli
from trainer.config import Source
from trainer.data.sources import load_sources
from trainer.errors import UserError
from trainer.files import sole_owner

ROOT = Path(__file__).parents[2]
BASE = FAMILY["base"].folder
KILLS = int(os.environ.get("STEADFAST_KILLS", 1))
ENGINE = "vllm" if find_spec("vllm") else "transformers"
SETTINGS = {
    "base": {"path": str(BASE), "dtype": "float32"},
    "responders": [{"path": str(BASE), "name": "twin", "engine": "transformers", "dtype": "float32"}],
    "probe": {"samples": 20, "temperature": [1.0]},
    "instruct": {"num_instructions": 150, "reference_samples": 40, "max_tokens": 64, "turn_weights": [4.0, 1.0]},
    "respond": {"num_samples": 2, "max_tokens": 32}, "judge": {"rubric": str(RUBRIC)}, "report": {"embeddings": False, "topics": 4},
}


def start(folder, output, *options):
    """Start the command in a process of its own."""
    config = folder / "synth.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    return Command("synth.run", ["--config", config, "--output", output, *options])


def finish(process):
    status, out, err = process.finish()
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "out", finish(start(folder, folder / "out"))


def dump(output):
    with Pool(output / "pool.sqlite") as pool:
        return pool.dump(), pool.select("SELECT stage, model, sum(requests) FROM usage GROUP BY 1, 2 ORDER BY 1, 2")


def rows(output):
    """How many requests a finished pool has the answers of, by stage and model."""
    with Pool(output / "pool.sqlite") as pool:
        one = lambda query: pool.select(query)[0][0]  # noqa: E731
        unread = one("SELECT count(*) FROM responses WHERE model != 'base' AND reason IS NULL")
        return {("instruct", "base"): one("SELECT (SELECT count(*) FROM turns) + (SELECT count(*) FROM fresh)"),
                ("respond", "base"): one("SELECT count(*) FROM responses WHERE model = 'base'") + unread,
                ("respond", "twin"): one("SELECT count(*) FROM responses WHERE model = 'twin'"),
                ("judge", "base"): one("SELECT count(*) FROM scores WHERE judge = 'base'"),
                ("judge", "twin"): one("SELECT count(*) FROM scores WHERE judge = 'twin'")}


@pytest.mark.slow
def test_every_stage_ends_and_leaves_what_it_should(whole):
    output, said = whole
    with Pool(output / "pool.sqlite") as pool:
        assert all(pool.get(f"done.{stage}") for stage in STAGES)
        items, = pool.select("SELECT count(*) FROM items")[0]
        assert items == 150 and pool.select("SELECT count(*) FROM fresh") == [(40,)]
        engines = pool.select("SELECT name, engine, deterministic FROM models ORDER BY name")
        kept = pool.select("SELECT count(*) FROM selection")[0][0]
        self_judged = pool.select("SELECT count(*) FROM scores WHERE judge = model")
    assert [(name, deterministic) for name, _, deterministic in engines] == [("base", 1), ("twin", 1)]
    assert [engine.split()[0] for _, engine, _ in engines] == [ENGINE, "transformers"] and f": started {engines[0][1]} in" in said
    assert self_judged == [(0,)] and kept > 100
    (_, records), = load_sources([Source(str(output / "replay.jsonl"))], "replay", cache_dir=str(output / "cache"))
    assert len(records) == kept and {"base", "twin"} >= {json.loads(line)["source"] for line in (output / "replay.jsonl").open()}
    assert json.loads((output / "manifest.json").read_text())["deterministic"] is True
    assert "<html" in (output / "report.html").read_text() and json.loads((output / "report.json").read_text())


@pytest.mark.slow
def test_every_request_is_booked_once(whole):
    _, booked = dump(whole[0])
    assert {(stage, model): n for stage, model, n in booked if stage != "probe"} == rows(whole[0])


@pytest.mark.slow
def test_called_again_it_asks_no_model(whole, tmp_path):
    output, _ = whole
    before = dump(output), (output / "replay.jsonl").read_bytes()
    said = finish(start(tmp_path, output))
    assert ": started " not in said and (dump(output), (output / "replay.jsonl").read_bytes()) == before


@pytest.mark.slow
@pytest.mark.parametrize("round", range(max(1, KILLS // 5)))
def test_kill_nine_in_any_stage_changes_nothing_and_pays_nothing_twice(whole, tmp_path, round):
    """Killed while a stage is at work, as often as STEADFAST_KILLS says, then run to its end: row for row the uninterrupted pool."""
    dice, output = random.Random(round), tmp_path / "out"
    stages = dice.sample(STAGES, min(KILLS, 5)) if KILLS < 5 else [*STAGES][:5] if round == 0 else dice.choices(STAGES, k=5)
    for stage in sorted(stages, key=STAGES.index):
        process = start(tmp_path, output)
        for line in process.output:
            if line.startswith(f"{stage}:"):
                break
        time.sleep(dice.uniform(0, 1.5))
        process.send(signal.SIGKILL)
        process.finish()
    finish(start(tmp_path, output))
    (found, booked), (expected, _) = dump(output), dump(whole[0])
    for table in expected:
        assert found[table] == expected[table], table
    assert (output / "replay.jsonl").read_bytes() == (whole[0] / "replay.jsonl").read_bytes()
    assert {(stage, model): n for stage, model, n in booked if stage != "probe"} == rows(output)


# ---------------------------------------------------------------- mistakes


def config(tmp_path, **options):
    return Config(output=str(tmp_path / "out"), base=Model(path=str(BASE)), stages=["probe"], **options)


def refused(config):
    with pytest.raises(UserError) as error:
        synthesise(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("model", "expected"), [
    (Model(path="/no/such/model"), "path of model: there is no folder /no/such/model"),
    (Model(path=str(ROOT / "tests")), "path of tests: expected a model folder with config.json"),
])
def test_an_unknown_model_is_refused_before_any_work(tmp_path, model, expected):
    config_ = config(tmp_path)
    config_.base = model
    assert expected in refused(config_)
    config_ = config(tmp_path, responders=[model])
    assert expected in refused(config_)


def test_a_pool_of_a_newer_version_is_left_alone(tmp_path):
    with Pool(tmp_path / "out" / "pool.sqlite") as pool, pool.transaction():
        pool.set("version", VERSION + 1)
    before = (tmp_path / "out" / "pool.sqlite").read_bytes()
    assert f"expected version {VERSION}, got {VERSION + 1}; use the newer Steadfast" in refused(config(tmp_path))
    assert (tmp_path / "out" / "pool.sqlite").read_bytes() == before


@pytest.mark.slow
def test_a_changed_seed_or_base_is_refused(whole, tmp_path):
    before = dump(whole[0])
    settings = cli.parse(Config, ["--config", str(whole[0] / "config.yaml"), "--stages", "[instruct]"], "synth.run")
    settings.seed = 1
    assert "pool.seed: this pool was made with 0, found 1" in refused(settings)
    settings.seed, settings.instruct = 0, dataclasses.replace(settings.instruct, num_instructions=151)
    assert "instruct.num_instructions: this pool was made with 150, found 151" in refused(settings)
    assert dump(whole[0]) == before


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with sole_owner(tmp_path / "out", "synth.run"):
        assert "another synth.run is using" in refused(config(tmp_path))


def test_a_stage_out_of_turn_names_the_one_before(tmp_path):
    config_ = config(tmp_path)
    config_.stages = ["select"]
    assert "expected stage judge to have ended" in refused(config_)


@pytest.mark.slow
def test_a_read_only_disk_is_one_line(tmp_path):
    status, shown, errors = complete("synth.run", ["--base.path", BASE, "--output", "/proc/steadfast"])
    assert status == 1 and shown == ""
    assert re.fullmatch(r"synth\.run: error: output: cannot write the folder /proc/steadfast: .*; choose another output\n", errors)


@pytest.mark.slow
def test_a_missing_key_and_a_server_that_is_down_are_one_line(whole, tmp_path, monkeypatch):
    """The pool is whole; a judge that cannot be reached ends the call, and the pool stays as it was."""
    copy = tmp_path / "out"
    copy.mkdir()
    with Pool(whole[0] / "pool.sqlite") as pool:
        pool.connection.execute("VACUUM INTO ?", (str(copy / "pool.sqlite"),))
    with Pool(copy / "pool.sqlite") as pool, pool.transaction():
        pool.connection.execute("DELETE FROM scores")
        pool.connection.execute("DELETE FROM meta WHERE key IN ('settings.judge', 'done.judge')")
    settings = cli.parse(Config, ["--config", str(whole[0] / "config.yaml"), "--stages", "[judge]", "--output", str(copy)], "synth.run")
    before = dump(copy)
    monkeypatch.delenv("STEADFAST_TEST_KEY", raising=False)
    settings.judges = [Model(path="big", engine="openai", base_url="https://api.example.com/v1", api_key_env="STEADFAST_TEST_KEY")]
    assert "STEADFAST_TEST_KEY" in refused(settings)
    assert [t for t in before[0] if t != "meta" and dump(copy)[0][t] != before[0][t]] == []


def test_a_context_too_short_drops_every_item_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis_run, "open_engine", EngineHere)
    put_back(monkeypatch)
    config_ = config(tmp_path, instruct=Instruct(num_instructions=3, reference_samples=0, system_prompts=[System("word " * 20)]))
    config_.base, config_.stages = Model(path=str(BASE), max_model_len=8), ["instruct"]
    synthesise(config_)
    with Pool(tmp_path / "out" / "pool.sqlite") as pool:
        reasons = {reason for reason, in pool.select("SELECT reason FROM drops")}
        assert len(reasons) == 1 and "8" in reasons.pop() and pool.select("SELECT count(*) FROM drops") == [(3,)]


def test_every_stage_has_a_function():
    assert tuple(STAGE_FUNCTIONS) == STAGES
    assert all(callable(pkgutil.resolve_name(function)) for function in STAGE_FUNCTIONS.values())
