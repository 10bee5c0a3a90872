"""The study on a real model, with a tiny one in its place: a whole record, resumed job by job, and what is refused."""

import argparse
import json
import re
from pathlib import Path
from random import Random

import pytest

from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.real_model import demo, jobs, pools, study, texts
from benchmarks.forgetting.real_model.arms import ARMS, BASE, QUICK, are_judged, selection, synthetic_sets
from benchmarks.harness import parallel
from synth.pool import synthesis_run
from tests.helpers.engine_here import EngineHere, put_back
from tests.helpers.pools import here
from tests.helpers.records import drawn, shown, table_rows
from trainer.errors import UserError

WORDS = "the a patient had two red apples and bought seven more while doctors saw no change in pain after treatment".split()
TINY = jobs.Size(domain_rows=12, instructions=12, answer_tokens=16, steps=2, tokens=256, pack=256, choices=3, suites=("arc_easy",), words=3,
                 rules=3, rules_tokens=8, public=4, problems=3, problem_tokens=8, mini=False)


def sentence(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(4, 9))) + "."


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The files of `--data`, of the right form and with invented content."""
    folder, rng = tmp_path_factory.mktemp("data"), Random(0)

    def lines(name: str, count: int, row) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row(i)) + "\n" for i in range(count)))

    for name, count in (("gsm8k_train.jsonl", 20), ("gsm8k_test.jsonl", 6)):
        lines(name, count, lambda i: {"question": sentence(rng), "answer": f"{sentence(rng)}\n#### {i + 10}"})
    lines("general/dolly_small.jsonl", 230, lambda i: {"response": sentence(rng), "prompt": (
        "Below is an instruction that describes a task.\n\n### Instruction:\n" + sentence(rng) + "\n\n### Response:\n")})
    lines("general/arc_easy.jsonl", 4, lambda i: {"query": f"Question: {sentence(rng)}\nAnswer:", "choices": ["yes", "no"], "gold": i % 2})
    lines("general/lambada_openai.jsonl", 4, lambda i: {"context": sentence(rng), "continuation": "apples"})
    lines("general/ifeval.jsonl", 4, lambda i: {"key": i, "prompt": sentence(rng), "instruction_id_list": ["punctuation:no_comma"],
                                                "kwargs": [{}]})
    return folder


def arguments(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)
    return parser.parse_args([*map(str, words)])


@pytest.fixture
def tiny(monkeypatch):
    """Make `--quick` tiny, and do everything in this process."""
    put_back(monkeypatch)
    monkeypatch.setattr(synthesis_run, "open_engine", EngineHere)
    monkeypatch.setattr(parallel, "pool", here)
    monkeypatch.setattr(jobs, "QUICK", TINY)


def command(data: Path, work: Path, *more) -> argparse.Namespace:
    return arguments("--quick", "--data", data, "--base", FAMILY["base"].folder, "--work", work, "--workers", 1, *more)


@pytest.mark.slow
def test_a_short_study_makes_a_record_and_the_same_command_repeats_nothing(data, tmp_path, tiny):
    work = tmp_path / "work"
    words = command(data, work, "--arms", "domain only", "self 1x1 + KL")
    made = study.run(words)
    assert [row["line"] for row in made["summary"]] == ["base", "domain only", "self 1x1 + KL"]
    assert made["suite"].startswith("real-cpu-") and made["suite"].endswith("-quick") and made["conditions"]["rows"]["self 1x1"] > 0
    for row in made["summary"][1:]:
        assert row["public_kl"]["value"] > 0 and row["domain"]["value"] != 0 and 0 <= row["rules"]["value"] <= 1
    assert made["raw"]["base"][0]["files"]["arc_easy"]["items"] == 3
    assert len(table_rows(made)) == 5 and "learns GSM8K" in shown(made)
    assert drawn(made, tmp_path / "picture.png").stat().st_size > 10_000

    written = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and path.name != "log.txt"}
    again = study.run(words)
    assert again["summary"] == made["summary"]
    unchanged = {path for path, time in written.items() if path.stat().st_mtime_ns == time}
    assert {path for path in written if path.name in ("outcome.json", "adapter_model.safetensors", "self 1x1.jsonl")} <= unchanged


def test_the_demo_shows_figures_and_answers_side_by_side(data, tmp_path, monkeypatch, capsys):
    """Jobs that an earlier start has finished are not done again: so here all are."""
    monkeypatch.chdir(tmp_path)
    base = {"right": 3, "judged": 4, "unfinished": 1}
    for name, right in ((BASE, 3), ("seed 0/domain only", 1), ("seed 0/with replay", 2)):
        folder = demo.RUN / name
        (folder / "scores").mkdir(parents=True)
        change = {"lost": 3 - right, "gained": 0, "logprob_per_token": 0.5, "kl_per_token": 0.1}
        side = base | {"right": right}
        files = {"mini_instructions": {"metric": "rules", "items": 4, "model": side, "change": change},
                 "problems": {"metric": "regex", "items": 4, "model": side, "change": change}}
        (folder / "outcome.json").write_text(json.dumps({
            "arm": name.rpartition("/")[2], "seed": 0, "cpu_seconds": {"training": 60.0, "scoring": 60.0}, "roles": {}, "files": files}))
        answers = [{"prediction": f"{name[-6:]} {i} <b>\x1b[1m", "finished": i > 0} for i in range(5)]
        (folder / "scores" / "results.jsonl").write_text("".join(json.dumps(
            {"file": "mini_instructions", "question": f"Say {i}.", "model": answer}) + "\n" for i, answer in enumerate(answers)))
    monkeypatch.setattr(parallel, "pool", here)
    monkeypatch.setattr(demo, "smollm2", lambda: (FAMILY["base"].folder, "SmolLM2"))
    monkeypatch.setattr(study.pools, "make_sets", make_no_sets)
    assert demo.main(["--data", str(data)]) == 0
    out, page = capsys.readouterr().out, (demo.RUN / "report.html").read_text()
    assert re.search(r"base .* 75.0%", out) and re.search(r"with replay .* 50.0% .* 1, 0", out)
    assert "replay 2 <b>" in out and "[cut off]" in out and "Say 3." not in out and "\x1b" not in out
    assert page.count("<h4>") == 9 and "&lt;b&gt;" in page and "<b>" not in page


def make_no_sets(pool, sets, folder) -> dict[str, int]:
    return dict.fromkeys(sets, 0)


def test_a_folder_of_another_study_is_refused(data, tmp_path, tiny):
    (tmp_path / "study.json").write_text(json.dumps({"base": "another"}))
    with pytest.raises(UserError, match="--work: expected a study with base .*, found another"):
        study.run(command(data, tmp_path))


@pytest.mark.parametrize("words, message", [
    (["--arms", "plus minus"], "--arms: expected names of domain only"), (["--seeds", "0"], "--seeds: expected at least 1"),
    (["--workers", "0"], "--workers: expected at least 1")])
def test_options_that_no_run_can_use(words, message):
    with pytest.raises(UserError, match=message):
        study.chosen(arguments("--quick", *words))


def test_data_without_suites_or_public_chats_is_refused(tmp_path):
    with pytest.raises(UserError, match="--data: expected files of suites"):
        study.suite_folder(tmp_path)
    with pytest.raises(UserError, match="--data: expected dolly_small.jsonl"):
        texts.public_chats(tmp_path)
    with pytest.raises(UserError, match="--data: expected JSON of papers"):
        texts.domain_chats("pubmedqa", tmp_path)


def test_a_prompt_in_alpacas_form_loses_its_frame():
    frame = "Below is an instruction.\n\n### Instruction:\nName it.\n\n"
    assert texts.plain(frame + "### Response:\n") == "Name it."
    assert texts.plain(frame + "### Input:\na cat\n\n### Response:\n") == "Name it.\n\na cat"
    assert texts.plain("Name it.") == "Name it."


def test_every_arm_has_its_set_and_only_judged_ones_need_judges():
    for arms in (ARMS, QUICK):
        assert len({arm.name for arm in arms}) == len(arms)
        for name in synthetic_sets(arms):
            selection(name)
    assert are_judged(synthetic_sets(ARMS)) and not are_judged(synthetic_sets(QUICK))
    judged = pools.pool_config(Path("x"), "base", ["other"], ["paper"], TINY)
    assert judged.stages[-1] == "judge" and len(judged.responders) == 1 and judged.respond.num_samples == 3
    alone = pools.pool_config(Path("x"), "base", ["other"], ["self 1x1"], TINY)
    assert alone.stages[-1] == "respond" and not alone.responders and not alone.respond.include_greedy
