"""Tasks of lm-evaluation-harness: figures of its records, and a local task run offline."""

import importlib.util
import json

import pytest

from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, write_jsonl
from trainer.cli import parse
from trainer.config import Lora
from trainer.errors import UserError
from trainer.evaluate import evaluate
from trainer.evaluation.config import Config
from trainer.evaluation.harness import collect_scores, task_figures, task_names
from trainer.model.export import save_adapter
from trainer.model.lora import add_adapter

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval (the `eval` extra) is not installed")


def test_tasks_are_a_list_or_names_with_commas():
    assert task_names(Config(tasks="a, b")) == task_names(Config(tasks=["a", "b"])) == ["a", "b"] and task_names(Config()) == []


def test_records_become_paired_figures():
    def documents(values):
        return [{"doc_id": i, "filter": "none", "metrics": ["acc", "nll", "f1"], "acc": a, "nll": -a, "f1": (1, 2)}
                for i, a in enumerate(values)]

    scores = {"base": collect_scores({"t": documents([1.0, 1.0, 0.0, 1.0])}),
              "model": collect_scores({"t": documents([1.0, 0.0, 1.0, 0.0])})}
    marks, means = task_figures(scores, Config())
    assert (marks["task"], marks["metric"], marks["items"]) == ("t", "acc", 4)
    assert (marks["base"]["accuracy"], marks["model"]["accuracy"]) == (0.75, 0.5)
    assert (marks["change"]["lost"], marks["change"]["gained"], marks["change"]["p"]) == (2, 1, 1)
    assert means["metric"] == "nll" and means["change"]["difference"] == pytest.approx(0.25) and "mean" in means["model"]


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATED = """\
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""


@installed
def test_a_local_task_agrees_with_our_own_scores(tmp_path, monkeypatch):
    """Score the same questions as a task and as item files: the same answers are right."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = add_adapter(AutoModelForCausalLM.from_pretrained(str(FAMILY["base"].folder), dtype="float32"), Lora(rank=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.12)
    save_adapter(model, tmp_path / "adapter")
    items = heldout_items(GENERAL, 2)
    rows = [{"question": i.instruction, "choices": [i.answer, i.answer[::-1] + "s", i.answer * 2], "answer": 0} for i in items]
    data = write_jsonl(rows, tmp_path / "data.jsonl")
    write_jsonl([{"question": r["question"], "answer": r["choices"][0]} for r in rows], tmp_path / "exact.jsonl")
    (tmp_path / "tasks").mkdir()
    for name, rest in (("ours_choice", CHOICE), ("ours_generated", GENERATED)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data, rest=rest))
    found = evaluate(parse(Config, [
        "--adapter", str(tmp_path / "adapter"), "--tasks", "ours_choice,ours_generated", "--task_folder", str(tmp_path / "tasks"),
        "--harness.chat", "true", "--data.general", json.dumps([{"path": str(data)}, {"path": str(tmp_path / "exact.jsonl")}]),
        "--output", str(tmp_path / "out"), "--device", "cpu", "--generation.max_tokens", "24"], "trainer.evaluate"))
    choice, exact = found["files"]
    tasks = {(task["task"], task["metric"]): task for task in found["tasks"]}
    assert len(tasks) == 3
    for task, ours in ((tasks["ours_choice", "acc"], choice), (tasks["ours_generated", "exact_match"], exact)):
        assert task["items"] == len(items) and task["base"]["accuracy"] == ours["base"]["accuracy"]
        assert {k: task["change"][k] for k in ("lost", "gained", "p")} == {k: ours["change"][k] for k in ("lost", "gained", "p")}
    assert tasks["ours_choice", "acc_norm"]["model"]["accuracy"] == choice["model"]["accuracy_by"]["characters"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert sum("task" in line for line in lines) == 3 * len(items)


@installed
def test_unknown_tasks_and_folders(tmp_path):
    arguments = ["--model.path", str(FAMILY["base"].folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    for more, expected in ((["--tasks", "no_such_task"], "tasks: expected tasks of lm-evaluation-harness, got no_such_task; "),
                           (["--tasks", "a", "--task_folder", str(tmp_path / "none")], "task_folder: expected a folder with task files")):
        with pytest.raises(UserError, match=expected):
            evaluate(parse(Config, arguments + more, "trainer.evaluate"))
