"""Test the report: its contents, that it needs no network, and that it works for a pool in any state."""

from __future__ import annotations

import base64
import json
import math
import re

import numpy as np
import pytest

from synth.config import Clean, Judge, Report
from synth.reporting import funnel
from synth.stages.report import report
from synth.stages.select import select
from tests.helpers.runs import text_of
from tests.helpers.synth_fakes import FakeEngine, fill, install, make_run, score
from trainer.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"
NO_VECTORS = Report(embeddings=False, topics=3)


def questions(count: int, seed: int) -> list[str]:
    """Sums and capitals; some occur more than once."""
    random = np.random.default_rng(seed)
    return [f"what is {a} + {b}" if b < 3 else f"the capital of land {a % 9}" for a, b in random.integers((30, 4), size=(count, 2))]


def add_fresh(run, texts) -> None:
    with run.pool.transaction():
        run.pool.insert("fresh", [(i, text, len(text), "stop", -0.5 * len(text), 0) for i, text in enumerate(texts)])


def whole_pool(folder, lines=None, count=120, **options):
    """A finished pool: 3 models, two answers each; `two` scores by length alone; a tenth of the items was dropped as near-duplicates."""
    run = make_run(folder, ["base", "one", "<two>"], lines.append if lines is not None else None,
                   **{"report": NO_VECTORS, "clean": Clean(duplicates="cap", duplicate_cap=2),
                      "judge": Judge(exclude_self=False)} | options)
    random = np.random.default_rng(5)
    names, texts = ["base", "one", "<two>"], questions(count, 1)
    answers = {name: [["x" * int(random.integers(5, 40)) + name + str(i + sample) for sample in range(2)] for i in range(count)]
               for name in names}
    answers["one"][3][1] = ValueError("longer than max_tokens or the context")
    answers = {name: [[] if i % 10 == 0 else texts for i, texts in enumerate(found)] for name, found in answers.items()}
    fill(run, texts, answers, likelihoods={(i, name, s): -1.0 for i in range(count) for name in names for s in range(2)})
    add_fresh(run, questions(100, 2))
    found = {}
    for (item, author, sample, text) in run.pool.select("SELECT item, model, sample, text FROM responses WHERE reason IS NULL"):
        quality = random.normal() + (author == "one")
        for judge in names:
            value = 3 + 0.8 * quality + 0.3 * random.normal() if judge != "<two>" else len(text) / 8
            found[item, author, sample, judge] = float(np.clip(value, 1, 5))
    found[5, "base", 0, "one"] = None
    score(run, found)
    with run.pool.transaction():
        run.pool.insert("drops", [(i, "clean", "near-duplicate", "") for i in range(0, count, 10)])
        run.pool.add_usage("respond", "base", 100, 4000, 9000, seconds=2.0, busy=1.5)
        run.pool.add_usage("judge", "one", 300, 60000, 300, seconds=3.0, busy=3.0, cost=1.25)
    select(run)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("runs") / "my-pool", []
    run = whole_pool(folder, lines)
    lines.clear()
    report(run)
    return run, (folder / "report.html").read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text()), lines


# ---------------------------------------------------------------- the page


@pytest.mark.slow
def test_the_page_says_what_the_pool_holds(whole):
    run, html, found, _ = whole
    text = text_of(html)
    assert "my-pool Of 120 instructions 108 are in the replay set." in text
    assert "clean near-duplicate 12 10.0%" in text
    assert "one 216 215 99.5% longer than max_tokens or the context: 1" in text
    assert "The reference is 100 instructions that the base wrote outside the pool" in text
    assert "one, unreadable: unread: 1" in text
    assert "respond base 100 4k 9k 2 s 4.5k generated 6k 75.0%" in text
    assert "judge one 300 60k 300 3 s 20k prompt 20k 100.0% 1.25" in text
    assert "rows 108" in text and "file replay.jsonl" in text
    selected = found["selected"]["one"]
    assert f"one {100 * selected['items']:.1f}% of rows, {100 * selected['tokens']:.1f}% of tokens" in text
    assert "<two>" not in html and "&lt;two&gt;" in html


@pytest.mark.slow
def test_the_page_stands_alone(whole):
    """Every address in it is data, and no script runs."""
    addresses = re.findall(r"""(?:src|srcset|href)=["']([^"']*)""", whole[1])
    assert len(addresses) == 1 + 2 * len(list((whole[0].folder / "plots").iterdir()))
    assert all(address.startswith("data:") for address in addresses)
    assert "<script" not in whole[1] and "url(" not in whole[1] and "@import" not in whole[1]


def test_images_are_embedded_and_left_in_plots(whole):
    embedded = [base64.b64decode(image) for image in re.findall(r'img src="data:image/png;base64,([^"]*)', whole[1])]
    beside = {path.stem: path.read_bytes() for path in (whole[0].folder / "plots").iterdir()}
    assert set(beside) == {"yield", "auc", "topic_distance", "nats", "lengths", "topics", "scores", "selected", "speed", "time"}
    assert sorted(embedded) == sorted(beside.values()) and all(image.startswith(PNG) for image in embedded)
    assert not list(whole[0].folder.glob("*.png"))


def test_what_is_printed(whole):
    _, _, found, lines = whole
    assert lines[0] == "report: items: 120 planned, 120 sampled, 108 clean, 108 answered, 108 judged, 108 selected"
    assert lines[1].startswith("report: selected instructions against reference samples: AUC 0.")
    assert lines[2].startswith("report: selected responses: ")
    assert [line for line in lines if "warning" in line] == [f"report: warning: {warning}" for warning in found["warnings"]]
    assert lines[-1] == f"report: wrote {whole[0].folder / 'report.html'}"


def test_a_judge_by_length_is_warned_of_on_the_page(whole):
    warning, = (warning for warning in whole[2]["warnings"] if warning.startswith("<two>"))
    assert warning.startswith("<two> prefers longer responses: rank correlation ")
    assert warning in text_of(whole[1]).replace("&lt;", "<").replace("&gt;", ">")


# ---------------------------------------------------------------- figures


def test_shares_won(whole):
    run, selected = whole[0], whole[2]["selected"]
    assert sum(share["items"] for share in selected.values()) == pytest.approx(1)
    chosen = run.pool.select("SELECT count(*) FROM selection WHERE model = 'base'")[0][0]
    assert selected["base"]["items"] == chosen / 108
    assert selected["base"]["candidates"] == 2 * 108 / (3 * 2 * 108 - 1)
    assert whole[2]["replay"]["shares"]["base"]["rows"] == chosen / 108


def test_steps_of_the_funnel(whole):
    steps = whole[2]["distribution"]["steps"]
    assert [(step["step"], step["items"]) for step in steps] == [("sampled", 120), ("without near-duplicate", 108), ("selected", 108)]
    assert all(0.3 < step["auc"] < 0.7 and step["texts"] == step["items"] for step in steps)
    assert {name for topic in whole[2]["distribution"]["topics"] for name in topic["shares"]} == {
        "reference", "sampled", "without near-duplicate", "selected"}
    assert sum(topic["shares"]["selected"] for topic in whole[2]["distribution"]["topics"]) == pytest.approx(1)


@pytest.mark.slow
def test_equal_pools_give_equal_reports_but_for_time_and_cost(whole, tmp_path):
    again = whole_pool(tmp_path / "my-pool")
    with again.pool.transaction():
        again.pool.connection.execute("DELETE FROM usage")
    report(again)
    found = json.loads((again.folder / "report.json").read_text())
    assert found == whole[2] | {"usage": []}
    for name in ("auc", "topics", "scores", "selected"):
        assert (again.folder / f"plots/{name}.png").read_bytes() == (whole[0].folder / f"plots/{name}.png").read_bytes()
    assert not (again.folder / "plots/speed.png").exists()


def test_rules_are_applied_in_their_order(tmp_path):
    run = make_run(tmp_path, report=Report(embeddings=False, sample=30))
    fill(run, questions(60, 3), done=("probe", "instruct", "clean"))
    with run.pool.transaction():
        run.pool.insert("drops", [
            (0, "clean", "near-duplicate", ""), (1, "clean", "too short", ""), (2, "instruct", "empty", ""),
            (3, "clean", "repetition", ""), (4, "instruct", "special token <|x|>", ""), (5, "select", "no answer", "")])
    steps = funnel.funnel_steps(run)
    assert [(step.name, step.items) for step in steps] == [
        ("sampled", 60), ("without unusable", 58), ("without too short", 57), ("without repetition", 56), ("without near-duplicate", 55)]
    assert all(len(step.sample) == 30 for step in steps)
    # the same items at every step, as far as they are left
    assert len(set(steps[0].sample.texts) - set(steps[-1].sample.texts)) <= 5


def test_weights_thin_a_sample_to_the_weighted_distribution(tmp_path):
    run = make_run(tmp_path, report=Report(embeddings=False, sample=4000))
    texts = ["often"] * 1500 + ["seldom"] * 500
    fill(run, texts, weights={i: 0.5 if i < 1500 else 1.5 for i in range(2000)})
    weighted = funnel.funnel_steps(run)[-1]
    assert weighted.name == "weighted"
    # a third of the 1,500 stay, and all of the 500: both kinds are equally likely, as 1500 * 0.5 and 500 * 1.5 are
    assert weighted.sample.texts.count("seldom") == 500
    assert weighted.sample.texts.count("often") == pytest.approx(500, abs=4 * math.sqrt(1500 * 2 / 9))


@pytest.mark.slow
def test_missing_duplicates_are_warned_of(tmp_path):
    run = make_run(tmp_path, report=NO_VECTORS)
    texts = questions(400, 7)
    fill(run, texts, done=("probe", "instruct", "clean"))
    add_fresh(run, questions(300, 8))
    seen: set[str] = set()
    with run.pool.transaction():
        run.pool.insert("drops", [(i, "clean", "near-duplicate", "") for i, text in enumerate(texts) if text in seen or seen.add(text)])
    report(run)
    warnings = json.loads((tmp_path / "report.json").read_text())["warnings"]
    expected = "Duplicates are missing: 0.0% of the instructions that are left occur more than once, "
    assert any(warning.startswith(expected) for warning in warnings)


# ---------------------------------------------------------------- pools in any state


def test_an_empty_pool(tmp_path):
    run = make_run(tmp_path)
    report(run)
    html = (tmp_path / "report.html").read_text()
    assert "No instructions have been planned yet." in text_of(html)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["yield"]["left"] == {"planned": 0} and found["distribution"] is None and found["judges"] is None
    assert found["selected"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("until, sentence", [
    (0, "Of 40 instructions 40 are planned; none is sampled yet."), (1, "Of 40 instructions 40 were sampled."),
    (2, "Of 40 instructions 40 are left after cleaning."), (3, "Of 40 instructions 39 have responses."),
    (4, "Of 40 instructions 38 are judged."),
])
def test_an_unfinished_pool(tmp_path, until, sentence):
    run = make_run(tmp_path, ["base", "one"], report=NO_VECTORS)
    answers = [[f"answer {i}"] for i in range(39)] + [[ValueError("empty")]]
    if until:
        fill(run, questions(40, 9), {"base": answers} if until > 2 else None, done=("probe", "instruct", "clean", "respond")[:until + 1])
        add_fresh(run, questions(30, 10))
    else:
        with run.pool.transaction():
            run.pool.insert("items", [(i, 1.0, 1.0, None, 1) for i in range(40)])
    if until == 4:
        score(run, {(i, "base", 0, "one"): 3.0 if i else None for i in range(39)})
    report(run)
    assert sentence in text_of((tmp_path / "report.html").read_text())


@pytest.mark.slow
def test_few_items_and_none_fresh(tmp_path):
    run = make_run(tmp_path, ["base"], report=NO_VECTORS)
    fill(run, ["a", "b", "c"], {"base": [["x"], ["y"], ["z"]]})
    report(run)
    assert "Distribution" not in text_of((tmp_path / "report.html").read_text())
    add_fresh(run, ["a", "d"])
    report(run)
    steps = json.loads((tmp_path / "report.json").read_text())["distribution"]["steps"]
    assert steps == [{"step": "sampled", "items": 3, "texts": 3, "characters": 1.0, "tokens": 1.0}]


# ---------------------------------------------------------------- embeddings, mistakes


def vector(request) -> tuple[float, ...]:
    values = np.array([request.token_ids.count(i) for i in range(7, 110)], float)
    return tuple(values / np.linalg.norm(values))


@pytest.mark.slow
def test_embeddings_are_of_the_base_and_of_every_text_once(tmp_path, monkeypatch):
    run = make_run(tmp_path, report=Report(topics=3))
    engine = FakeEngine("base", embed=vector)
    install(monkeypatch, base=engine)
    pool, fresh = questions(60, 11), questions(50, 12)
    fill(run, pool, done=("probe", "instruct", "clean"))
    add_fresh(run, fresh)
    report(run)
    assert json.loads((tmp_path / "report.json").read_text())["distribution"]["vectors"] == "embeddings of the base"
    assert engine.started == 1 and len(engine.requests) == len({*pool, *fresh})
    opening = run.format(run.base).user_prompt(()).token_ids
    assert all(request.token_ids[:len(opening)] == opening for request in engine.requests)
    assert run.pool.select("SELECT * FROM models") == []  # the pool does not depend on them


@pytest.mark.slow
def test_without_embeddings_the_report_goes_on_and_says_so(tmp_path, monkeypatch):
    lines = []
    run = make_run(tmp_path, say=lines.append, report=Report(topics=3))
    install(monkeypatch, base=FakeEngine("base", embed=lambda request: ValueError("too long")))
    fill(run, questions(60, 11), done=("probe", "instruct", "clean"))
    add_fresh(run, questions(50, 12))
    report(run)
    assert any(line.startswith("report: cannot embed texts with the base, using TF-IDF and SVD instead: too long") for line in lines)
    assert json.loads((tmp_path / "report.json").read_text())["distribution"]["vectors"] == "TF-IDF and SVD"


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", b"[" * 100_000], ids=["empty", "list", "no UTF-8", "deep"])
def test_another_file_in_the_manifests_place(tmp_path, content):
    run = make_run(tmp_path, report=NO_VECTORS)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="expected the manifest of stage select in .*manifest.json, got another file"):
        report(run)


@pytest.mark.slow(10)
def test_in_a_browser_the_page_fits_is_readable_and_reachable(browser, whole, tmp_path):
    assert browser.mistakes((whole[0].folder / "report.html").absolute().as_uri(), tmp_path) == []
