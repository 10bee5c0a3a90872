"""The suite that compares vLLM with the trainer: an adapter, an adapter with experts, a record's table."""

import pytest

from benchmarks.families import served
from benchmarks.families.served import is_served, largest_difference
from trainer.errors import UserError


@pytest.mark.slow(60)
def test_vllm_serves_what_was_trained():
    """Of a model that also sees, and of experts; an adapter without its wrapper's names would change nothing."""
    pytest.importorskip("vllm")
    rows = served.measure(["Gemma 3, multimodal", "Qwen3-MoE, experts too"])
    assert all(map(is_served, rows)) and all(row["base"] < 1e-4 for row in rows), rows


def row(**differences):
    return {"line": "Llama", "family": "llama", "dtype": "float32", "moved": 3.0, "base": 1e-6, "adapter": 1e-6, "merged": 1e-6,
            "why": None} | differences


@pytest.mark.parametrize(("differences", "expected"), [
    ({}, True), ({"adapter": 3.0}, False), ({"merged": 0.1}, False), ({"adapter": None, "why": "adapter: ValueError"}, False),
    ({"moved": 1e-5}, False),  # training that moves nothing shows nothing
])
def test_a_model_is_served_if_adapter_and_merged_model_give_the_trained_log_probs(differences, expected):
    assert is_served(row(**differences)) == expected
    assert served.status({"summary": [row(), row(**differences)]}) == int(not expected)


def test_a_failure_of_vllm_is_told_and_counts():
    trained = served.Trained([[-1.0, -2.0]], [[-3.0, -2.5]], [])
    made = served.compare("Llama", trained, {"off": [[-1.0, -2.0]], "on": [[-3.0, -2.25]]}, {"failed": "ValueError: no"})
    assert (made["moved"], made["base"], made["adapter"], made["merged"]) == (2.0, 0.0, 0.25, None)
    assert made["why"] == "merged: ValueError: no" and not is_served(made)
    table = served.table({"summary": [made]})
    assert table[1] == ["Llama", "float32", "2.00", "0.0e+00", "2.5e-01", "fails"]


def test_texts_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        largest_difference([[1.0]], [[1.0, 2.0]])


def test_an_unknown_model_is_refused(tmp_path):
    pytest.importorskip("vllm")
    arguments = type("Arguments", (), {"models": ["Lama"]})
    with pytest.raises(UserError, match="--models: expected some of Llama, .* got Lama"):
        served.run(arguments)


def test_processes_of_vllm_find_what_stands_in_for_absent_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(served, "absent_packages", lambda: ["torchvision"])
    environment = served.vllm_environment(tmp_path)
    assert (tmp_path / "path" / "torchvision.py").exists() and str(tmp_path / "path") in environment["PYTHONPATH"]
