"""The study: configurations of its arms, summaries of outcomes, and the order of its arms on a small scale."""

from dataclasses import replace

import pytest

from benchmarks.forgetting.job import Job
from benchmarks.forgetting.miniature import arms, display, study, summary
from benchmarks.forgetting.miniature.arms import selections
from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.family import STUDIED
from benchmarks.forgetting.miniature.public import FRAMES, half_the_skills, other_style
from benchmarks.forgetting.miniature.replays import pool_config, replay_statistics, selection_config
from benchmarks.forgetting.miniature.skills import GENERAL, recognise
from benchmarks.forgetting.miniature.study import Outcome, Size, recipe
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl
from benchmarks.harness import parallel, record
from synth.config import name_of, resolve_presets
from synth.config import validate as validate_synthesis
from synth.pool import synthesis_run
from tests.helpers.engine_here import EngineHere, put_back
from tests.helpers.pools import here
from tests.helpers.records import drawn, shown
from trainer.config_rules import validate

EVERY = (*arms.ARMS, *arms.FULL, *arms.SHARES, *arms.UNIQUE)


# ---------------------------------------------------------------- public data


def test_another_style_has_the_same_skills_and_no_known_question():
    records = training_records(other_style(), 500, seed=0)
    assert FRAMES.keys() == {skill.name for skill in GENERAL} == {record["source"] for record in records}
    assert not any(recognise(record["messages"][0]["content"], GENERAL) for record in records)
    for row in records[:100]:
        found = recognise(row["messages"][0]["content"], other_style())
        assert found and found[1] == row["messages"][1]["content"]


def test_half_the_skills_are_the_worlds_own():
    known = [recognise(record["messages"][0]["content"], GENERAL)[0] for record in training_records(half_the_skills(), 500, seed=0)]
    assert {skill.name for skill in known} == {skill.name for skill in GENERAL[:4]}


# ---------------------------------------------------------------- arms


def test_names_are_files_and_rows_of_their_own():
    assert len({arm.name for arm in EVERY}) == len(EVERY) and not any("/" in arm.alpha_name(alpha) for arm in EVERY for alpha in arm.alphas)
    for base in STUDIED:
        assert {arm.replay for arm in EVERY} <= {None, *selections(base), *arms.WORLD_SETS}


@pytest.mark.parametrize("base", STUDIED)
def test_every_set_is_a_choice_that_synth_accepts(base, tmp_path):
    pool = pool_config(tmp_path, base, 100)
    validate_synthesis(pool)
    assert [name_of(model) for model in resolve_presets(pool).judges] == [base, "tutor", "peer"][0 if STUDIED[base].tuning else 1:]
    for selection in selections(base).values():
        config = selection_config(pool, selection)
        validate_synthesis(config)
        assert config.stages == ["select"] and config.judge.exclude_self == config.judge.calibrate_judges == (not selection.as_in_paper)
        assert replace(config, stages=pool.stages, select=pool.select, judge=pool.judge) == pool


@pytest.mark.parametrize("arm", EVERY, ids=lambda arm: arm.name)
def test_all_arms_train_as_long_on_the_same_domain_rows(arm, tmp_path):
    size = Size(instructions=50, domain=20)
    if arm.replay in selections("novice"):
        write_jsonl(training_records(GENERAL, 2000, seed=0), study.replay_file(tmp_path, "novice", arm.replay, 1))
    config = recipe(Job("novice", arm, 1, size, tmp_path))
    validate(config)
    assert (config.max_steps, config.batch.tokens_per_step, config.seed) == (size.steps, size.tokens, 1)
    assert config.replay.ratio == (arm.ratio if arm.replay else None) and bool(config.replay.data) == bool(arm.replay)
    assert (config.method == "full") == arm.full and (config.retention.kl_weight > 0) == arm.kl
    with open(config.data.train) as file:
        assert len(file.readlines()) == 20
    if arm.unique_rows:
        with open(config.replay.data) as file:
            assert len(file.readlines()) == arm.unique_rows


def test_what_is_drawn_differs_by_seed_and_never_meets_a_test(tmp_path):
    files = [study.write_world_set(tmp_path, "novice", "real", seed, 2000) for seed in (0, 1)]
    assert files[0] != files[1] and files[0].read_text() != files[1].read_text()
    learnt = {line for line in files[0].read_text().splitlines()}
    tests = heldout_items([skill for skill in GENERAL if not skill.memorised], 100, 0)
    assert not any(f'"{item.instruction}"' in line for line in learnt for item in tests)


def test_replay_statistics_count_right_answers_to_known_questions(tmp_path):
    rows = training_records(GENERAL, 9, seed=0)
    rows[0]["messages"][1]["content"] += "?"
    rows.append({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]})
    assert replay_statistics(write_jsonl(rows, tmp_path / "rows.jsonl")) == {"rows": 10, "recognised": 0.9, "right": pytest.approx(8 / 9)}


# ---------------------------------------------------------------- figures


def outcomes():
    """Two seeds of a base and an arm, ten general items and four domain items of each."""
    return [Outcome("novice", "base", 0, "1111111100", "0000"), Outcome("novice", "base", 1, "1111111000", "0000"),
            Outcome("novice", "plus", 0, "1111111010", "1110", 2.0), Outcome("novice", "plus", 1, "1111110111", "1111", 4.0)]


def test_figures_by_hand():
    base, plus = summary.rows(outcomes())
    assert (base["general"], base["forgotten"], base["gained"], base["domain"]) == (0.75, 0.0, 0.0, 0.0)
    assert plus["general"] == pytest.approx(0.85) and plus["general_error"] == pytest.approx(0.05)  # .8 and .9
    assert plus["forgotten"] == pytest.approx((1 / 8 + 1 / 7) / 2) and plus["gained"] == pytest.approx((1 / 2 + 3 / 3) / 2)
    assert (plus["domain"], plus["seeds"], plus["cpu_seconds"]) == (pytest.approx(0.875), 2, 3.0)
    apart, error = summary.gap(outcomes(), "novice", "base", "plus")
    assert apart == pytest.approx(0.1) and error == pytest.approx(0.1)
    assert summary.rows(outcomes()[::2])[1]["general_error"] is None


def made(found, **conditions):
    full = {"share": {arm.name: arm.ratio for arm in arms.SHARES}, "unique": {arm.name: arm.unique_rows for arm in arms.UNIQUE}}
    pool = {"base": "novice", "replay": "plus", "rows": 2990, "recognised": 1.0, "right": 0.99}
    given = {"items": {"general": 10, "domain": 4}, "seeds": 2, "domain": 600, "steps": 800, "tokens": 512, "ratio": 5 / 6,
             "seconds": 600.0, "workers": 2, "curves": full, "replay": [pool]}
    return record.make("miniature-cpu", given | conditions, {}, summary.rows(found), {})


def test_the_table_has_a_row_for_each_arm_and_columns_for_each_base():
    rows = display.table(made([*outcomes(), *(replace(found, base="reader") for found in outcomes()[:2])]))
    assert rows[0] == ["arm", "novice: general", "novice: domain", "novice: forgotten", "reader: general", "reader: domain",
                        "reader: forgotten"]
    assert rows[2] == ["plus", "0.850 ± 0.050", "0.875 ± 0.125", f"{15 / 112:.3f} ± {1 / 112:.3f}", "", "", ""]


@pytest.mark.parametrize("curves", [False, True])
def test_the_picture_is_drawn_with_and_without_curves(tmp_path, curves):
    points = [replace(found, arm=arm.name) for found in outcomes()[2:] for arm in (*arms.SHARES, *arms.UNIQUE)] if curves else []
    path = drawn(made([*outcomes(), *points]), tmp_path / "study.png")
    assert path.stat().st_size > 10_000 and "| plus | 0.850 ± 0.050 |" in shown(made([*outcomes(), *points]))
    assert not any("rows |" in line for line in shown(made([*outcomes(), *points])).splitlines())


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("options", "message"), [
    (["--seeds", "0"], "--seeds: expected at least 1, got 0"), (["--workers", "0"], "--workers: expected at least 1, got 0"),
    (["--keep", "{used}"], "expected a new or empty folder")])
def test_bad_options_are_one_line(tmp_path, capsys, options, message):
    from benchmarks.run import main

    (tmp_path / "file").write_text("")
    formatted = [option.format(used=tmp_path) for option in options]
    workers = [] if "--workers" in formatted else ["--workers", "1"]
    assert main(["miniature", *formatted, *workers]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- the order of the arms


@pytest.mark.slow(60)
def test_the_order_of_the_arms_on_a_small_scale(tmp_path, monkeypatch):
    """One base and seed, a thirtieth of the instructions, a tenth of the steps; the gaps of the whole are in benchmarks/results."""
    put_back(monkeypatch)
    monkeypatch.setattr(synthesis_run, "open_engine", EngineHere)
    monkeypatch.setattr(parallel, "pool", here)
    monkeypatch.setattr(study, "ITEMS", {"general": (GENERAL, 40), "domain": (DOMAIN, 20)})
    names = ("domain only", "public, other style", "self 1x1", "plus")
    plan = [replace(arm, alphas=()) for arm in arms.ARMS if arm.name in names]
    outcomes, replay_stats = study.run_all({"novice": plan}, 1, Size(instructions=100, steps=80), tmp_path, workers=1)
    general = {row["arm"]: row["general"] for row in summary.rows(outcomes)}
    right = {row["replay"]: row["right"] for row in replay_stats}
    assert right["self 1x1"] < right["plus"]
    assert general["domain only"] < general["public, other style"] - 0.1 < min(general["self 1x1"], general["plus"]) - 0.2
