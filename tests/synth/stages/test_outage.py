"""After an outage of a server the pool is row for row what it would have been: the same command asks again what the server failed."""

import pytest

pytest.importorskip("openai")
from synth.config import Judge, Model, Respond
from synth.engines import endpoint
from synth.engines.interface import EngineError
from synth.stages.judge import judge
from synth.stages.respond import respond
from tests.helpers.scripted_server import Answer, ScriptedServer, chat_completion, error_answer
from tests.helpers.synth_fakes import BASE, FakeEngine, fill, install, make_run

ITEMS = [f"What is {i} + {i}?" for i in range(12)]
TOP = [{"token": str(digit), "logprob": -float(digit), "bytes": None} for digit in (1, 2, 3, 4, 5)]
GARBAGE = Answer(200, b'{"choices": [{"mess')
OUTAGES = {
    "everything": [Answer(502, b"<html>Bad gateway</html>", (("content-type", "text/html"),)), GARBAGE, error_answer(504, "late"),
                   Answer(200, b"{", (("content-length", "1000"), ("connection", "close"))), Answer(200, chat_completion(5))],
    "busy": [error_answer(429, "slow down"), error_answer(503, "later")],
}


def good(body) -> Answer:
    words = body["messages"][-1]["content"]
    if "refused" in words:
        return error_answer(400, "against our rules")
    if body.get("logprobs"):
        top = {"content": [{"token": "1", "logprob": -1.0, "bytes": None, "top_logprobs": TOP}]}
        return Answer(200, chat_completion("1", "length", logprobs=top))
    return Answer(200, chat_completion(f"echo {words}"))


class Failing:
    """A server that is well but for the requests of these counts."""

    def __init__(self, faults: list[Answer], *outages: range):
        self.count, self.faults, self.outages = 0, faults, outages

    def __call__(self, body) -> Answer:
        self.count += 1
        failing = any(self.count in outage for outage in self.outages)
        return self.faults[self.count % len(self.faults)] if failing else good(body)


def worked(folder, monkeypatch, server, calls: int = 1) -> dict:
    """Run both stages until they end, at most `calls` times, and return the pool's rows."""
    remote = Model(path="m", name="remote", engine="openai", base_url=server.url, concurrency=2)
    install(monkeypatch, base=FakeEngine("base", complete=lambda request: "local"))
    for call in range(calls):
        run = make_run(folder, responders=[remote], judges=[remote],
                       respond=Respond(num_samples=2, include_greedy=False, score_with_base=False), judge=Judge(exclude_self=False),
                       base=Model(path=BASE, name="base"))
        if not run.pool.select("SELECT 1 FROM items"):
            fill(run, [*ITEMS, "refused"], done=("clean",))
        try:
            respond(run)
            judge(run)
        except EngineError as error:
            assert "\n" not in str(error) and call < calls - 1, error
            continue
        finally:
            rows = {table: run.pool.dump()[table] for table in ("responses", "scores")}
            run.pool.connection.close()
        return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTAGES)
def test_a_pool_after_an_outage_in_each_stage(name, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE", 0.001)
    with ScriptedServer(otherwise=good) as server:
        undisturbed = worked(tmp_path / "well", monkeypatch, server)
    with ScriptedServer(otherwise=Failing(OUTAGES[name], range(4, 34), range(80, 120))) as server:
        assert worked(tmp_path / "unwell", monkeypatch, server, calls=9) == undisturbed
        assert len(server.requests) > 120
    reasons = {row[-1] for row in undisturbed["responses"]}
    assert reasons == {None, "refused by the server: against our rules"} and len(undisturbed["scores"]) == 2 * 12 + 2 * 13
