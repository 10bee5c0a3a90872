"""After an outage of a server the pool is row for row what it would have been: the same command asks again what the server failed."""

import hashlib
import time

import pytest

pytest.importorskip("openai")
from synth.config import Judge, Model, Respond, Select
from synth.engines import endpoint
from synth.engines.interface import EngineError
from synth.stages.judge import judge
from synth.stages.respond import respond
from synth.stages.select import select
from tests.helpers.scripted_server import LISTED, RESET, Answer, ScriptedServer, chat_completion, error_answer
from tests.helpers.synth_fakes import BASE, FakeEngine, fill, install, make_run

SCALE = 100  # seconds that pass in one second of these tests
OUTAGE = 120 / SCALE
ITEMS = [f"What is {i} + {i}?" for i in range(20)]
FAULTS = [error_answer(429, "slow down"), RESET, Answer(200, b"{", (("content-length", "1000"), ("connection", "close"))),
          error_answer(503, "later"), Answer(200, b'{"choices": [{"mess'), error_answer(429, "slow down", retry_after="0.01"),
          Answer(502, b"<html>Bad gateway</html>", (("content-type", "text/html"),)), Answer(200, chat_completion(5)), RESET,
          error_answer(504, "late"), Answer(200, b"")]
STAGES = {"responses": "expected_score", "scores": "expected_score", "justified scores": "generated", "comparisons": "expected_score"}


def stage_of(body) -> str:
    """Return which of STAGES asks a request."""
    words = body["messages"][-1]["content"]
    if "<response A>" in words:
        return "comparisons"
    if "<response>" not in words:
        return "responses"
    return "scores" if body.get("logprobs") else "justified scores"


def good(body) -> Answer:
    """Answer a request, by what it asks alone."""
    words, stage = body["messages"][-1]["content"], stage_of(body)
    chance = int(hashlib.sha256(f"{words}{body.get('seed')}".encode()).hexdigest(), 16)
    if stage == "responses":
        return error_answer(400, "against our rules") if "refused" in words else Answer(200, chat_completion(f"echo {chance % 7}"))
    if stage == "justified scores":
        return Answer(200, chat_completion(f"It is fair.\nScore: {1 + chance % 5}"))
    tokens = "AB" if stage == "comparisons" else "12345"
    top = [{"token": token, "logprob": -0.1 - (chance >> i) % 5, "bytes": None} for i, token in enumerate(tokens)]
    content = [{"token": tokens[0], "logprob": -1.0, "bytes": None, "top_logprobs": top}]
    return Answer(200, chat_completion(tokens[0], "length", logprobs={"content": content}))


class Outage:
    """A server whose every answer is a fault for OUTAGE seconds from the tenth request of a stage on, also of its list of models."""

    def __init__(self, stage: str):
        self.stage, self.asked, self.failed, self.end = stage, 0, 0, None

    def __call__(self, body) -> Answer:
        self.asked += stage_of(body) == self.stage
        if self.asked == 10 and self.end is None:
            self.end = time.monotonic() + OUTAGE
        return self.fault() or good(body)

    def models(self) -> Answer:
        return self.fault() or LISTED

    def fault(self) -> Answer | None:
        if self.end is None or time.monotonic() > self.end:
            return None
        self.failed += 1
        return FAULTS[self.failed % len(FAULTS)]


def worked(folder, monkeypatch, server, scoring: str, calls: int = 1) -> tuple[dict, bytes]:
    """Run the stages until they end, at most `calls` times, and return the pool's rows and the replay set."""
    remote = Model(path="m", name="remote", engine="openai", base_url=server.url, concurrency=4)
    install(monkeypatch, base=FakeEngine("base", complete=lambda request: "local"))
    for call in range(calls):
        run = make_run(folder, responders=[remote], judges=[remote], base=Model(path=BASE, name="base"), select=Select(rule="best"),
                       respond=Respond(num_samples=2, include_greedy=False, score_with_base=False),
                       judge=Judge(exclude_self=False, scoring=scoring, pairwise=scoring == "expected_score"))
        if not run.pool.select("SELECT 1 FROM items"):
            fill(run, [*ITEMS, "refused"], done=("clean",))
        try:
            respond(run)
            judge(run)
            select(run)
        except EngineError as error:
            assert "\n" not in str(error) and call < calls - 1, error
            continue
        finally:
            rows = run.pool.dump()
            run.pool.connection.close()
        rows["models"] = [row for row in rows["models"] if row[0] != "remote"]  # whose row names the server's port
        return rows, (folder / "replay.jsonl").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the results of each way of scoring on a server that is well."""
    results = {}
    with pytest.MonkeyPatch.context() as patch, ScriptedServer(otherwise=good) as server:
        for scoring in ("expected_score", "generated"):
            results[scoring] = worked(tmp_path_factory.mktemp(scoring), patch, server, scoring)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_pool_after_two_minutes_without_a_server(stage, tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(endpoint, "PAUSE", endpoint.PAUSE / SCALE)
    outage = Outage(stage)
    with ScriptedServer(otherwise=outage, models=outage.models) as server:
        rows, replay = worked(tmp_path, monkeypatch, server, STAGES[stage], calls=500)
    expected, expected_replay = undisturbed[STAGES[stage]]
    assert rows == expected and replay == expected_replay and replay.count(b"\n") == len(ITEMS) + 1
    assert outage.failed > 2 * len(FAULTS) and len(rows["comparisons" if stage == "comparisons" else "scores"]) >= len(ITEMS)
    assert {row[-1] for row in rows["responses"]} == {None, "refused by the server: against our rules"}
