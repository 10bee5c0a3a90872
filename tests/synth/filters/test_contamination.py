"""Test that evaluation items are found where they were planted and nowhere else, in every file format."""

import json

import numpy as np
import pytest
from datasets import Dataset

from synth.engines.interface import Embedding, EmbeddingRequest, Failure
from synth.filters.contamination import EvaluationItem, NgramIndex, NgramMatch, find_similar, fingerprint, read_items
from tests.helpers import real_prompts
from trainer.errors import UserError

QUESTION = "A train leaves the old station at nine and reaches the harbour two hours later; how fast does it travel on average?"


def phrases(*texts, n=13):
    return NgramIndex([EvaluationItem(f"exam, line {i}", text) for i, text in enumerate(texts, 1)], n)


@pytest.mark.parametrize("text, shared", [
    (QUESTION, 13),
    ("Solve this. " + QUESTION.upper().replace(",", "") + " Think first.", 13),
    ("I heard that a train leaves the old station at nine and reaches the harbour two times a day.", 13),
    ("I heard that a train leaves the old station at nine and reaches the port", 0),
])
def test_thirteen_words_in_a_row(text, shared):
    found = phrases("Another question of more than thirteen words, so that a second item stands beside it.", QUESTION).find(text)
    assert (found is not None) == bool(shared)
    if found:
        assert found == NgramMatch("exam, line 2", "a train leaves the old station at nine and reaches the harbour two")


def test_a_shorter_item_counts_whole_and_a_trivial_one_alone():
    found = phrases("What is the capital of Peru?", "Say hello!")
    assert found.find("Tell me: what is the capital of Peru, and why?") == NgramMatch("exam, line 1", "what is the capital of peru")
    assert found.find("What is the capital of Chile?") is None
    assert found.find("SAY HELLO") == NgramMatch("exam, line 2", "say hello")
    assert found.find("Please say hello to him.") is None
    assert found.find("") is None and phrases("?!", "").find("") is None


def test_ideographs_count_half():
    item = "请用三百字以内的篇幅说明为什么天空在白天看起来是蓝色的而在傍晚看起来是红色的"
    found = phrases(item, "你好吗")
    assert found.find("老师问:" + item[:26]) is not None and found.find("老师问:" + item[:25]) is None
    assert found.find("你好吗?") == NgramMatch("exam, line 2", "你 好 吗") and found.find("你好吗小明") is None


def test_planted_items_are_found_and_real_prompts_are_not():
    exam, prompts = real_prompts.prompts("gsm8k_test"), real_prompts.prompts("gsm8k_train", "self_instruct_seed_tasks")
    known = NgramIndex(read_items(str(real_prompts.path("gsm8k_test"))), 13)
    for n, text in enumerate(exam, 1):
        assert known.find(f"Help me with my homework:\n{text}\nAnswer in one line.") is not None
        assert known.places[n - 1].endswith(f"gsm8k_test.jsonl, line {n}")
    found = [known.find(text).words for text in prompts if known.find(text)]
    assert len(prompts) == 7648 and len(found) == 4  # problems of the training set that the test set tells with other numbers
    assert "bought stamps at the post office some of the stamps had a snowflake" in found


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"}]


@pytest.mark.parametrize("row, texts", [
    ({"question": "Why?", "answer": "So."}, ["Why?"]),
    ({"QUESTION": "Why?", "CONTEXTS": ["a"]}, ["Why?"]),
    ({"messages": CHAT}, ["One?", "Two?"]),
    ({"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Yes."}]}, ["One?"]),
    ({"prompt": CHAT, "completion": CHAT[:1]}, ["One?", "Two?"]),
    ({"prompt": "Why?", "completion": ""}, ["Why?"]),
    ({"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}, ["Translate.\n\nGuten Tag"]),
    ({"instruction": "Translate.", "input": ""}, ["Translate."]),
    ({"text": "All of it."}, ["All of it."]),
])
def test_what_a_file_asks(tmp_path, row, texts):
    (tmp_path / "exam.jsonl").write_text("\n" + json.dumps(row))
    path = str(tmp_path / "exam.jsonl")
    assert list(read_items(path)) == [EvaluationItem(f"{path}, line 2", text) for text in texts]
    (tmp_path / "exam.json").write_text(json.dumps([row]))
    assert [item.text for item in read_items(str(tmp_path / "exam.json"))] == texts


def test_a_saved_folder_is_read_too(tmp_path):
    Dataset.from_list([{"messages": CHAT[1:3]}]).save_to_disk(str(tmp_path / "exam"))
    assert [item.text for item in read_items(str(tmp_path / "exam"))] == ["One?"]


@pytest.mark.parametrize("content, complaint", [
    (None, "expected a file .* found no such file"),
    ('{"ctx": "x"}', "exam.jsonl, line 1: expected one of the columns messages, .* got ctx; rename one"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "exam.jsonl, line 1: turn 1: expected a role"),
    ('{"question"', "exam.jsonl, line 1: expected one JSON object"),
])
def test_files_that_cannot_be_read(tmp_path, content, complaint):
    if content:
        (tmp_path / "exam.jsonl").write_text(content)
    with pytest.raises(UserError, match=complaint) as error:
        list(read_items(str(tmp_path / "exam.jsonl")))
    assert "\n" not in str(error.value)


def test_a_fingerprint_changes_with_the_content(tmp_path):
    found = []
    for text in ("a", "b", "a"):
        (tmp_path / "exam.jsonl").write_text(text)
        found.append(fingerprint(str(tmp_path / "exam.jsonl")))
    assert found[0] == found[2] != found[1] and fingerprint("owner/name") == "owner/name"


def test_the_nearest_item_by_embeddings_is_that_of_all_cosines():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3000, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items, instructions = range(40), range(40, 3000)

    def embed(requests):
        """Results in another order than requests, and one that cannot be had."""
        for request in sorted(requests, key=lambda request: -request.token_ids[0]):
            assert isinstance(request, EmbeddingRequest)
            n, = request.token_ids
            yield Failure(request.key, "too long") if n == 50 else Embedding(request.key, tuple(vectors[n]))

    found = list(find_similar(embed, [(i,) for i in items], ((i, (i,)) for i in instructions), 0.9))
    cosines = vectors[40:] @ vectors[:40].T
    cosines[50 - 40] = 0
    expected = {40 + i: int(row.argmax()) for i, row in enumerate(cosines) if row.max() >= 0.9}
    assert {near.key: near.item for near in found} == expected and 0 < len(expected) < 3000
    assert all(near.cosine == pytest.approx(cosines[near.key - 40, near.item], abs=1e-6) for near in found)
    assert list(find_similar(embed, [(50,)], [(41, (41,))], 0.0)) == [] == list(find_similar(embed, [], [(41, (41,))], 0.0))
