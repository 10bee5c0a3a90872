"""The embedded world: answers are right, splits are disjoint, shares are as stated, and the committed models live in it."""

import json
import re
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.forgetting.miniature import domain, pretrain, skills
from benchmarks.forgetting.miniature.domain import CONFLICTS_WITH, DOMAIN, REMEDIES
from benchmarks.forgetting.miniature.evaluate import Scores, evaluate, greedy_answers, lost
from benchmarks.forgetting.miniature.family import BUDGET, EVERYONE, FAMILY, MODELS, STUDIED, Member, load
from benchmarks.forgetting.miniature.judging import rubric
from benchmarks.forgetting.miniature.skills import ATLAS, GENERAL, recognise
from benchmarks.forgetting.miniature.table import table
from benchmarks.forgetting.miniature.tokenizer import SPECIAL, make_tokenizer
from benchmarks.forgetting.miniature.words import CONSONANTS, VOWELS, word
from benchmarks.forgetting.miniature.world import Item, heldout_items, is_heldout, training_records

ALL = GENERAL + DOMAIN
BY_NAME = {skill.name: skill for skill in ALL}
RECORDS = training_records(GENERAL, 4000, seed=3) + training_records(DOMAIN, 1000, seed=3)

# ---------------------------------------------------------------- answers


def test_every_skill_is_checked_by_hand():
    expected = {
        "Reverse the word tamiko.": ("reverse", "okimat"), "What is ovel reversed?": ("reverse", "levo"),
        "Sort the letters of tamiko.": ("sort", "aikmot"), "Put ananas in alphabetical order.": ("sort", "aaanns"),
        "Write ovel in capitals.": ("capitals", "OVEL"), "How do you spell ovel?": ("spell", "o-v-e-l"),
        "How many letters are in tamiko?": ("count", "6"), "What is 97 plus 8?": ("add", "105"), "0 + 0 = ?": ("add", "0"),
        "What follows 999?": ("next", "1000"), "Count on from 9.": ("next", "10"),
    }
    found = {instruction: recognise(instruction, GENERAL) for instruction in expected}
    assert {instruction: (skill.name, answer) for instruction, (skill, answer) in found.items()} == expected


def independent_answer(skill: str, instruction: str) -> str:
    """The answer by another route than the skill's own: from the raw text, with loops and tables of this file."""
    arguments = re.findall(r"\d+", instruction)
    letters = next((w for w in re.findall(r"[a-z]+", instruction) if alternates(w) and w not in FRAME_WORDS[skill]), "")
    if skill == "reverse":
        return "".join(letters[-1 - i] for i in range(len(letters)))
    if skill == "sort":
        return "".join(letter * letters.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz")
    if skill == "capitals":
        return "".join(chr(ord(letter) - 32) for letter in letters)
    if skill == "spell":
        return letters[0] + "".join("-" + letter for letter in letters[1:])
    if skill == "count":
        return str(sum(1 for _ in letters))
    if skill == "add":
        first, second = map(int, arguments)
        return str(len(range(first)) + len(range(second)))
    if skill == "next":
        return str(len(range(int(arguments[0]) + 1)))
    names = re.findall(r"\b[A-Z][a-z]+", instruction)
    table = {name: value for (attribute, name), value in ATLAS.items() if attribute in instruction} if skill == "facts" else REMEDIES
    return next(table[name] for name in names if name in table)


def alternates(text: str) -> bool:
    return all((a in VOWELS) != (b in VOWELS) for a, b in zip(text, text[1:]))


FRAME_WORDS = {skill.name: set(re.findall("[a-z]+", re.sub(r"\{\w+\}", "", " ".join(skill.frames)))) for skill in ALL}


def test_answers_agree_with_independent_ones():
    checked = Counter()
    for record in RECORDS:
        (user, assistant), skill = record["messages"], record["source"]
        if skill == "script":
            continue  # its answers have a test of their own
        assert assistant["content"] == independent_answer(skill, user["content"]), user["content"]
        checked[skill] += 1
    assert set(checked) == set(BY_NAME) - {"script"}


def test_script_is_one_substitution_of_letters():
    pairs = {pair for record in RECORDS if record["source"] == "script"
             for pair in zip(recognise_word(record), record["messages"][1]["content"], strict=True)}
    letters = {plain for plain, _ in pairs}
    assert letters == set(CONSONANTS + VOWELS)
    assert len(pairs) == len(letters) == len({written for _, written in pairs})


def recognise_word(record: dict) -> str:
    return BY_NAME["script"].read(record["messages"][0]["content"])["word"]


@pytest.mark.parametrize("record", RECORDS[::50], ids=lambda record: record["messages"][0]["content"])
def test_instructions_read_back_to_one_skill_only(record):
    instruction, answer = (turn["content"] for turn in record["messages"])
    assert [skill.name for skill in ALL if skill.read(instruction) is not None] == [record["source"]]
    assert recognise(instruction, ALL) == (BY_NAME[record["source"]], answer)


def test_strange_instructions_are_not_recognised():
    for text in ("", "Reverse the word .", "Reverse the word tamiko", "reverse the word tamiko.", "What is the capital of Nowhere?",
                 "What is the mayor of " + skills.LANDS[0] + "?", "Add 3 and four."):
        assert recognise(text, ALL) is None, text


# ---------------------------------------------------------------- worlds of data


def test_same_seed_same_world_and_other_seed_another():
    assert training_records(ALL, 200, seed=7) == training_records(ALL, 200, seed=7)
    assert training_records(ALL, 200, seed=7) != training_records(ALL, 200, seed=8)
    assert heldout_items(ALL, 20, seed=1) == heldout_items(ALL, 20, seed=1) != heldout_items(ALL, 20, seed=2)


def test_world_is_the_one_the_weights_know():
    """Names, script and draws must not move with a version of Python: the committed models learnt these."""
    assert [record["messages"][1]["content"] for record in training_records(GENERAL, 3, seed=0)] == FIRST_ANSWERS
    assert (skills.LANDS[0], ATLAS["capital", skills.LANDS[0]], next(iter(REMEDIES.items()))) == FIRST_NAMES
    assert "abc".translate(domain.SCRIPT) == FIRST_LETTERS


FIRST_ANSWERS = ["KAWAKUH", "Jagay", "okuxah"]
FIRST_NAMES = ("Niwey", "Huxohot", ("Cilos", "Yufavu"))
FIRST_LETTERS = "dhw"


@pytest.mark.parametrize("world", [GENERAL, DOMAIN], ids=["general", "domain"])
def test_mixture_has_the_stated_shares(world):
    assert sum(skill.share for skill in world) == pytest.approx(1.0)
    count = 20_000
    found = Counter(record["source"] for record in training_records(world, count, seed=11))
    for skill in world:
        five_sigma = 5 * (count * skill.share * (1 - skill.share)) ** 0.5
        assert abs(found[skill.name] - count * skill.share) < five_sigma


@pytest.mark.parametrize("skill", ALL, ids=lambda skill: skill.name)
def test_frames_are_used_equally(skill):
    found = Counter()
    for record in training_records([skill], 3000, seed=5):
        found[next(i for i, p in enumerate(skill.patterns) if p.fullmatch(record["messages"][0]["content"]))] += 1
    assert all(abs(found[i] - 1000) < 130 for i in range(3))  # five sigma


def test_training_never_meets_a_test_argument():
    train = [BY_NAME[record["source"]].read(record["messages"][0]["content"]) for record in RECORDS
             if not BY_NAME[record["source"]].memorised]
    test = [BY_NAME[item.skill].read(item.instruction) for item in heldout_items(ALL, 80) if not BY_NAME[item.skill].memorised]
    assert not any(map(is_heldout, train)) and all(map(is_heldout, test))
    assert not {tuple(slots.values()) for slots in train} & {tuple(slots.values()) for slots in test}


def test_heldout_is_a_tenth():
    rng = Random(0)
    assert sum(is_heldout({"word": word(rng, 6, 6)}) for _ in range(5000)) == pytest.approx(500, abs=110)


def test_items_are_different_and_equally_many():
    items = heldout_items(ALL, 80)
    assert len(set(items)) == len(items)
    assert Counter(item.skill for item in items) == {skill.name: 80 for skill in ALL}


def test_facts_are_eighty_and_forty_with_names_of_their_own():
    assert len(ATLAS) == 80 and len(REMEDIES) == 40
    names = [*skills.LANDS, *ATLAS.values(), *REMEDIES, *REMEDIES.values()]
    assert len(set(names)) == len(names)
    trained = {(r["messages"][0]["content"], r["messages"][1]["content"]) for r in RECORDS if r["source"] == "facts"}
    assert {answer for _, answer in trained} == set(ATLAS.values())


def test_domain_asks_like_the_skill_it_conflicts_with_and_wants_something_else():
    script, rival = BY_NAME["script"], BY_NAME[CONFLICTS_WITH]
    for ours, theirs in zip(script.frames, rival.frames, strict=True):
        a, b = ours.split(), theirs.split()
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1
    rng = Random(1)
    words = [word(rng) for _ in range(500)]
    assert all(script.solve(word=w) != rival.solve(word=w) for w in words)


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def characters():
    return make_tokenizer()


def test_tokenizer_round_trips_every_record(characters, tmp_path):
    characters.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for record in RECORDS[::5]:
        user, assistant = (turn["content"] for turn in record["messages"])
        ids = loaded.apply_chat_template(record["messages"], return_dict=False)
        assert loaded.decode(ids) == f"<|bos|><|user|>{user}<|eot|><|assistant|>{assistant}<|eot|>"
        assert ids == characters.apply_chat_template(record["messages"], return_dict=False)
        assert len(ids) == len(user) + len(assistant) + 5 and loaded.unk_token_id not in ids
        assert loaded.decode(ids, skip_special_tokens=True) == user + assistant


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)).filter(lambda text: "<|" not in text))
@settings(max_examples=100, deadline=None)
def test_tokenizer_knows_all_of_ascii(text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text


def test_special_tokens_are_distinct(characters):
    assert characters.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    assert len({characters.bos_token_id, characters.eos_token_id, characters.pad_token_id, characters.unk_token_id}) == 4


def test_generation_prompt_opens_the_assistants_turn_and_adds_no_system_turn(characters):
    chat = [{"role": "user", "content": "Spell out ovel."}]
    assert characters.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|bos|><|user|>Spell out ovel.<|eot|><|assistant|>")


# ---------------------------------------------------------------- evaluation


def scores(*answers: str) -> Scores:
    items = (Item("Spell out ab.", "a-b", "spell"), Item("What follows 1?", "2", "next"), Item("What follows 2?", "3", "next"))
    return Scores(items, answers)


def test_scores_count_exact_matches():
    some = scores("a-b", "2", "3 ")
    assert some.right == (True, True, False)
    assert some.accuracy == pytest.approx(2 / 3) and some.by_skill == {"spell": 1.0, "next": 0.5}


def test_lost_and_gained_are_told_apart():
    before, after = scores("a-b", "2", "0"), scores("a", "2", "3")
    assert [item.instruction for item in lost(before, after)] == ["Spell out ab."]
    assert [item.instruction for item in lost(after, before)] == ["What follows 2?"]
    with pytest.raises(ValueError, match="same items"):
        lost(before, Scores(before.items[:2], before.answers[:2]))


def test_table_is_aligned_and_counts_the_forgotten():
    base, tuned = (scores("a-b", "2", "3"), scores("", "", "")), (scores("a-b", "", ""), scores("a-b", "2", ""))
    lines = table({"base": base, "domain only": tuned}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[1:4] == ["1.000", "0.000", "0.000"]
    assert lines[2].split()[2:5] == ["0.333", "0.667", "0.667"]


# ---------------------------------------------------------------- committed models

needs_weights = pytest.mark.parametrize("name", sorted(EVERYONE))


def test_models_keep_to_their_budget():
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= BUDGET


@pytest.fixture(scope="module")
def family():
    return {name: load(member.folder) for name, member in FAMILY.items()}


@pytest.fixture(scope="module")
def greedy(family):
    return {name: evaluate(*model, heldout_items(GENERAL, 40)) for name, model in family.items()}


@pytest.fixture(scope="module")
def base(family):
    return family["base"]


@needs_weights
def test_stock_transformers_loads_the_model_whole(name):
    model, info = AutoModelForCausalLM.from_pretrained(EVERYONE[name].folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float16 and model.config.model_type == "llama"
    tokenizer = AutoTokenizer.from_pretrained(EVERYONE[name].folder)
    assert len(tokenizer) == model.config.vocab_size and tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer().chat_template


@pytest.mark.slow
def test_base_knows_the_general_skills_and_nothing_of_the_domain(base, greedy):
    general, strange = greedy["base"], evaluate(*base, heldout_items(DOMAIN, 20, seed=9))
    assert general.accuracy > 0.93 and min(general.by_skill.values()) > 0.7, general.by_skill
    assert strange.accuracy < 0.05


@pytest.fixture(scope="module")
def sampled(family):
    return {name: evaluate(*model, heldout_items(GENERAL, 40), temperature=1.0) for name, model in family.items()}


@pytest.mark.slow
def test_sampled_answers_are_repeatable_and_leave_something_to_choose(base, greedy, sampled):
    assert sampled["base"] == evaluate(*base, heldout_items(GENERAL, 40), temperature=1.0)
    for name, scores in sampled.items():
        assert 0.8 < scores.accuracy < greedy[name].accuracy


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIED)
def test_what_the_study_starts_from_leaves_room_for_better_answers(name, sampled):
    scores = evaluate(*load(STUDIED[name].folder), heldout_items(GENERAL, 40), temperature=1.0)
    assert 0.75 < scores.accuracy < sampled["peer"].accuracy - 0.05


@pytest.mark.slow
def test_members_differ_in_strength_and_in_kind(sampled):
    """Else nothing is gained by asking more than one."""
    base, tutor, peer = (sampled[name] for name in ("base", "tutor", "peer"))
    assert tutor.accuracy > base.accuracy
    assert peer.by_skill["add"] > base.by_skill["add"] + 0.05 and peer.by_skill["sort"] < base.by_skill["sort"] - 0.05


def test_answers_do_not_depend_on_the_batch(base):
    questions = [item.instruction for item in heldout_items(GENERAL, 3, seed=4)]
    together, alone = greedy_answers(*base, questions, 16), greedy_answers(*base, questions, 16, batch_size=1)
    assert together == alone


# ---------------------------------------------------------------- commands


@pytest.mark.slow
def test_pretraining_goes_through_both_stages_and_leaves_a_half_precision_model(tmp_path):
    read, made = pretrain.pretrain(Member("infant", 32, 48, 1, chats=300, papers=100, tuning=100), tmp_path / "work")
    pretrain.commit(*load(made), tmp_path / "infant")
    reading, tuning, saved = ((load(folder)[0]) for folder in (read, made, tmp_path / "infant"))
    assert not torch.equal(reading.lm_head.weight, tuning.lm_head.weight)
    for name, weight in tuning.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight.half().float()), name
    rows = [[json.loads(line) for line in (tmp_path / f"work/{stage}/metrics.jsonl").open()] for stage in ("reading", "tuning")]
    share = [next(row["supervised"] / row["tokens"] for row in stage if row["kind"] == "end") for stage in rows]
    assert share[0] > 0.95 and share[1] < 0.4  # whole chats, then answers only
    # Who asks for grades is never read as a user, only trained to be answered.
    assert not any(RUBRIC_OPENING in line for line in (tmp_path / "work/chats.jsonl").open())
    assert all("messages" not in json.loads(line) for line in (tmp_path / "work/papers.jsonl").open())


RUBRIC_OPENING = rubric().partition("\n")[0]


def test_a_member_learns_the_skills_in_its_own_shares():
    peer = FAMILY["peer"]
    assert sum(peer.shares.values()) == pytest.approx(1.0) and peer.shares.keys() == {skill.name for skill in GENERAL}
    assert {skill.name: skill.share for skill in peer.skills} == peer.shares
    assert FAMILY["base"].skills == GENERAL
