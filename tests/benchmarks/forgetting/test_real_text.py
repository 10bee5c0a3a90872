"""Forgetting on real text: what the public files must hold, items that say what they should, and a whole study of a few steps."""

import argparse
import copy
import json
from pathlib import Path
from random import Random

import pytest

from benchmarks.forgetting import real_text, real_text_data
from benchmarks.forgetting.job import Arm, Job
from benchmarks.forgetting.miniature.world import heldout_items
from benchmarks.forgetting.real_text import Size
from benchmarks.forgetting.real_text_data import Counts, Schooling
from benchmarks.harness import parallel
from synth.pool import synthesis_run
from tests.helpers.engine_here import EngineHere, put_back
from tests.helpers.pools import here
from tests.helpers.records import drawn, shown, table_rows
from trainer.errors import UserError

WORDS = "the a patient had two red apples and bought seven more while doctors saw no change in pain after treatment".split()
TINY = Size(Schooling(skills=1500, passes=1.0, tuning=100, width=64, layers=1), Counts(2, 4, 6, 4), instructions=60, domain=30, steps=3)
LINES = ["domain only", "self, greedy + KL", "real data (oracle)", "full: domain only"]


def sentence(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(4, 12))) + "."


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The five files, of the right form and with invented content."""
    folder, rng = tmp_path_factory.mktemp("data"), Random(0)

    def lines(name: str, count: int, row) -> None:
        (folder / name).write_text("".join(json.dumps(row(i)) + "\n" for i in range(count)))

    for name, count in (("gsm8k_train.jsonl", 40), ("gsm8k_test.jsonl", 12)):
        lines(name, count, lambda i: {"question": sentence(rng), "answer": f"{sentence(rng)}\n#### {i}"})
    papers = {str(i): {"QUESTION": f"{sentence(rng)[:-1]}?", "CONTEXTS": [sentence(rng), "more"], "LONG_ANSWER": sentence(rng),
                       "final_decision": rng.choice(real_text_data.DECISIONS)} for i in range(30)}
    (folder / "pubmedqa_ori_pqal.json").write_text(json.dumps(papers))
    for name in real_text_data.FILES[3:]:
        lines(name, 20, lambda i: {"instruction": sentence(rng), "instances": [{"input": "" if i % 2 else "x", "output": sentence(rng)}]})
    return folder


def test_without_files_the_sets_come_from_the_hub(data, tmp_path, monkeypatch):
    files = {name: (data / name).read_text() for name in real_text_data.FILES}
    problems = {split: [json.loads(line) for line in files[f"gsm8k_{split}.jsonl"].splitlines()] for split in ("train", "test")}
    tasks = {name: [json.loads(line) for line in files[file].splitlines()]
             for name, file in zip((real_text_data.SEED_TASKS, real_text_data.SELF_INSTRUCT), real_text_data.FILES[3:])}
    papers = [{"pubid": int(i), "question": row["QUESTION"], "context": {"contexts": row["CONTEXTS"]}, "long_answer": row["LONG_ANSWER"],
               "final_decision": row["final_decision"]} for i, row in json.loads(files["pubmedqa_ori_pqal.json"]).items()]

    def hub_rows(name, config, split):
        if name == real_text_data.PUBMEDQA:
            return papers
        columns = config is not None  # the hub has the one set's instances as columns, the other's as rows
        return [row | {"instances": {key: [one[key] for one in row["instances"]] for key in ("input", "output")} if columns
                       else row["instances"]} for row in tasks[name]]

    monkeypatch.setattr(real_text_data, "hub_rows", hub_rows)
    monkeypatch.setattr(real_text_data, "gsm8k", lambda split, path: [(row["question"], row["answer"]) for row in problems[split]])
    assert real_text_data.read(real_text_data.download(tmp_path / "sets")) == real_text_data.read(data)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    real_text.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> dict:
    """The record of a study with few steps and four arms, one of each kind, all in this process."""
    arms = tuple(arm for arm in real_text.ARMS if arm.name in LINES)
    kept = tmp_path_factory.mktemp("kept") / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_text, "SIZE", TINY)
        patch.setattr(real_text, "ARMS", arms)
        put_back(patch)
        patch.setattr(synthesis_run, "open_engine", EngineHere)
        patch.setattr(parallel, "pool", here)
        return real_text.run(arguments("--data", str(data), "--seeds", "1", "--workers", "1", "--keep", str(kept))) | {"kept": kept}


# ---------------------------------------------------------------- what is read


def test_the_files_become_chats_and_nothing_is_both_trained_on_and_held_out(data):
    texts = real_text_data.read(data)
    assert (len(texts.domain), len(texts.domain_test)) == (40, 12)
    assert {name: (len(chats), len(texts.heldout[name])) for name, chats in texts.general.items()} == {
        "long answers": (26, 4), "decisions": (26, 4), "tasks": (34, 6)}
    papers = {chat[0] for chat in texts.general["long answers"]}
    for question, answer in texts.general["decisions"]:
        assert question.removesuffix(" Answer yes, no or maybe.") in papers and answer in real_text_data.DECISIONS
    for name, chats in texts.heldout.items():
        assert not set(chats) & set(texts.general[name])
    assert texts == real_text_data.read(data)


def test_rows_that_do_not_fit_are_left_out(data, tmp_path):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "gsm8k_train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "long", "answer": "é" * 500}) + "\n" + json.dumps({"question": "none", "answer": ""}) + "\n")
    assert real_text_data.read(tmp_path).domain == real_text_data.read(data).domain


def test_words_are_spelt_and_answers_are_those_of_the_skill():
    items = {item.skill: item for item in heldout_items(real_text_data.SKILLS, 1)}
    word = items["reverse"].answer.replace(" ", "")[::-1]
    assert " ".join(word) in items["reverse"].instruction and items["reverse"].answer == " ".join(word[::-1])
    assert set(items) == {"reverse", "sort", "count", "add", "next", "facts"} and items["count"].answer in "345"


def test_tokens_of_letters_and_digits():
    tokenizer = real_text_data.make_tokenizer(["the word 1234 and the word 12"] * 50)
    assert tokenizer.decode(tokenizer("c a t 120").input_ids) == "c a t 120"
    assert len(tokenizer("1234", add_special_tokens=False).input_ids) == 4


def test_a_solution_is_ranked_among_those_of_other_problems(data):
    problems = real_text_data.read(data).domain_test
    row = real_text_data.choice_item(problems, 3)
    assert (row["prompt"], row["answer"]) == problems[3]
    assert len(set(row["choices"])) == 4 and row["answer"] in row["choices"] and set(row["choices"]) <= {answer for _, answer in problems}


# ---------------------------------------------------------------- the study


@pytest.mark.slow
def test_every_arm_is_scored_on_everything(made):
    assert [row["line"] for row in made["summary"]] == ["base", *LINES]
    assert made["conditions"]["items"] == {"skills": 12, "decisions": 4, "long answers": 4, "tasks": 4, "problems": 6, "solutions": 4}
    base = made["summary"][0]
    for row, outcome in zip(made["summary"][1:], made["raw"]["outcomes"], strict=True):
        assert row["kl_general"] > 0 and row["kl_domain"] > 0 and row["domain"] != 0 and row["text"] != 0 and row["general_error"] is None
        assert outcome["files"]["skills"]["base"]["accuracy"] == base["general"]
        marks = outcome["marks"]["skills"]
        assert len(marks["base"]) == len(marks["model"]) == 12 and marks["model"].count("1") == 12 * row["general"]
        assert set(outcome["marks"]) == {"skills", "decisions", "solutions"}
    assert made["conditions"]["schooled"]["long answers"]["model"] > made["conditions"]["schooled"]["long answers"]["base"] + 1
    assert 0 < made["conditions"]["replay_rows"]["self, greedy"] <= 60


@pytest.mark.slow
def test_replay_sets_hold_what_their_names_say(made):
    sets = {path.stem: [json.loads(line)["messages"] for line in path.read_text().splitlines()]
            for path in (made["kept"] / "replay").iterdir()}
    assert set(sets) == {"self 1x1", "self, greedy", "real 0"}
    instructions = [[chat[0]["content"] for chat in sets[name]] for name in real_text.SELF_SETS]
    assert instructions[0] and set(instructions[0]) & set(instructions[1]) and sets["self 1x1"] != sets["self, greedy"]
    assert len(sets["real 0"]) == 60


@pytest.mark.slow
def test_the_record_has_no_place_of_this_machine(made, data):
    text = json.dumps({key: value for key, value in made.items() if key not in ("kept", "command")})
    assert str(data) not in text and str(made["kept"]) not in text


@pytest.mark.slow
def test_table_and_picture(made, tmp_path):
    lines = table_rows(made)
    assert lines[0].startswith("| arm | general | domain | forgotten | gained |") and len(lines) == 2 + 5
    assert lines[2].startswith(f"| base | {made['summary'][0]['general']:.3f} | 0.000 | 0.000 |")
    assert "1 seed." in shown(made) and "3 steps of 512 tokens" in shown(made)
    again = copy.deepcopy(made)
    again["summary"][1]["domain"], again["summary"][1]["domain_error"] = 0.5, 0.25
    assert "| +0.500 ± 0.250 |" in shown(again)
    assert drawn(made, tmp_path / "a.png").read_bytes() == drawn(made, tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_arms_are_compared_with_the_same_steps_and_tokens(made):
    recipes = [real_text.recipe(Job("base", arm, 0, TINY, made["kept"])) for arm in real_text.ARMS]
    assert {(config.max_steps, config.batch.tokens_per_step, config.data.train) for config in recipes} == {
        (3, 512, str(made["kept"] / "domain 0.jsonl"))}
    assert {config.optim.lr for config in recipes} == {2e-3, 2e-4, 5e-4}
    assert [arm.name for arm, config in zip(real_text.ARMS, recipes) if config.retention.kl_weight] == [
        "self, greedy + KL", "full: self, greedy + KL"]


def outcome(arm: str, seed: int, right: int, lost: int, gained: int) -> dict:
    measured = {"base": {"accuracy": 0.8, "right": 8, "judged": 10, "chance_adjusted": 0.1},
                "model": {"accuracy": right / 10, "tokens": 50, "chance_adjusted": 0.2},
                "change": {"lost": lost, "gained": gained, "logprob_per_token": -0.1 * (seed + 1)}}
    return {"arm": arm, "seed": seed, "cpu_seconds": 1.0, "roles": {role: {"change": {"kl_per_token": 0.5}} for role in real_text.METRICS},
            "files": {name: measured for own in real_text.METRICS.values() for name in own}}


def test_figures_are_means_over_seeds_with_their_errors():
    base, row = real_text.summary([outcome("x", 0, 7, 2, 1), outcome("x", 1, 5, 4, 1)])
    assert base["general"] == 0.8 and base["forgotten"] == base["text"] == 0
    assert row["general"] == pytest.approx(0.6) and row["general_error"] == pytest.approx(0.1) and row["seeds"] == 2
    assert row["forgotten"] == pytest.approx(0.375) and row["gained"] == 0.5 and row["text"] == pytest.approx(-0.15)


# ---------------------------------------------------------------- mistakes


def spoilt(data: Path, folder: Path, name: str, text: str | None) -> Path:
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name, text, complaint", [
    ("gsm8k_test.jsonl", None, "--data: expected a folder with gsm8k_train.jsonl, .*, found no gsm8k_test.jsonl in "),
    ("gsm8k_train.jsonl", '{"question": "a"}\n', "--data: expected JSON lines with question and answer in .*gsm8k_train.jsonl, found "),
    ("gsm8k_train.jsonl", "", "--data: expected two rows or more of at most 1000 bytes in .*gsm8k_train.jsonl, found 0"),
    ("pubmedqa_ori_pqal.json", "[1]", "--data: expected JSON of papers with .*, found otherwise"),
    ("pubmedqa_ori_pqal.json", '{"1": {"QUESTION": "q", "CONTEXTS": ["c"], "LONG_ANSWER": "l", "final_decision": "perhaps"}}',
     "--data: expected JSON of papers with .*, found otherwise"),
    ("self_instruct_seed_tasks.jsonl", '{"instruction": "a", "instances": []}\n', "--data: expected JSON lines with instruction and "),
    ("self_instruct_seed_tasks.jsonl", "not JSON", "--data: expected JSON lines with instruction and instances in "),
])
def test_bad_data_is_one_line(data, tmp_path, name, text, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        real_text.run(arguments("--data", str(spoilt(data, tmp_path, name, text))))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("words, complaint", [
    (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
    (["--keep", "."], "--keep: expected a new or empty folder, found .")
])
def test_bad_options_are_one_line(data, words, complaint):
    with pytest.raises(UserError, match=complaint):
        real_text.run(arguments("--data", str(data), *words))


def test_arms_have_names_of_their_own():
    assert len({arm.name for arm in real_text.ARMS}) == len(real_text.ARMS) and Arm("x").replay is None
