"""`trainer.recover`: an adapter that forgot is drawn back to its base, round by round, and a kill changes nothing."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl
from tests.helpers.adapters import save_random_adapter
from tests.helpers.kills import killed_at
from tests.helpers.retention import BASE
from tests.helpers.runs import records, weights
from trainer import cli
from trainer.errors import UserError
from trainer.recover import main, recover
from trainer.recovery.config import Recover
from trainer.recovery.goal import Goal


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An adapter that spoils the base, prompts, domain chats with and without answers, and items."""
    folder = tmp_path_factory.mktemp("recovery")
    save_random_adapter(BASE, folder / "adapter", rank=4, spread=0.5)
    save_random_adapter(BASE, folder / "harmless", rank=4, spread=1e-4)
    write_jsonl(training_records(GENERAL, 40, seed=0), folder / "prompts.jsonl")
    domain = training_records(DOMAIN, 30, seed=0)
    write_jsonl(domain, folder / "domain.jsonl")
    write_jsonl([{"messages": row["messages"][:1]} for row in domain], folder / "asked.jsonl")
    write_jsonl([{"prompt": item.instruction, "answer": item.answer} for item in heldout_items(GENERAL, 2)], folder / "items.jsonl")
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Run three rounds that nobody disturbs, and return what they leave."""
    folder = tmp_path_factory.mktemp("whole")
    run(data, folder, "--rounds", "3")
    return folder


def arguments(data, output, *more) -> list[str]:
    named = {"adapter": "adapter", "prompts": "prompts.jsonl", "domain": "domain.jsonl", "general": "items.jsonl"}
    return [*(part for option, name in named.items() for part in (f"--{option}", str(data / name))), "--output", str(output), "--device",
            "cpu", "--rounds", "2", "--steps", "4", "--answers", "12", "--max_tokens", "16", "--lr", "2e-3",
            "--batch.tokens_per_pack", "256", "--batch.tokens_per_step", "256", *map(str, more)]


def run(data, output, *more):
    return recover(cli.parse(Recover, arguments(data, output, *more), "trainer.recover"))


@pytest.mark.slow
@pytest.mark.report
def test_the_command_draws_an_adapter_to_its_base(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trainer.recover", *arguments(data, tmp_path)])
    assert main() == 3
    shown, measured = capsys.readouterr().out, records(tmp_path, "forgetting")
    assert [record["step"] for record in measured] == [0, 4, 8]
    assert measured[-1]["general_kl"] < measured[0]["general_kl"] - 0.2
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter")
    assert model.peft_config["default"].r == 4 and (tmp_path / "report.html").exists()
    rounds = [[json.loads(line) for line in (tmp_path / "rounds" / f"round-000{n}.jsonl").open()] for n in (1, 2)]
    assert [len(answered) for answered in rounds] == [12, 12] and rounds[0][0]["prompt"] != rounds[1][0]["prompt"]
    assert "no measured state held the floor" in shown and "give more rounds" in shown
    assert main() == 1 and "of an earlier run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 9], ids=["within a round", "as a round begins"])
def test_a_killed_recovery_ends_bit_for_bit_as_a_whole_one(data, tmp_path, whole, step):
    with killed_at(step):
        run(data, tmp_path, "--rounds", "3")
    assert not (tmp_path / "adapter").exists()
    run(data, tmp_path, "--rounds", "3", "--resume", "auto")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(tmp_path).items())
    for answered in (whole / "rounds").iterdir():
        assert (tmp_path / "rounds" / answered.name).read_bytes() == answered.read_bytes()


@pytest.mark.slow
def test_prompts_of_the_domain_are_answered_by_the_adapter_as_it_came(data, tmp_path, capsys):
    run(data, tmp_path, "--domain", data / "asked.jsonl", "--rounds", "1")
    shown = capsys.readouterr().out
    assert "domain: its 30 prompts have no answers; those of the adapter, as it came, are held to" in shown
    assert len((tmp_path / "rounds" / "domain.jsonl").read_text().splitlines()) == 30


@pytest.mark.slow
def test_nothing_is_done_where_nothing_is_forgotten(data, tmp_path, capsys):
    result = run(data, tmp_path, "--adapter", data / "harmless")
    assert result.status == 0 and result.steps == 0 and not (tmp_path / "adapter").exists()
    assert "which holds the floor of 97.0%: there is nothing to bring back" in capsys.readouterr().out


@pytest.mark.slow
def test_it_stops_at_the_first_round_that_reaches_the_goal(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Goal, "reached", lambda goal, measurement: measurement["step"] >= 4)
    assert run(data, tmp_path, "--rounds", "3").steps == 4
    assert sorted(path.name for path in (tmp_path / "rounds").glob("*.jsonl")) == ["round-0001.jsonl"] and weights(tmp_path)


def test_the_goal_is_both_accuracies():
    goal, general = Goal(0.97, 0.9), {"general": 0.96, "holds_floor": True}
    assert goal.reached(general | {"domain": 0.873}) and not goal.reached(general | {"domain": 0.87})
    assert not goal.reached({"holds_floor": False, "domain": 1.0}) and not goal.reached(None)
    assert Goal(0.97, None).reached(general)


@pytest.mark.parametrize("more, message", [
    (("--adapter", "nowhere"), "adapter: expected a folder with adapter_config.json, found none in nowhere"),
    (("--share", "1"), "share: expected above 0 and below 1, got 1.0"),
    (("--rounds", "0"), "rounds: expected 1 to 1,000,000, got 0"),
    (("--floor", "1.5"), "floor: expected a share of the base's accuracy, 0 < floor <= 1, got 1.5"),
    (("--domain", "[]"), "domain: expected chats or prompts of what the adapter learnt, as nothing else would hold it, got none"),
    (("--general", "[]"), "general: expected items with known answers, to measure what comes back, got none"),
    (("--base", "/nowhere/base"), "base: there is no folder /nowhere/base"),
])
def test_a_mistake_is_named_by_our_options(data, tmp_path, more, message):
    with pytest.raises(UserError) as error:
        run(data, tmp_path / "out", *more)
    assert str(error.value).startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("rows, message", [
    ([{"text": "Words."}], "prompts: expected chats in"),
    ([{"messages": [{"role": "assistant", "content": "Yes."}]}], "prompts: {file}, line 1: expected a turn before the answer, found none"),
    ([{"messages": [{"role": "user", "content": "Why? " * 300}]}], "prompts: expected prompts of at most 255 tokens, found 1 that"),
])
def test_prompts_that_cannot_be_answered(data, tmp_path, rows, message):
    file = write_jsonl(rows, tmp_path / "rows.jsonl")
    with pytest.raises(UserError) as error:
        run(data, tmp_path / "out", "--prompts", file)
    assert str(error.value).startswith(message.format(file=file))
