"""Test responses: requests, reasons for unusable ones, and likelihoods under the base."""

import pytest

from synth.config import Model, Respond, name_of
from synth.engines.interface import Completion
from synth.stages.respond import GREEDY, respond
from tests.helpers.synth_fakes import BASE, FakeEngine, fill, install, make_run
from trainer.errors import UserError

CHATS = ["What is 2 + 2?", ["Hi", "Hello!", "Spell ovel."], "Dropped"]


def answered(tmp_path, monkeypatch, engines, models=("base", "other"), **options):
    install(monkeypatch, **engines)
    run = make_run(tmp_path, models, respond=Respond(**{"num_samples": 2} | options))
    if not run.pool.select("SELECT 1 FROM items"):
        fill(run, CHATS, systems={1: "Be brief."}, done=("clean",))
        with run.pool.transaction():
            run.pool.insert("drops", [(2, "clean", "too short", None)])
    respond(run)
    return run


def answer(request):
    return f"Answer {request.seed % 997}"


def test_every_model_answers_what_was_kept_and_the_base_once_more_greedily(tmp_path, monkeypatch):
    base, other = FakeEngine("base", complete=answer, likelihood=lambda r: -2.0), FakeEngine("other", complete=answer)
    run = answered(tmp_path, monkeypatch, {"base": base, "other": other})
    keys = run.pool.select("SELECT item, model, sample FROM responses ORDER BY item, model, sample")
    assert keys == [(i, m, s) for i in (0, 1) for m, ss in (("base", (GREEDY, 0, 1)), ("other", (0, 1))) for s in ss]
    format = run.format(run.base)
    chats = {chat.item: chat for chat in run.pool.chats()}
    for request in base.requests + other.requests:
        chat = chats[request.key[0]]
        assert request.prompt.token_ids == format.response_prompt(chat.messages, chat.system)
    sampling = {r.key: r.sampling for r in base.requests if isinstance(r.key[1], int)}
    assert sampling[0, GREEDY].temperature == 0 and sampling[0, 0].temperature == 1.0
    assert sampling[0, 0].stop_ids == format.response_stops.ids
    seeds = [r.seed for r in base.requests + other.requests if hasattr(r, "seed")]
    assert len(set(seeds)) == len(seeds) == 10


def test_the_base_reads_what_others_said_and_knows_its_own(tmp_path, monkeypatch):
    base = FakeEngine("base", complete=answer, likelihood=lambda r: -0.5 * len(r.continuation))
    other = FakeEngine("other", complete=lambda r: ValueError("no") if r.key == (0, 1) else answer(r))
    run = answered(tmp_path, monkeypatch, {"base": base, "other": other})
    format = run.format(run.base)
    rows = run.pool.select("SELECT model, text, logprob, tokens, base_logprob, base_tokens, reason FROM responses "
                           "ORDER BY item, model, sample")
    for model, text, logprob, tokens, base_logprob, base_tokens, reason in rows:
        if reason:
            assert (model, reason, base_logprob) == ("other", "no", None)
        elif model == "base":
            assert (base_logprob, base_tokens) == (logprob, tokens)
        else:
            ids = format.continuation_ids(text)
            assert format.tokenizer.decode(ids) == text + "<|eot|>" and (base_logprob, base_tokens) == (-0.5 * len(ids), len(ids))
    assert sum(r[-1] is not None for r in rows) == 1
    assert sorted(r.key for r in base.requests if len(r.key) == 3) == [(0, "other", 0), (1, "other", 0), (1, "other", 1)]


def test_what_cannot_be_used_has_its_reason(tmp_path, monkeypatch):
    scripts = {0: lambda r: Completion(r.key, "cut of", 5, "length", -3.0, 4), 1: lambda r: "so <|user|> what"}
    base = FakeEngine("base", complete=lambda r: scripts[r.key[0]](r))
    run = answered(tmp_path, monkeypatch, {"base": base}, models=("base",), num_samples=1, include_greedy=False)
    rows = run.pool.select("SELECT text, finish, base_logprob, reason FROM responses ORDER BY item")
    assert rows == [("cut of", "length", None, "longer than max_tokens or the context"),
                    ("so <|user|> what", "stop", None, "special token <|user|>")]


def test_a_death_in_any_phase_loses_nothing_and_pays_nothing_twice(tmp_path, monkeypatch):
    def engines(results=(None, None), seed=0):
        shared = dict(complete=answer, seed=seed, window=2)
        return {"base": FakeEngine("base", likelihood=lambda r: -len(r.continuation), results=results[0], **shared),
                "other": FakeEngine("other", results=results[1], **shared)}

    whole = answered(tmp_path / "a", monkeypatch, engines())
    requested = 0
    for seed, results in enumerate(((None, 1), (2, None), (5, None))):
        dying = engines(results, seed)
        with pytest.raises(UserError, match="died"):
            answered(tmp_path / "b", monkeypatch, dying)
        requested += sum(len(engine.requests) for engine in dying.values())
    last = engines()
    run = answered(tmp_path / "b", monkeypatch, last)
    assert run.pool.dump() == whole.pool.dump() and not last["other"].started
    assert requested + len(last["base"].requests) <= 14 + 3 * 3
    again = engines()
    answered(tmp_path / "b", monkeypatch, again)
    assert not any(engine.started for engine in again.values())


def test_a_server_is_given_the_chat(tmp_path, monkeypatch):
    server = Model(path="big", name="server", engine="openai", base_url="http://localhost:1/v1")
    engine = FakeEngine("server", complete=answer)
    install(monkeypatch, base=FakeEngine("base", complete=answer, likelihood=lambda r: -1.0), server=engine)
    run = make_run(tmp_path, responders=[server], base=Model(path=BASE, name="base"), respond=Respond(num_samples=1))
    fill(run, CHATS[:2], systems={1: "Be brief."}, done=("clean",))
    respond(run)
    prompts = {r.key[0]: r.prompt for r in engine.requests}
    assert prompts[0] == (None, ({"role": "user", "content": "What is 2 + 2?"},))
    assert prompts[1].messages[0] == {"role": "system", "content": "Be brief."}
    assert run.pool.select("SELECT model FROM responses WHERE base_tokens > 0 AND model != 'base'") == [(name_of(server),)] * 2


def test_clean_must_have_ended(tmp_path, monkeypatch):
    install(monkeypatch)
    run = make_run(tmp_path)
    with pytest.raises(UserError, match=r"expected stage clean to have ended, found it unfinished; run it first: --stages '\[clean\]'"):
        respond(run)
