"""Test the sampling of instructions: plans, requests, drops, and that order and kills change nothing."""

import itertools
from collections import Counter

import pytest

from synth.config import Instruct, System
from synth.engines.interface import Completion
from synth.pool import seeds
from synth.pool.writer import BATCH
from synth.stages.instruct import instruct, plan
from tests.helpers.synth_fakes import FakeEngine, install, make_run
from trainer.errors import UserError


def question(request):
    """A text that depends on the request's seed alone."""
    return f"Question {request.seed % 997}?"


def sampled(tmp_path, monkeypatch, script=question, engine_seed=0, results=None, **options):
    engine = FakeEngine("base", complete=script, seed=engine_seed, results=results)
    install(monkeypatch, base=engine)
    run = make_run(tmp_path, instruct=Instruct(**{"num_instructions": 40, "reference_samples": 5} | options))
    instruct(run)
    return run, engine


def test_strata_come_equally_often_and_systems_and_turns_by_weight():
    config = make_config(num_instructions=4000, temperature=[0.7, 1.0], top_p=[0.9, 1.0], turn_weights=[3.0, 0.0, 1.0],
                         system_prompts=[System(None, 3.0), System("Be brief.", 1.0)])
    items = [plan(config, i) for i in range(4000)]
    assert Counter((i.temperature, i.top_p) for i in items) == dict.fromkeys(itertools.product((0.7, 1.0), (0.9, 1.0)), 1000)
    turns, systems = Counter(i.turns for i in items), Counter(i.system for i in items)
    assert set(turns) == {1, 3} and abs(turns[3] - 1000) < 110  # four standard deviations
    assert set(systems) == {None, "Be brief."} and abs(systems["Be brief."] - 1000) < 110
    assert plan(config, 7) == items[7]


def make_config(**options):
    from synth.config import Config, Model

    return Config(base=Model(path="m"), instruct=Instruct(**options))


def test_prompts_are_the_prefix_and_stops_and_seeds_are_of_the_item(tmp_path, monkeypatch):
    run, engine = sampled(tmp_path, monkeypatch)
    format = run.format(run.base)
    assert {r.prompt.token_ids for r in engine.requests} == {format.user_prompt([]).token_ids}
    assert all(set(r.sampling.stop_ids) == set(format.user_stops.ids) for r in engine.requests)
    assert len({r.seed for r in engine.requests}) == 45
    rows = run.pool.select("SELECT item, position, text, tokens, finish, logprob, seed FROM turns ORDER BY item")
    assert rows == [(i, 0, question_of_seed(seed), len(question_of_seed(seed)), "stop", -1.0, seed)
                    for i, seed in ((i, seeds.seed(0, "instruct", "base", i, 0)) for i in range(40))]
    assert [i for i, in run.pool.select("SELECT id FROM fresh ORDER BY id")] == list(range(5))
    assert run.done("instruct") and engine.started == 1


def question_of_seed(seed):
    return f"Question {seed % 997}?"


def test_fresh_samples_are_drawn_with_nothing_in_their_way(tmp_path, monkeypatch):
    _, engine = sampled(tmp_path, monkeypatch, num_instructions=1, temperature=[0.5], top_p=[0.5])
    assert Counter((r.sampling.temperature, r.sampling.top_p) for r in engine.requests) == {(1.0, 1.0): 5, (0.5, 0.5): 1}


def test_junk_is_dropped_with_its_reason_and_asked_no_further(tmp_path, monkeypatch):
    def script(request):
        (item,), kind = request.key, request.key[0] % 5
        return {0: "Fine?", 1: Completion((item,), "Too long", 64, "length", -9.0, 2), 2: "How <|assistant|> so?", 3: "  ",
                4: ValueError("prompt of 600 tokens")}[kind]

    run, engine = sampled(tmp_path, monkeypatch, script, num_instructions=10, reference_samples=0, turn_weights=[0.0, 1.0])
    reasons = dict(run.pool.select("SELECT item, reason FROM drops WHERE stage = 'instruct'"))
    assert {item for item in range(10) if item not in reasons} == {0, 5}
    assert reasons[1] == "longer than max_tokens or the context" and reasons[2] == "special token <|assistant|>"
    assert reasons[3] == "empty" and reasons[4] == "prompt of 600 tokens"
    assert run.pool.select("SELECT DISTINCT detail FROM drops") == [("turn 1",)]
    assert len(engine.requests) == 10 + 2 + 2  # one turn of every item, then the base's and the user's second one of two


def test_turns_follow_one_another_and_bear_what_was_said(tmp_path, monkeypatch):
    run, engine = sampled(tmp_path, monkeypatch, num_instructions=6, reference_samples=0, turn_weights=[1.0, 1.0, 1.0],
                        system_prompts=[System("Be brief.")])
    format = run.format(run.base)
    for chat in run.pool.chats():
        assert [m["role"] for m in chat.messages] == ["user", "assistant", "user", "assistant", "user"][: len(chat.messages)]
        prompts = [r.prompt.token_ids for r in engine.requests if r.key == (chat.item,)]
        expected = [format.user_prompt(chat.messages[:n], chat.system).token_ids if n % 2 == 0
                    else format.response_prompt(chat.messages[:n], chat.system) for n in range(len(chat.messages))]
        assert prompts == expected
    planned = Counter(2 * turns - 1 for turns, in run.pool.select("SELECT turns FROM items"))
    assert Counter(len(chat.messages) for chat in run.pool.chats()) == planned


def test_neither_order_nor_a_death_changes_the_pool(tmp_path, monkeypatch):
    options = dict(num_instructions=BATCH + 60, turn_weights=[2.0, 1.0])
    whole, _ = sampled(tmp_path / "a", monkeypatch, **options)
    requested = []
    for attempt, results in enumerate((100, 290, 20, None)):
        engine = FakeEngine("base", complete=question, seed=attempt, window=30, results=results)
        install(monkeypatch, base=engine)
        run = make_run(tmp_path / "b", instruct=Instruct(reference_samples=5, **options))
        if results:
            with pytest.raises(UserError, match="died"):
                instruct(run)
        else:
            instruct(run)
        requested += [(r.key, r.prompt.token_ids, r.seed) for r in engine.requests]
        run.pool.connection.close()
    run = make_run(tmp_path / "b", instruct=Instruct(reference_samples=5, **options))
    assert run.pool.dump() == whole.pool.dump()
    done, = run.pool.select("SELECT sum(requests) FROM usage")[0]
    assert done == len(set(requested)) and len(requested) - done <= 3 * 31  # what was in flight at each death


def test_changed_settings_are_refused_and_a_finished_stage_starts_nothing(tmp_path, monkeypatch):
    sampled(tmp_path, monkeypatch)[0].pool.connection.close()
    install(monkeypatch)
    run = make_run(tmp_path, instruct=Instruct(num_instructions=40, reference_samples=5))
    instruct(run)
    with pytest.raises(UserError, match=r"instruct.num_instructions: this pool was made with 40, found 41; go on with those"):
        instruct(make_run(tmp_path, instruct=Instruct(num_instructions=41, reference_samples=5)))


def test_another_model_of_the_same_name_is_refused(tmp_path, monkeypatch):
    engine = FakeEngine("base", complete=question, results=20)
    install(monkeypatch, base=engine)
    with pytest.raises(UserError, match="died"):
        instruct(make_run(tmp_path, instruct=Instruct(num_instructions=40)))
    other = FakeEngine("base", complete=question)
    other.info = other.info._replace(fingerprint="another")
    install(monkeypatch, base=other)
    with pytest.raises(UserError, match="made with fingerprint fingerprint of base, found another; go on with that"):
        instruct(make_run(tmp_path, instruct=Instruct(num_instructions=40)))
    assert not other.requests and other.closed == 1
