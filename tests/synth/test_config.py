"""Options of synth.run: presets say what they mean, and what no run can use is refused by name. Seeds depend on what is asked alone."""

from collections import Counter

import pytest

from synth.config import Clean, Config, Instruct, Judge, Model, Report, Respond, Select, name_of, resolve_presets, validate
from synth.pool.seeds import choice, seed, uniform
from trainer.cli import parse
from trainer.errors import UserError

BASE = Model(path="models/base")


def test_yaml_and_overrides_become_a_config(tmp_path):
    (tmp_path / "c.yaml").write_text("base: {path: m}\nresponders: [{path: a/b}, {path: gpt, engine: openai, base_url: 'http://x/v1'}]\n")
    config = parse(Config, ["--config", str(tmp_path / "c.yaml"), "--instruct.num_instructions", "7"], "synth.run")
    assert config.instruct.num_instructions == 7 and [name_of(model) for model in config.responders] == ["b", "gpt"]
    validate(config)


def test_the_papers_preset_is_its_table():
    paper = resolve_presets(Config(base=BASE, responders=[Model(path="b")], preset="paper", select=Select(min_score=3.0)))
    assert (paper.instruct.temperature, paper.instruct.top_p) == ([1.0], [0.98])
    assert (paper.respond.num_samples, paper.respond.include_greedy, paper.clean.duplicates) == (3, False, "keep")
    assert (paper.judge.scoring, paper.judge.exclude_self) == ("generated", False)
    assert (paper.select.rule, paper.select.min_score) == ("best", 0.0)
    assert paper.judges == [BASE, Model(path="b")]


def test_the_default_preset_keeps_what_was_chosen():
    judge = Judge(scoring="generated")
    assert resolve_presets(Config(base=BASE, judge=judge, judges=[Model(path="j")])).judge is judge
    assert resolve_presets(Config(base=BASE, judges=[Model(path="j")])).judges == [Model(path="j")]


@pytest.mark.parametrize(("config", "message"), [
    (Config(), "base.path: expected the model"),
    (Config(base=Model(path="m", engine="openai", base_url="u")), "base.engine: expected vllm or transformers"),
    *[(Config(base=BASE, judges=[Model(path="m", engine="openai", base_url=url)]), message) for url, message in {
        "localhost:8000/v1": "judges: base_url: expected a URL such as", "ftp://x/v1": "judges: base_url: expected a URL",
        "http://": "judges: base_url: expected a URL", "http://x:99999/v1": "judges: base_url: expected a URL",
        "https://me:secret@x/v1": "judges: base_url: expected a URL without user, password and query, got one with them",
        "https://x/v1?key=secret": "judges: base_url: expected a URL without user, password and query"}.items()],
    (Config(base=BASE, judges=[Model(path="m", max_model_len=0)]), "judges: max_model_len: expected 1 or more"),
    (Config(base=BASE, judges=[Model(path="m", data_parallel_size=10**6)]), "judges: data_parallel_size: expected 0 to 256, got 1000000"),
    (Config(base=BASE, judges=[Model(path="m", tensor_parallel_size=0)]), "judges: tensor_parallel_size: expected 1 to 256, got 0"),
    *[(Config(base=BASE, date=date), "date: expected a date such as 2025-01-31, got") for date in ("never", "2025-13-01", "20250101", "")],
    *[(Config(base=BASE, report=Report(topics=topics)), "report.topics: expected 1 to 1,000, got") for topics in (0, -1, 10**9)],
    (Config(base=BASE, report=Report(sample=0)), "report.sample: expected 1 or more"),
    (Config(base=BASE, respond=Respond(num_samples=10**9)), "respond.num_samples: expected at most 10,000, got 1000000000"),
    (Config(base=BASE, respond=Respond(max_tokens=10**18)), "respond.max_tokens: expected 1 to 10,000,000"),
    (Config(base=BASE, instruct=Instruct(turn_weights=[1.0] * 1000)), "instruct.turn_weights: expected at most 100 shares"),
    (Config(base=BASE, instruct=Instruct(num_instructions=10**8)), "instruct.num_instructions: expected 1 to 10,000,000"),
    (Config(base=BASE, judges=[Model(path="m", requests_per_minute=-1)]), "judges: requests_per_minute: expected 0 or more"),
    (Config(base=BASE, responders=[Model(path="m", engine="openai")]), "responders: base_url: expected the server's URL"),
    (Config(base=BASE, responders=[Model(path="x/base")]), "responders: name: expected names that differ"),
    (Config(base=BASE, instruct=Instruct(num_instructions=0)), "instruct.num_instructions: expected 1"),
    (Config(base=BASE, instruct=Instruct(top_p=[0.0])), "instruct.top_p"),
    (Config(base=BASE, instruct=Instruct(turn_weights=[])), "instruct.turn_weights"),
    (Config(base=BASE, stages=[]), "stages: expected some of probe"),
    (Config(base=BASE, respond=Respond(num_samples=0, include_greedy=False)), "respond.num_samples: expected 1 or more, or 0 with"),
    (Config(base=BASE, respond=Respond(num_samples=0), responders=[Model(path="y")]),
     "respond.num_samples: expected 1 or more, for responders"),
    (Config(base=BASE, respond=Respond(score_with_base=False)), "respond.score_with_base: expected true, for select.rule majority"),
    (Config(base=BASE, judge=Judge(scoring="generated"), select=Select(statistic="mode")),
     "select.statistic: expected mean, with judge.scoring generated"),
    (Config(base=BASE, judge=Judge(pairwise=True), select=Select(rule="first")),
     "select.rule: expected best, majority or base_likelihood, with"),
])
def test_what_no_run_can_use_is_named(config, message):
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize("cap", [1, 3, 0.005, 0.002, 100.0])
def test_a_cap_is_a_share_or_a_count(cap):
    validate(Config(base=BASE, clean=Clean(duplicate_cap=cap)))


@pytest.mark.parametrize("cap", [0, -1, 1.5, -0.1])
def test_other_caps_are_refused(cap):
    with pytest.raises(UserError, match="clean.duplicate_cap: expected a share above 0 and below 1, or a whole number of 1 or more, got"):
        validate(Config(base=BASE, clean=Clean(duplicate_cap=cap)))


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "_key", "MY_COMPANYS_VERY_LONG_INFERENCE_SERVER_KEY"])
def test_the_key_is_named_by_its_environment_variable(name):
    validate(Config(base=BASE, judges=[Model(path="gpt", engine="openai", base_url="http://x/v1", api_key_env=name)]))


@pytest.mark.parametrize("key", ["sk-proj-abc123", "sk_abc123", "gsk_abc123", "hf_abc123", "d41d8cd98f00b204e9800998ecf8427e", "", "$KEY",
                                 "MY KEY", "2f5a"])
def test_a_key_in_place_of_its_name_is_refused_and_not_printed(key):
    with pytest.raises(UserError, match="judges: api_key_env: expected the NAME of an environment variable") as error:
        validate(Config(base=BASE, judges=[Model(path="gpt", engine="openai", base_url="http://x/v1", api_key_env=key)]))
    assert not key or key not in str(error.value)


def test_seeds_tell_every_part_and_its_place_apart():
    seeds = {seed(0, "respond", "base", i, k) for i in range(50) for k in range(3)}
    assert len(seeds) == 150 and all(0 <= s < 2**63 for s in seeds)
    assert seed(1, "a") != seed("1", "a") and seed("a", "b") != seed("b", "a") and seed("ab") != seed("a", "b")
    assert seed(0, "respond", "base", 1, 2) == 5393993261002331655  # a changed hash would orphan every pool


def test_choices_follow_their_weights():
    drawn = Counter(choice([1, 0, 3], "x", i) for i in range(4000))
    assert drawn[1] == 0 and abs(drawn[2] / 4000 - 0.75) < 0.03
    assert 0 <= min(uniform("y", i) for i in range(1000)) < 0.01
