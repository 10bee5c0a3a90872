"""Test judging: who judges whom, prompts, scores, and that no request is repeated."""

import hashlib
import math

import pytest

from synth.config import Config, Judge, Model, name_of
from synth.engines.interface import ChoiceRequest, Completion, CompletionRequest
from synth.judging.calibration import judges_by_author
from synth.judging.rubric import EXPECTED_SCORE_RUBRIC, GENERATED_SCORE_RUBRIC, PAIRWISE_PROMPT, fill_placeholders, load_rubric, prompt_text
from synth.judging.score_parsing import NO_PROBABILITY, NO_SCORE_LINE, expected_score, parse_score, preference_for_first
from synth.pool import seeds
from synth.pool.store import Chat
from synth.stages.judge import judge
from tests.helpers.synth_fakes import BASE, FakeEngine, install, make_run
from tests.helpers.synth_fakes import fill as fill_pool
from trainer.errors import UserError

CHATS = ["What is 2 + 2?", "Name a river.", "Spell cat."]
ANSWERS = {"base": [["4", "5"], ["Rhine", "Oslo"], ["cat", "kat"]], "other": [["four"], ["Nile"], ["c-a-t"]]}
SURE = {digit: tuple(1.0 if i == digit else 0.0 for i in range(1, 6)) for digit in range(1, 6)}


def scores(run):
    return {row[:4]: row[4] for row in run.pool.select("SELECT item, model, sample, judge, score FROM scores")}


def words(run, request) -> str:
    """What a judge is shown."""
    return run.tokenizer(run.base).decode(request.prompt.token_ids)


def engines_for(run, **options) -> dict[str, FakeEngine]:
    return {name_of(model): FakeEngine(name_of(model), choose=lambda request: (0.1, 0.2, 0.3, 0.2, 0.1), **options)
            for model in run.config.judges}


# ---------------------------------------------------------------- who judges whom


@pytest.mark.parametrize(("judges", "exclude", "expected"), [
    (["base", "other"], True, {"base": ("other",), "other": ("base",)}),
    (["base", "other"], False, {"base": ("base", "other"), "other": ("base", "other")}),
    (["base"], True, {"base": ("base",), "other": ("base",)}),
    (["third", "base", "third"], True, {"base": ("third",), "other": ("base", "third")}),
])
def test_a_model_does_not_judge_itself_as_long_as_another_judge_is_there(judges, exclude, expected):
    config = Config(base=Model("base"), responders=[Model("other")], judges=[Model(name) for name in judges],
                    judge=Judge(exclude_self=exclude))
    assert judges_by_author(config) == expected


def test_every_usable_answer_gets_a_score_of_every_other_judge(tmp_path, monkeypatch):
    run = make_run(tmp_path, ["base", "other", "third"])
    fill_pool(run, CHATS, {**ANSWERS, "third": [["vier"], [ValueError("empty")], ["CAT"]]})
    with run.pool.transaction():
        run.pool.insert("drops", [(2, "clean", "too short", None)])
    engines = engines_for(run)
    install(monkeypatch, **engines)
    judge(run)
    usable = [(0, "base", 0), (0, "base", 1), (1, "base", 0), (1, "base", 1), (0, "other", 0), (1, "other", 0), (0, "third", 0)]
    expected = {(*key, name) for key in usable for name in engines if name != key[1]}
    assert set(scores(run)) == expected
    assert all(engine.started == 1 for engine in engines.values()) and run.done("judge")
    judge(run)
    assert all(engine.started == 1 for engine in engines.values())


def test_the_only_judge_judges_its_own_answers_and_says_so(tmp_path, monkeypatch):
    lines = []
    run = make_run(tmp_path, ["base"], say=lines.append)
    fill_pool(run, CHATS, {"base": ANSWERS["base"]})
    install(monkeypatch, **engines_for(run))
    judge(run)
    assert len(scores(run)) == 6 and lines[0] == "judge: base scores its own responses, because there is no other judge"


@pytest.mark.parametrize("mass", [0.0, 0.1])
def test_a_judge_without_any_score_is_named(mass, tmp_path, monkeypatch):
    lines = []
    run = make_run(tmp_path, ["base"], say=lines.append)
    fill_pool(run, CHATS, {"base": ANSWERS["base"]})
    install(monkeypatch, base=FakeEngine("base", choose=lambda request: (mass, 0, 0, 0, 0)))
    judge(run)
    warning = "judge: WARNING: none of the 6 answers of base has a score; use judge.scoring generated, in another output"
    assert (warning in lines) == (mass == 0)


def test_answers_that_a_later_selection_dropped_are_still_judged(tmp_path, monkeypatch):
    run = make_run(tmp_path, ["base"])
    fill_pool(run, CHATS, {"base": ANSWERS["base"]})
    with run.pool.transaction():
        run.pool.insert("drops", [(0, "select", "below min_score", "1.000")])
    install(monkeypatch, **engines_for(run))
    judge(run)
    assert {key[0] for key in scores(run)} == {0, 1, 2}


# ---------------------------------------------------------------- the digit's distribution


def test_an_expected_score_is_the_mean_under_the_renormalised_digits():
    assert expected_score((0.1, 0.0, 0.0, 0.0, 0.3)) == pytest.approx((0.1 * 1 + 0.3 * 5) / 0.4)
    assert expected_score(SURE[2]) == 2
    for nothing in ((0.0,) * 5, (math.nan, 0.5, 0, 0, 0), (math.inf, 0, 0, 0, 0)):
        assert expected_score(nothing) is None
    assert preference_for_first((0.1, 0.3)) == pytest.approx(0.25) and preference_for_first((0.0, 0.0)) is None


def test_scores_have_their_mass_and_what_has_none_its_reason(tmp_path, monkeypatch):
    run = make_run(tmp_path, ["base"])
    fill_pool(run, CHATS, {"base": [["a"], ["b"], ["c"]]})
    results = {0: (0.05, 0.0, 0.0, 0.1, 0.25), 1: (0.0,) * 5, 2: ValueError("prompt of 600 tokens, longer than the context of 512")}
    install(monkeypatch, base=FakeEngine("base", choose=lambda request: results[request.key[0]]))
    judge(run)
    rows = run.pool.select("SELECT item, score, mass, text, seed, reason FROM scores ORDER BY item")
    seed = [seeds.seed(0, "judge", "base", item, "base", 0) for item in range(3)]
    assert rows[0][1:3] == (pytest.approx((0.05 + 0.4 + 1.25) / 0.4), pytest.approx(0.4)) and rows[0][3:] == ("5", seed[0], None)
    assert rows[1] == (1, None, 0.0, None, seed[1], NO_PROBABILITY)
    assert rows[2] == (2, None, None, None, seed[2], "prompt of 600 tokens, longer than the context of 512")


def test_a_judge_that_we_hold_reads_token_ids_and_answers_with_a_digit(tmp_path, monkeypatch):
    run = make_run(tmp_path, ["base"])
    fill_pool(run, CHATS[:1], {"base": [["four"]]})
    engine = FakeEngine("base", choose=lambda request: SURE[4])
    install(monkeypatch, base=engine)
    judge(run)
    request, = engine.requests
    assert isinstance(request, ChoiceRequest) and request.choices == ("1", "2", "3", "4", "5") and request.key == (0, "base", 0)
    text = fill_placeholders(EXPECTED_SCORE_RUBRIC, instruction=CHATS[0], response="four")
    assert request.prompt.token_ids == run.format(run.base).response_prompt([{"role": "user", "content": text}])


def test_a_server_reads_the_chat_itself(tmp_path, monkeypatch):
    server = Model("gpt", engine="openai", base_url="http://localhost:1/v1")
    run = make_run(tmp_path, ["base"], judges=[server])
    fill_pool(run, ["Format {response} and {0} as {instruction}"], {"base": [["{instruction} } {"]]})
    engine = FakeEngine("gpt", choose=lambda request: SURE[4])
    install(monkeypatch, gpt=engine)
    judge(run)
    (message,) = engine.requests[0].prompt.messages
    assert engine.requests[0].prompt.token_ids is None and message["role"] == "user"
    before, between, after = EXPECTED_SCORE_RUBRIC.replace("{response}", "{instruction}").split("{instruction}")
    assert message["content"] == before + "Format {response} and {0} as {instruction}" + between + "{instruction} } {" + after


# ---------------------------------------------------------------- the paper's way


@pytest.mark.parametrize(("text", "score"), [
    ("Good.\nScore: 4", 4), ("Score: 1", 1), ("Fine.\n\n**Score: 5**\n\n", 5), ("x\n**Score:** 3", 3), ("x\nscore: 2.", 2),
    ("x\nScore: 4/5", 4), ("x\nScore: 4 / 5.", 4), ("Score: 2\nScore: 3", 3), ("x\n  Score:4  ", 4), ("x\r\nScore: 4\r\n", 4),
    ("x\n*Score: 4*", 4), ("x\n__Score__: 4", 4),
    ("", None), ("4", None), ("Score: 6", None), ("Score: 0", None), ("Score: 4.5", None), ("Score: 45", None), ("Score: 4/10", None),
    ("Score: 4\nThat is all.", None), ("The score: 4", None), ("I give it Score: 4", None), ("Score: 4 out of 5", None), ("Score 4", None),
    ("Score: N", None), ("Score: 4-5", None), ("Score: four", None), ("Score:\n4", None), ("Score: ٤", None), ("Score: 4, or 5", None),
])
def test_a_written_score_is_read_strictly_from_the_last_line(text, score):
    assert parse_score(text) == score


def test_written_scores_are_kept_with_their_text(tmp_path, monkeypatch):
    run = make_run(tmp_path, ["base"], judge=Judge(scoring="generated", max_tokens=77))
    fill_pool(run, CHATS, {"base": [["a"], ["b"], ["c"]]})
    results = {0: "Right.\nScore: 5", 1: "Wrong, so 2.", 2: None}
    engine = FakeEngine("base", complete=lambda r: results[r.key[0]] or Completion(r.key, "So far\nScore: 4", 77, "length", None, 9))
    install(monkeypatch, base=engine)
    judge(run)
    assert run.pool.select("SELECT score, mass, text, reason FROM scores ORDER BY item") == [
        (5.0, None, "Right.\nScore: 5", None), (None, None, "Wrong, so 2.", NO_SCORE_LINE),
        (None, None, "So far\nScore: 4", "longer than max_tokens or the context")]
    request = engine.requests[0]
    stops = run.format(run.base).response_stops
    assert isinstance(request, CompletionRequest) and request.sampling == (0.0, 1.0, 77, *stops)
    assert request.seed == seeds.seed(0, "judge", "base", *request.key)
    assert "last line" in words(run, request)


# ---------------------------------------------------------------- rubrics


def test_our_rubrics_ask_for_what_is_read():
    assert load_rubric(Judge()) == EXPECTED_SCORE_RUBRIC and EXPECTED_SCORE_RUBRIC.endswith("a single digit from 1 to 5, and nothing else.")
    assert load_rubric(Judge(scoring="generated")) == GENERATED_SCORE_RUBRIC and "\nScore: N\n" in GENERATED_SCORE_RUBRIC
    for text in (EXPECTED_SCORE_RUBRIC, GENERATED_SCORE_RUBRIC):
        assert text.count("{instruction}") == text.count("{response}") == 1
    assert [PAIRWISE_PROMPT.count(place) for place in ("{instruction}", "{first}", "{second}")] == [1, 1, 1]


def test_a_rubric_of_the_users_own_is_filled_and_settled(tmp_path, monkeypatch):
    own = tmp_path / "own.txt"
    own.write_text("Rate 1-5 {json: {}}\n{instruction}\n{response}")
    run = make_run(tmp_path / "run", ["base"], judge=Judge(rubric=str(own)))
    fill_pool(run, ["Name a river."], {"base": [["Rhine"]]})
    engine = FakeEngine("base", choose=lambda request: SURE[5])
    install(monkeypatch, base=engine)
    judge(run)
    assert "Rate 1-5 {json: {}}\nName a river.\nRhine" in words(run, engine.requests[0])
    assert run.pool.get("rubric") == own.read_text()
    own.write_text("Rate\n{instruction}\n{response}")
    with pytest.raises(UserError, match=r"^judge.rubric: this pool was made with '\w+', found '\w+'; go on with those, or choose another"):
        judge(run)


@pytest.mark.parametrize(("content", "message"), [
    ("Rate {response}", r"got no \{instruction\}; add"), ("Rate {0}", r"got no \{instruction\} and no \{response\}; add"),
    (None, "No such file"), (b"\xff\xfe{", "judge.rubric: expected a text file in UTF-8"),
])
def test_a_rubric_that_shows_no_answer_is_refused(tmp_path, content, message):
    path = tmp_path / "rubric.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as refused:
        load_rubric(Judge(rubric=str(path)))
    assert "\n" not in str(refused.value)


def test_what_was_asked_is_the_instruction_or_the_whole_talk():
    turns = (("user", "Hi?"), ("assistant", "Hello."), ("user", "Why?"))
    question, answer, more = ({"role": role, "content": text} for role, text in turns)
    assert prompt_text(Chat(0, None, (question,))) == "Hi?"
    assert prompt_text(Chat(0, "Be kind.", (question,))) == "System: Be kind.\n\nUser: Hi?"
    assert prompt_text(Chat(0, None, (question, answer, more))) == "User: Hi?\n\nAssistant: Hello.\n\nUser: Why?"


# ---------------------------------------------------------------- resuming


def finished(folder, monkeypatch, deaths=(), order=0, **options):
    """A pool judged by engines that die after so many results each time, and all requests that were made."""
    monkeypatch.setattr("synth.pool.writer.BATCH", 2)
    monkeypatch.setattr("synth.stages.judge.PAGE", 2)
    run = make_run(folder, ["base", "other"], **options)
    fill_pool(run, CHATS, ANSWERS)
    engines = {name: FakeEngine(name, seed=order, choose=scripted, complete=lambda r: f"so\nScore: {digit(r.key) or 'none'}")
               for name in ("base", "other")}
    install(monkeypatch, **engines)
    for death in deaths:
        for engine in engines.values():
            engine.results = death
        with pytest.raises(UserError, match="died"):
            judge(run)
    for engine in engines.values():
        engine.results = None
    judge(run)
    return run, [(name, request) for name, engine in engines.items() for request in engine.requests]


def digit(key):
    return seeds.seed(7, *key) % 6


def scripted(request):
    if len(request.choices) == 2:
        return (0.5 * seeds.uniform(1, *request.key), 0.5)
    return tuple(seeds.uniform(i, *request.key) for i in range(5))


@pytest.mark.parametrize("how", ["expected_score", "generated", "pairwise"])
def test_kills_and_orders_leave_the_same_rows(tmp_path, monkeypatch, how):
    options = {"judge": Judge(scoring="expected_score" if how == "pairwise" else how, pairwise=how == "pairwise",
                              exclude_self=how != "generated")}
    whole, all_asked = finished(tmp_path / "whole", monkeypatch, **options)
    assert len({(name, request.key) for name, request in all_asked}) == len(all_asked)
    dump = whole.pool.dump()
    assert dump["scores"] and bool(dump["comparisons"]) == (how == "pairwise")
    for deaths, order in (((0,), 1), ((1,), 2), ((2, 1), 3)):
        run, asked_here = finished(tmp_path / f"killed-{order}", monkeypatch, deaths, order, **options)
        assert run.pool.dump() == dump
        assert {(name, request) for name, request in asked_here} == set(all_asked)


def test_what_is_saved_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("synth.pool.writer.BATCH", 2)
    run = make_run(tmp_path, ["base"])
    fill_pool(run, CHATS, {"base": ANSWERS["base"]})
    engine = FakeEngine("base", choose=scripted, results=4, window=0)
    install(monkeypatch, base=engine)
    with pytest.raises(UserError, match="died"):
        judge(run)
    saved = set(scores(run))
    assert len(saved) == 4 and not run.done("judge")
    before, engine.results = len(engine.requests), None
    judge(run)
    assert {(*request.key, "base") for request in engine.requests[before:]} == set(scores(run)) - saved and len(scores(run)) == 6


def test_pages_of_answers_are_read_once_each(tmp_path, monkeypatch):
    run = make_run(tmp_path, ["base"])
    fill_pool(run, [f"Question {i}" for i in range(30)], {"base": [["a", "b", "c"]] * 30})
    for page in (1, 7, 90, 1000):
        monkeypatch.setattr("synth.stages.judge.PAGE", page)
        engine = FakeEngine("base", choose=lambda request: SURE[3], window=0)
        install(monkeypatch, base=engine)
        judge(run)
        assert [request.key for request in engine.requests] == [(i, "base", k) for i in range(30) for k in range(3)]
        run.stop_engine()
        run.pool.connection.execute("DELETE FROM scores")


# ---------------------------------------------------------------- settings and order of stages


def test_answers_come_before_scores(tmp_path):
    run = make_run(tmp_path)
    fill_pool(run, CHATS, done=("clean",))
    with pytest.raises(UserError, match="expected stage respond to have ended"):
        judge(run)


@pytest.mark.parametrize(("change", "name"), [({"judge": Judge(scoring="generated")}, "judge.max_tokens"),
                                              ({"judges": [Model(BASE, name="base")]}, "judge.judges")])
def test_changed_settings_are_refused(tmp_path, monkeypatch, change, name):
    run, _ = finished(tmp_path, monkeypatch)
    run.pool.connection.close()
    with pytest.raises(UserError, match=f"^{name}: this pool was made with"):
        judge(make_run(tmp_path, ["base", "other"], **change))


def test_pairs_may_be_compared_later_without_new_scores(tmp_path, monkeypatch):
    run, _ = finished(tmp_path, monkeypatch)
    before = scores(run)
    run.pool.connection.close()
    again = make_run(tmp_path, ["base", "other"], judge=Judge(pairwise=True))
    judge(again)
    assert scores(again) == before and again.pool.select("SELECT 1 FROM comparisons")
    again.config.judge.calibrate_judges = False
    with pytest.raises(UserError, match="pairwise.calibrate_judges: this pool was made with True"):
        judge(again)


# ---------------------------------------------------------------- pairs


def test_the_two_best_are_shown_in_both_orders_to_judges_that_wrote_neither(tmp_path, monkeypatch):
    grades = {"4": 5, "four": 4, "5": 1, "vier": 1, "Rhine": 5, "Oslo": 1, "Nile": 2, "Po": 3}
    run = make_run(tmp_path, ["base", "other", "third"], judge=Judge(pairwise=True, calibrate_judges=False))
    answers = {"base": [["4", "5"], ["Rhine", "Oslo"]], "other": [["four"], ["Nile"]], "third": [["vier"], ["Po"]]}
    fill_pool(run, CHATS[:2], answers)

    def choose(request):
        if len(request.choices) == 2:
            return (0.6, 0.2)
        item, model, sample = request.key
        return SURE[grades[answers[model][item][sample]]]

    engines = {name: FakeEngine(name, choose=choose) for name in answers}
    install(monkeypatch, **engines)
    judge(run)
    assert sorted(run.pool.select("SELECT * FROM comparisons")) == [
        (0, "base", 0, "other", 0, "third", pytest.approx(0.75), pytest.approx(0.8), None),
        (0, "other", 0, "base", 0, "third", pytest.approx(0.75), pytest.approx(0.8), None),
        (1, "base", 0, "third", 0, "other", pytest.approx(0.75), pytest.approx(0.8), None),
        (1, "third", 0, "base", 0, "other", pytest.approx(0.75), pytest.approx(0.8), None)]
    request = next(r for r in engines["third"].requests if r.key == (0, "other", 0, "base", 0))
    assert request.choices == ("A", "B")
    assert fill_placeholders(PAIRWISE_PROMPT, instruction="What is 2 + 2?", first="four", second="4") in words(run, request)


def test_where_both_judges_wrote_both_answers_compare(tmp_path, monkeypatch):
    run, _ = finished(tmp_path, monkeypatch, judge=Judge(pairwise=True))
    rows = run.pool.select("SELECT item, model, sample, other_model, other_sample, judge FROM comparisons")
    by_item = {item: [row[1:] for row in rows if row[0] == item] for item in range(3)}
    for found in by_item.values():
        a, b = found[0][:2], found[0][2:4]
        expected = {"base", "other"} if {a[0], b[0]} == {"base", "other"} else {"base", "other"} - {a[0], b[0]}
        assert sorted(found) == sorted((*x, *y, judge) for judge in expected for x, y in ((a, b), (b, a)))


def test_equal_texts_are_not_compared(tmp_path, monkeypatch):
    run = make_run(tmp_path, ["base"], judge=Judge(pairwise=True))
    fill_pool(run, CHATS[:2], {"base": [["4", "4"], ["Rhine", "Rhine", "Po"]]})
    marks = {"4": 5, "Rhine": 5, "Po": 2}
    texts = {(0, 0): "4", (0, 1): "4", (1, 0): "Rhine", (1, 1): "Rhine", (1, 2): "Po"}
    install(monkeypatch, base=FakeEngine("base", choose=lambda r: (0.5, 0.5) if len(r.choices) == 2 else
                                         SURE[marks[texts[r.key[0], r.key[2]]]]))
    judge(run)
    rows = run.pool.select("SELECT item, sample, other_sample FROM comparisons")
    assert {row[0] for row in rows} == {1} and all(2 in row[1:] for row in rows) and len(rows) == 2


# ---------------------------------------------------------------- a real engine


@pytest.mark.slow
@pytest.mark.parametrize("how", ["expected_score", "generated"])
def test_the_miniature_judges_with_a_real_engine(tmp_path, how):
    """Scores of the engine are those of the model's own forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    own = tmp_path / "rubric.txt"
    own.write_text("Rate 1-5\n{instruction}\n{response}")
    model = Model(BASE, name="base", engine="transformers", dtype="float32")
    run = make_run(tmp_path / "run", judge=Judge(rubric=str(own), scoring=how, max_tokens=8), base=model)
    fill_pool(run, ["Reverse abc"], {"base": [["cba", "cab"]]})
    judge(run)
    rows = run.pool.select("SELECT sample, score, mass, text, reason FROM scores ORDER BY sample")
    if how == "generated":
        assert all(score is None and reason for _, score, _, _, reason in rows) and len(rows) == 2
        return
    network = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    format = run.format(model)
    for (_, score, mass, _, reason), response in zip(rows, ("cba", "cab")):
        ids = format.choice_prompt([{"role": "user", "content": f"Rate 1-5\nReverse abc\n{response}"}], "12345").token_ids
        with torch.no_grad():
            probabilities = network(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        digits = [probabilities[format._ids(str(d))[0]].item() for d in range(1, 6)]
        assert mass == pytest.approx(sum(digits), rel=1e-3) and reason is None
        assert score == pytest.approx(sum(d * p for d, p in enumerate(digits, 1)) / sum(digits), rel=1e-3)


def test_the_pool_keeps_the_rubrics_text_and_its_hash(tmp_path, monkeypatch):
    run, _ = finished(tmp_path, monkeypatch)
    assert run.pool.get("settings.judge")["rubric"] == hashlib.sha256(EXPECTED_SCORE_RUBRIC.encode()).hexdigest()[:16]
    assert run.pool.get("rubric") == EXPECTED_SCORE_RUBRIC
