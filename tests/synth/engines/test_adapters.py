"""Models with an adapter: both engines answer as PEFT does, and a pool knows whose answers it has."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from synth.config import Model, name_of
from synth.engines.adapters import must_merge
from synth.engines.interface import CompletionRequest, EngineError, Prompt, Sampling
from synth.stages.respond import respond
from tests.helpers.adapters import save_random_adapter
from tests.helpers.engine_here import EngineHere, put_back
from tests.helpers.engine_requests import BASE, ask, needs, questions
from tests.helpers.synth_fakes import FakeEngine, fill, install, make_run
from trainer.errors import UserError

GREEDY = Sampling(0.0, 1.0, 12)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_random_adapter(BASE, tmp_path_factory.mktemp("adapter"), rank=4, spread=0.3)


def asked() -> list[CompletionRequest]:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return [CompletionRequest((k,), Prompt(ids), GREEDY, 0) for k, ids in enumerate(questions(tokenizer, 5))]


@torch.no_grad()
def logprobs_by_peft(folder, found: dict) -> list[float]:
    """The log-probabilities that PEFT's model gives the greedy answers to `asked`, by its own choice at each token."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), folder).eval()
    sums = []
    for request in asked():
        ids, total = list(request.prompt.token_ids), 0.0
        for _ in range(found[request.key].tokens):
            best = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
            ids, total = [*ids, int(best.indices)], total + float(best.values)
        sums.append(total)
    return sums


def test_transformers_answers_with_the_adapter(adapter, monkeypatch, tmp_path):
    put_back(monkeypatch)
    plain, adapted = (EngineHere(Model(path=str(BASE), dtype="float32", adapter=path), tmp_path) for path in (None, str(adapter)))
    found, without = ask(adapted, asked()), ask(plain, asked())
    assert [found[k].logprob for k in sorted(found)] == pytest.approx(logprobs_by_peft(adapter, found), abs=1e-4)
    assert [found[k].text for k in found] != [without[k].text for k in found]
    assert adapted.info.fingerprint.startswith(plain.info.fingerprint + "+") and adapted.info.deterministic


@pytest.mark.slow
@pytest.mark.parametrize("kind", [needs("vllm")])
@pytest.mark.parametrize("dora", [False, True])
def test_vllm_answers_with_the_adapter_or_with_the_merged_model(opened, adapter, kind, dora, tmp_path):
    folder = save_random_adapter(BASE, tmp_path / "dora", rank=4, spread=0.3, dora=True) if dora else adapter
    engine = opened(kind, adapter=str(folder))
    found = ask(engine, asked())
    expected = pytest.approx(logprobs_by_peft(folder, found), rel=5e-3)  # vLLM computes with other functions
    assert [found[k].logprob for k in sorted(found)] == expected
    assert any("merged" in note for note in engine.notes()) == dora


def test_the_pool_knows_the_adapter_by_its_content(adapter, monkeypatch, tmp_path):
    copied = tmp_path / "adapter"
    copied.mkdir()
    for path in adapter.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    student = Model(path=str(BASE), adapter=str(copied))
    assert name_of(student) == "base+adapter"
    install(monkeypatch, **{"base": FakeEngine("base", lambda request: "yes", likelihood=lambda request: -1.0),
                            "base+adapter": FakeEngine("base+adapter", lambda request: "no")})
    run = make_run(tmp_path / "pool", responders=[student])
    fill(run, ["Is it?"], done=("probe", "instruct", "clean"))
    respond(run)
    assert run.pool.select("SELECT DISTINCT text FROM responses WHERE model = 'base+adapter'") == [("no",)]
    respond(run)
    save_random_adapter(BASE, copied, rank=4, spread=0.06)
    with pytest.raises(UserError, match="go on with those, or choose another output"):
        respond(run)


def test_adapters_that_are_missing_or_do_not_fit(adapter, monkeypatch, tmp_path):
    put_back(monkeypatch)
    with pytest.raises(UserError, match="adapter: expected a folder with adapter_config.json, found none in"):
        EngineHere(Model(path=str(BASE), adapter=str(tmp_path)), tmp_path)
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 3}))
    with pytest.raises(EngineError, match="adapter: the adapter in .* does not fit this model"):
        EngineHere(Model(path=str(BASE), adapter=str(tmp_path)), tmp_path)


@pytest.mark.parametrize("changed", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"r": 1024}, {"bias": "all"},
                                     {"init_lora_weights": "pissa"}, {"rank_pattern": {"q_proj": 600}}])
def test_what_vllm_is_known_to_refuse_is_merged_at_once(adapter, changed, tmp_path):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changed))
    assert must_merge("vllm", str(tmp_path)) and not must_merge("vllm", str(adapter)) and not must_merge("transformers", str(tmp_path))
