"""The demo: three rows, three pages. What `synth.run` does inside it has its own tests; here the world itself stands in for it."""

import re

import pytest

from benchmarks.forgetting.miniature import demo
from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl
from synth.config import name_of, resolve_presets, validate


def test_three_models_answer_and_judge():
    config = demo.synthesis_config(demo.RUN / "synth", 10)
    validate(config)
    assert [name_of(model) for model in resolve_presets(config).judges] == list(FAMILY) == ["base", "tutor", "peer"]
    assert config.instruct.num_instructions == 10 and "{response}" in open(config.judge.rubric).read()


@pytest.mark.report
@pytest.mark.slow
def test_demo_prints_every_row_and_where_the_pages_are(tmp_path, monkeypatch, capsys):
    made = []

    def synthesise(config):
        made.append(config)
        write_jsonl(training_records(GENERAL, 300, seed=5), tmp_path / config.output / "replay.jsonl")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "synthesise", synthesise)
    monkeypatch.setattr(demo, "ITEMS", (heldout_items(GENERAL, 10), heldout_items(DOMAIN, 10)))
    assert demo.main() == 0
    out = capsys.readouterr().out
    rows = {arm: [float(x) for x in re.search(rf"^{arm} +([\d.]+) +([\d.]+) +([\d.]+)", out, re.M).groups()]
            for arm in ("base", "domain only", "with replay")}
    assert rows["base"][0] > 0.9 and rows["base"][1] == 0 and made[0].instruct.num_instructions == demo.INSTRUCTIONS
    assert rows["domain only"][2] > rows["with replay"][2]  # forgotten: replay of the world's own chats holds it down
    for name in ("domain-only", "with-replay"):
        page = tmp_path / "runs" / "demo" / name / "report.html"
        assert str(page.relative_to(tmp_path)) in out and page.stat().st_size > 1000
    assert "runs/demo/synth/report.html" in out
