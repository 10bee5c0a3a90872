"""Options of synth.run: presets say what they mean, and what no run can use is refused by name. Seeds depend on what is asked alone."""

from collections import Counter

import pytest

from synth.config import Config, Instruct, Judge, Model, Respond, Select, duplicate_rule, name_of, settled, validate
from synth.pool.seeds import choice, seed, uniform
from trainer.cli import parse
from trainer.errors import UserError

BASE = Model(path="models/base")


def test_yaml_and_overrides_become_a_config(tmp_path):
    (tmp_path / "c.yaml").write_text("base: {path: m}\nresponders: [{path: a/b}, {path: gpt, engine: openai, url: 'http://x/v1'}]\n")
    config = parse(Config, ["--config", str(tmp_path / "c.yaml"), "--instruct.count", "7"], "synth.run")
    assert config.instruct.count == 7 and [name_of(model) for model in config.responders] == ["b", "gpt"]
    validate(config)


def test_the_papers_preset_is_its_table():
    paper = settled(Config(base=BASE, responders=[Model(path="b")], preset="paper", select=Select(floor=3.0)))
    assert (paper.instruct.temperature, paper.instruct.top_p) == ([1.0], [0.98])
    assert (paper.respond.samples, paper.respond.greedy_self, paper.clean.duplicates) == (3, False, "keep")
    assert (paper.judge.score, paper.judge.exclude_self, paper.select.rule, paper.select.floor) == ("paper", False, "max", 0.0)
    assert paper.judges == [BASE, Model(path="b")]


def test_the_default_preset_keeps_what_was_chosen():
    judge = Judge(score="paper")
    assert settled(Config(base=BASE, judge=judge, judges=[Model(path="j")])).judge is judge
    assert settled(Config(base=BASE, judges=[Model(path="j")])).judges == [Model(path="j")]


@pytest.mark.parametrize(("config", "message"), [
    (Config(), "base.path: expected the model"),
    (Config(base=Model(path="m", engine="openai", url="u")), "base.engine: expected vllm or transformers"),
    (Config(base=BASE, responders=[Model(path="m", engine="openai")]), "responders: url: expected the server's base URL"),
    (Config(base=BASE, responders=[Model(path="x/base")]), "responders: name: expected names that differ"),
    (Config(base=BASE, instruct=Instruct(count=0)), "instruct.count: expected 1"),
    (Config(base=BASE, instruct=Instruct(top_p=[0.0])), "instruct.top_p"),
    (Config(base=BASE, instruct=Instruct(turns=[])), "instruct.turns"),
    (Config(base=BASE, stages=[]), "stages: expected some of probe"),
    (Config(base=BASE, respond=Respond(samples=0, greedy_self=False)), "respond.samples: expected 1 or more; 0 beside respond.greedy_self"),
    (Config(base=BASE, respond=Respond(samples=0), responders=[Model(path="y")]), "respond.samples: expected 1 or more, for responders"),
    (Config(base=BASE, respond=Respond(base_likelihood=False)), "respond.base_likelihood: expected true, for select.rule agreed"),
    (Config(base=BASE, judge=Judge(score="paper"), select=Select(score="mode")), "select.score: expected mean, beside judge.score paper"),
    (Config(base=BASE, judge=Judge(pairwise=True), select=Select(rule="first")), "select.rule: expected max, agreed or likeliest, beside"),
])
def test_what_no_run_can_use_is_named(config, message):
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize(("text", "rule"), [
    ("cap:3", ("cap", 3)), ("cap:0.5%", ("cap", 0.005)), ("cap:.2%", ("cap", 0.002)), ("keep", ("keep", 0)), ("weight", ("weight", 0)),
    ("drop", ("drop", 0))])
def test_duplicate_rules(text, rule):
    assert duplicate_rule(text) == rule


@pytest.mark.parametrize("text", ["cap", "cap:0", "cap:x", "cap:1.5", "cap:0%", "cap:100%", "cap:2%%", "none", ""])
def test_other_duplicate_rules_are_refused(text):
    with pytest.raises(UserError, match="clean.duplicates: expected keep, cap:k"):
        duplicate_rule(text)


def test_seeds_tell_every_part_and_its_place_apart():
    seeds = {seed(0, "respond", "base", i, k) for i in range(50) for k in range(3)}
    assert len(seeds) == 150 and all(0 <= s < 2**63 for s in seeds)
    assert seed(1, "a") != seed("1", "a") and seed("a", "b") != seed("b", "a") and seed("ab") != seed("a", "b")
    assert seed(0, "respond", "base", 1, 2) == 5393993261002331655  # a changed hash would orphan every pool


def test_choices_follow_their_weights():
    drawn = Counter(choice([1, 0, 3], "x", i) for i in range(4000))
    assert drawn[1] == 0 and abs(drawn[2] / 4000 - 0.75) < 0.03
    assert 0 <= min(uniform("y", i) for i in range(1000)) < 0.01
