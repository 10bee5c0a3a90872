"""Verdicts of the gate on figures that are known."""

import json

import pytest

from trainer.evaluation import gate_report
from trainer.evaluation.config import GateConfig
from trainer.evaluation.gate_rules import verdicts
from trainer.evaluation.results import paired_figures
from trainer.evaluation.significance import wilson
from trainer.report import answers
from trainer.report.answers import Answers

BOOTSTRAP = {"confidence": 0.95, "draws": 200, "seed": 0}


def figures(role="general", name="a", kept=50, lost=0, gained=0, wrong=50, **more) -> dict:
    """Return the figures of a file, of which so many items are right under both models, and so on."""
    pairs = [(True, True)] * kept + [(True, False)] * lost + [(False, True)] * gained + [(False, False)] * wrong
    models = {}
    for model, right in (("base", kept + lost), ("model", kept + gained)):
        models[model] = {"accuracy": right / len(pairs), "accuracy_interval": list(wilson(right, len(pairs), 0.95))}
    return {"name": name, "role": role, "metric": "exact", "items": len(pairs), **models, "change": paired_figures(pairs, BOOTSTRAP) | more}


def heldout(role, change, low, high, name="text") -> dict:
    return {"name": name, "role": role, "metric": "logprob", "items": 9, "base": {}, "model": {},
            "change": {"logprob_per_token": change, "logprob_interval": [low, high]}}


def judged(*files, tasks=(), **gate):
    config = GateConfig()
    for key, value in gate.items():
        setattr(config.gate, key, value)
    results = {"model": "tuned", "base": "original", "confidence": 0.95, "files": list(files), "tasks": list(tasks),
               "roles": {}, "notes": []}
    return results, verdicts(results, config)


def broken(*files, **options) -> list[tuple[str, str]]:
    return [(verdict.file, verdict.rule) for verdict in judged(*files, **options)[1] if not verdict.passed]


@pytest.mark.parametrize("file, expected", [
    (figures(), []),
    (figures(lost=4, gained=3), []),
    (figures(lost=2, gained=40), []),
    (figures(kept=900, lost=30, gained=8, wrong=900), [("a", "McNemar")]),
    (figures(kept=30, lost=20, wrong=50), [("a", "interval"), ("a", "McNemar")]),
    (figures(kept=2, lost=4, wrong=0), [("a", "interval")]),  # too few items for McNemar
])
def test_a_general_file_may_not_lose(file, expected):
    assert broken(file) == expected


def test_answers_that_no_longer_end_break_a_rule_of_their_own():
    endless = paired_figures([(True, False)] * 30 + [(True, True)] * 70, BOOTSTRAP)
    assert broken(figures(ended=endless)) == [("a", "ended")]
    assert broken(figures(ended=paired_figures([(False, True)] * 30 + [(True, True)] * 70, BOOTSTRAP))) == []


def test_p_grows_with_the_number_of_files():
    """Holm: nine files that lost 6 items and none more, each p 0.03, are no evidence; one alone is."""
    lossy = [figures(name=str(i), kept=500, lost=6, wrong=500) for i in range(9)]
    assert broken(lossy[0]) == [("0", "McNemar")] and broken(*lossy) == []
    strong = figures(name="strong", kept=500, lost=15, wrong=500)
    assert broken(*lossy, strong) == [("strong", "McNemar")]


def test_text_may_lose_a_margin_of_its_log_prob():
    assert broken(heldout("general", -0.2, -0.3, -0.1)) == [("text", "log-prob")]
    assert broken(heldout("general", -0.2, -0.3, -0.1), logprob_margin=0.1) == broken(heldout("general", -0.2, -0.5, 0.1)) == []


def test_a_domain_file_must_gain_or_hold():
    assert broken(figures("domain", kept=20, gained=30)) == broken(heldout("domain", 0.3, 0.1, 0.5)) == []
    assert broken(figures("domain", gained=2)) == [("a", "gain")] and broken(heldout("domain", 0.1, -0.1, 0.3)) == [("text", "gain")]
    assert broken(figures("domain", gained=2), domain="hold") == []
    assert broken(figures("domain", kept=30, lost=20), domain="hold") == [("a", "interval"), ("a", "McNemar")]


def test_tasks_are_judged_by_their_marks():
    task = figures(kept=30, lost=20) | {"task": "t", "metric": "acc", "filter": "none"}
    perplexity = {"task": "t", "metric": "ppl", "filter": "none", "role": "general", "items": 3, "base": {}, "model": {},
                  "change": {"difference": 3.0, "difference_interval": [1.0, 4.0]}}
    assert broken(tasks=[task, perplexity]) == [("t (acc)", "interval"), ("t (acc)", "McNemar")]


def test_the_verdict_is_a_line_a_table_for_a_pull_request_and_json(tmp_path):
    results, found = judged(figures(name="a|b"), figures(name="c", kept=30, lost=20))
    answers.write(tmp_path, [Answers("forgotten", "c", "Why?", "So it is.", "So it was.")])  # by the evaluation
    gate_report.write(tmp_path, results, found)
    markdown, record = (tmp_path / "gate.md").read_text(), json.loads((tmp_path / "gate.json").read_text())
    assert markdown.startswith("## FAIL: tuned against original, 2 of 4 rules broken\n")
    assert "- **c** breaks *interval*: 50.0% → 30.0%" in markdown and "a\\|b" in markdown
    assert record["verdict"] == "FAIL" and [rule["passed"] for rule in record["rules"]] == [True, True, False, False]
    page = (tmp_path / "gate.html").read_text()
    assert "FAIL" in page and "<h3>Forgotten items</h3>" in page and "So it <ins>was</ins>." in page
    assert gate_report.text(*judged(figures())).endswith("PASS: tuned against original, 2 rules kept")
