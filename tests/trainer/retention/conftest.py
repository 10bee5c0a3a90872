"""The data of measured runs."""


import pytest

from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Domain and replay chats; 16 general items, which the base answers, and 8 domain items, which it does not."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(training_records(DOMAIN, 120, seed=0), folder / "domain.jsonl")
    write_jsonl(training_records(GENERAL, 60, seed=1), folder / "general.jsonl")
    for name, skills, each in (("kept", GENERAL, 2), ("learnt", DOMAIN, 4)):
        write_jsonl([{"prompt": item.instruction, "answer": item.answer} for item in heldout_items(skills, each)], folder / f"{name}.jsonl")
    write_jsonl([{"text": f"{item.instruction} {item.answer}"} for item in heldout_items(GENERAL, 1)], folder / "text.jsonl")
    return folder
