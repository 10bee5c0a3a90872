"""Test the stage clean: each drop and its reason, weights, and that the pool does not depend on order."""

import json
import random
import sqlite3
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth.config import Clean, Instruct
from synth.filters import ngrams
from synth.filters.rules import RULES
from synth.stages.clean import MIN_SHARE_CAP, balance_languages, cap_count, clean, thin_groups
from tests.helpers import real_prompts
from tests.helpers.synth_fakes import FakeEngine, fill, install, make_run
from trainer.errors import UserError

ENGLISH = "Could you please explain to me how vaccines work?"
GERMAN = "Kannst du mir bitte erklären, wie eine Wärmepumpe funktioniert?"
QUESTION = "A train leaves the old station at nine and reaches the harbour two hours later; how fast does it travel on average?"


def cleaned(folder, chats, instruct=None, seed=0, lines=None, **options):
    """A pool of these chats after the stage. `options` of Clean."""
    lines = [] if lines is None else lines
    run = make_run(folder, clean=Clean(**options), instruct=instruct or Instruct(), seed=seed, say=lines.append)
    if not run.pool.select("SELECT 1 FROM items LIMIT 1"):
        fill(run, chats, done=("probe", "instruct"))
    clean(run)
    return run


def drops(run):
    return {item: tuple(why) for item, *why in run.pool.select("SELECT item, reason, detail FROM drops WHERE stage = 'clean'")}


def traits(run):
    return {item: row for item, *row in run.pool.select("SELECT * FROM traits")}


@pytest.fixture
def exam(tmp_path):
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": QUESTION}))
    return str(tmp_path / "exam.jsonl")


# ---------------------------------------------------------------- rules


def test_each_rule_and_what_it_says(tmp_path, exam):
    lines = []
    chats = ["?", "x" * 300, "I am here. " * 20, GERMAN, f"Solve: {QUESTION}", ENGLISH, f" {ENGLISH.upper()}", "hi"]
    run = cleaned(tmp_path / "pool", chats, lines=lines, min_characters=2, max_characters=250, languages=["en"], contamination=[exam],
                  duplicates="drop")
    first, = {5, 6} - drops(run).keys()  # who stays is drawn
    assert drops(run) == {
        0: ("too short", "1 characters"),
        1: ("too long", "300 characters"),
        2: ("repetition", "one phrase makes up 0.97 of it"),
        3: ("language", "de"),
        4: ("contaminated", f"{exam}, line 1: a train leaves the old station at nine and reaches the harbour two"),
        11 - first: ("near-duplicate", "group of item 5: 1 of 2 kept"),
    }
    assert traits(run)[first] == ["en", 5, 1.0] and traits(run)[11 - first] == ["en", 5, 0.0]
    assert traits(run)[3] == ["de", None, 0.0] and traits(run)[7] == ["und", 7, 1.0]
    assert [chat.item for chat in run.pool.chats()] == [first, 7]
    assert lines[:-1] == [f"clean: dropped 1 of 8 items (12.5%): {rule}" for rule in RULES]
    assert lines[-1] == "clean: kept 2 of 8 items (25.0%), in 2 groups of near-duplicates"


def test_the_instruction_is_the_last_turn_and_contamination_is_sought_in_all_of_the_users(tmp_path, exam):
    chats = [["?", "What?", ENGLISH], [QUESTION, "60 km/h.", "And in miles?"], ["Hello", QUESTION, "Thanks for that."],
             [ENGLISH, "So.", "?"]]
    run = cleaned(tmp_path / "pool", chats, contamination=[exam])
    assert {item: reason for item, (reason, _) in drops(run).items()} == {1: "contaminated", 3: "too short"}


def test_items_that_were_not_sampled_whole_are_left_alone(tmp_path):
    run = make_run(tmp_path)
    fill(run, [ENGLISH, "hello", "hello"], done=("instruct",))
    with run.pool.transaction():
        run.pool.insert("items", [(3, 1.0, 1.0, None, 2)])
        run.pool.insert("turns", [(3, 0, "Half a chat", 3, "stop", -1.0, 0)])
        run.pool.insert("drops", [(1, "instruct", "empty", None)])
    clean(run)
    assert set(traits(run)) == {0, 2} and drops(run) == {} and run.done("clean")


def test_the_stage_before_must_have_ended(tmp_path):
    run = make_run(tmp_path)
    fill(run, [ENGLISH], done=("probe",))
    with pytest.raises(UserError, match="expected stage instruct to have ended"):
        clean(run)


@pytest.mark.parametrize("options, complaint", [
    ({"contamination": ["nowhere.jsonl"]}, "nowhere.jsonl: expected a file"),
    ({"languages": ["german"]}, "clean.languages: expected ISO 639-1 codes"),
    ({"instruct": Instruct(languages={"en": 2.0})}, "instruct.languages: expected shares"),
])
def test_mistakes_are_one_line_and_leave_the_pool(tmp_path, options, complaint):
    run = cleaned(tmp_path, [ENGLISH, "?"])
    before = run.pool.dump()
    with pytest.raises(UserError, match=complaint) as error:
        cleaned(tmp_path, [], **options)
    assert "\n" not in str(error.value) and run.pool.dump() == before


@pytest.mark.slow
def test_real_prompts_stay(tmp_path):
    texts = real_prompts.prompts(*real_prompts.COLUMNS)
    run = cleaned(tmp_path, texts)
    assert drops(run) == {} and len(traits(run)) == 9219  # defaults: no language, no evaluation
    rng = random.Random(0)
    chosen = rng.sample(range(len(texts)), 2000)
    run = cleaned(tmp_path / "english", [texts[i] for i in chosen], languages=["en"], contamination=[str(real_prompts.path("gsm8k_test"))])
    reasons = Counter(reason for reason, _ in drops(run).values())
    known = set(real_prompts.prompts("gsm8k_test"))
    planted = sum(texts[i] in known for i in chosen)
    assert planted > 200 and planted <= reasons["contaminated"] <= planted + 4
    assert reasons.keys() <= {"contaminated", "language"} and reasons["language"] <= 2


# ---------------------------------------------------------------- groups and weights


@given(st.dictionaries(st.integers(0, 500), st.integers(0, 8), max_size=60), st.integers(0, 2**62),
       st.sampled_from([("keep", 1), ("weight", 1), ("drop", 5), ("cap", 1), ("cap", 3), ("cap", 100)]))
def test_what_stays_of_a_group(named, seed, rule_and_cap):
    rule, cap = rule_and_cap
    groups = {item: min(i for i in named if named[i] == name) for item, name in named.items()}
    dropped, weights = thin_groups(groups, rule, cap, seed)
    assert dropped.keys() | weights.keys() == groups.keys() and not dropped.keys() & weights.keys()
    kept = Counter(groups[item] for item in weights)
    for first, size in Counter(groups.values()).items():
        most = {"keep": size, "weight": size, "drop": 1, "cap": cap}[rule]
        assert kept[first] == min(size, most)
        weight = 1 / size if rule == "weight" else 1.0
        assert all(weights[item] == weight for item in weights if groups[item] == first)
    shuffled = dict(random.Random(seed).sample(list(groups.items()), len(groups)))
    assert thin_groups(shuffled, rule, cap, seed) == (dropped, weights)


@pytest.mark.slow
def test_who_stays_is_drawn_and_not_the_first():
    groups = dict.fromkeys(range(1000), 0)
    found = [set(thin_groups(groups, "cap", 5, seed)[1]) for seed in range(200)]
    assert len({frozenset(kept) for kept in found}) == 200
    mean = sum(sum(kept) / 5 for kept in found) / len(found)
    assert abs(mean - 499.5) < 4 * 288.7 / (5 * 200) ** 0.5


@pytest.mark.parametrize("count, items, expected",
                         [(5, 100_000, 5), (1, 3, 1), (0.002, 4000, 8), (0.002, 100_000, 200), (0.002, 100, MIN_SHARE_CAP)])
def test_a_cap_is_a_number_or_a_share(count, items, expected):
    assert cap_count(count, items) == expected


def test_weights_bring_languages_to_their_shares(tmp_path):
    english = ["How do I bake a chocolate cake?", "Explain how a bicycle stays upright.", "Write a short poem about the autumn leaves.",
               "Why do birds fly south every winter?", "Why do birds fly south every winter?", "hi"]
    lines = []
    run = cleaned(tmp_path, [*english, GERMAN], Instruct(languages={"en": 0.5, "de": 0.4, "sw": 0.1}), lines=lines, duplicates="weight")
    found = traits(run)
    weights = {code: sum(weight for language, _, weight in found.values() if language == code) for code in ("en", "de", "und")}
    assert weights == {"en": pytest.approx(5 * 0.5 / 0.9), "de": pytest.approx(5 * 0.4 / 0.9), "und": 1.0}
    assert found[3] == found[4] == ["en", 3, found[0][2] / 2]
    assert "clean: instruct.languages: no item is in 'sw'; the other listed languages get its share" in lines
    assert balance_languages({0: 1.0}, {0: "en"}, {}) == {0: 1.0}


# ---------------------------------------------------------------- the same pool, however it came about


def test_the_order_of_writing_does_not_matter(tmp_path):
    rng = random.Random(0)
    years = (f"Tell me about the year {year}." for year in range(1900, 1960))
    texts = rng.choices(["hi", "Hello!", ENGLISH, GERMAN, "?", "loop " * 40, *years], k=300)
    found = []
    for name in ("a", "b"):
        run = make_run(tmp_path / name, clean=Clean(duplicates="cap", duplicate_cap=3))
        order = list(range(300))
        if name == "b":
            rng.shuffle(order)
        with run.pool.transaction():
            run.pool.insert("items", [(i, 1.0, 1.0, None, 1) for i in order])
            run.pool.insert("turns", [(i, 0, texts[i], 1, "stop", -1.0, 0) for i in order])
            run.pool.set("done.instruct", True)
        clean(run)
        found.append(run.pool.dump())
    assert found[0] == found[1]
    kept, dropped = {chat.item for chat in run.pool.chats()}, set(drops(run))
    assert kept | dropped == set(range(300)) and not kept & dropped
    assert {item for item, (_, _, weight) in traits(run).items() if weight > 0} == kept
    assert Counter(texts[item] for item in kept) == {text: min(count, 3) for text, count in Counter(texts).items() if text[0] not in "?l"}


def test_a_second_call_has_nothing_to_do(tmp_path, monkeypatch):
    run = cleaned(tmp_path, [ENGLISH, "hi", "?"])
    before = run.pool.dump()
    monkeypatch.setattr("synth.stages.clean.apply_rules", None)
    assert cleaned(tmp_path, []).pool.dump() == before


def test_other_settings_are_welcome_until_there_is_an_answer(tmp_path, exam):
    chats = [ENGLISH, "hi", "Hi", "?", GERMAN, QUESTION]
    changed = {"duplicates": "drop", "languages": ["en"], "contamination": [exam]}
    fresh = cleaned(tmp_path / "fresh", chats, **changed).pool.dump()
    cleaned(tmp_path / "pool", chats)
    run = cleaned(tmp_path / "pool", chats, **changed)
    assert run.pool.dump() == fresh
    with run.pool.transaction():
        run.pool.insert("responses", [(0, "base", 0, "So.", 2, "stop", None, None, None, 0, None)])
    before = run.pool.dump()
    cleaned(tmp_path / "pool", chats, **changed)
    for other in ({"duplicates": "keep"}, {"seed": 1}):
        with pytest.raises(UserError, match=f"clean.{[*other][0]}: this pool was made with .*; go on with those, or choose another output"):
            cleaned(tmp_path / "pool", chats, **changed | other)
    with open(exam, "a") as file:
        file.write("\n" + json.dumps({"question": "What else?"}))
    with pytest.raises(UserError, match="clean.contamination: this pool was made with"):
        cleaned(tmp_path / "pool", chats, **changed)
    assert run.pool.dump() == before


def test_a_stage_that_is_cut_short_leaves_what_was_there(tmp_path, monkeypatch):
    run = cleaned(tmp_path, [ENGLISH, "hi", "?"])
    before = run.pool.dump()
    with monkeypatch.context() as patch:
        patch.setattr("synth.pool.store.Pool.set", lambda *_: (_ for _ in ()).throw(sqlite3.IntegrityError("cut short")))
        with pytest.raises(sqlite3.IntegrityError):
            cleaned(tmp_path, [], duplicates="drop", min_characters=0)
    assert run.pool.dump() == before
    cleaned(tmp_path, [], duplicates="drop", min_characters=0)
    assert run.pool.dump() == cleaned(tmp_path / "fresh", [ENGLISH, "hi", "?"], duplicates="drop", min_characters=0).pool.dump()


# ---------------------------------------------------------------- embeddings


def test_what_the_base_puts_next_to_an_evaluation_item_is_out(tmp_path, exam, monkeypatch):
    """A base that sees nothing but how long a text is."""
    chats = [ENGLISH, "y" + QUESTION[1:], "y" + QUESTION[1:], QUESTION[:50], "?" * 30, QUESTION]
    lines, run = [], make_run(tmp_path / "x")
    opening = run.format(run.base).user_prompt(()).token_ids
    lengths = {len(opening) + len(run.tokenizer(run.base)(text).input_ids): len(text) for text in chats}

    def embed(request):
        assert request.token_ids[:len(opening)] == opening
        length = lengths[len(request.token_ids)]
        return ValueError("longer than the context") if length == 30 else (1.0, 0.0) if length == len(QUESTION) else (0.6, 0.8)

    base = FakeEngine("base", embed=embed)
    install(monkeypatch, base=base)
    run = cleaned(tmp_path / "pool", chats, lines=lines, contamination=[exam], contamination_cosine=0.9, contamination_ngram=50,
                  max_repetition=1.0)
    assert drops(run) == {1: ("contaminated", f"{exam}, line 1: cosine 1.000"), 2: ("contaminated", f"{exam}, line 1: cosine 1.000"),
                          5: ("contaminated", f"{exam}, line 1: {' '.join(ngrams.words(QUESTION))[:80]}")}
    assert len(base.requests) == 5 and base.started == 1  # the item and four texts; equal ones once
    assert "clean: contamination_cosine: 1 texts were not checked, they could not be embedded: longer than the context" in lines
    assert run.pool.select("SELECT * FROM models") == []
    run = cleaned(tmp_path / "looser", chats, contamination=[exam], contamination_cosine=0.6, max_repetition=1.0)
    assert set(drops(run)) == {0, 1, 2, 3, 5}


def test_no_engine_starts_without_need(tmp_path, exam, monkeypatch):
    install(monkeypatch)
    cleaned(tmp_path / "a", [ENGLISH], contamination_cosine=0.9)
    cleaned(tmp_path / "b", ["?"], contamination_cosine=0.9, contamination=[exam])


def test_heavy_libraries_are_imported_when_they_are_needed():
    code = "import sys, synth.filters.duplicates, synth.filters.language\nprint({'datasketch', 'py3langid', 'scipy',"
    code += " 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "set()\n"
