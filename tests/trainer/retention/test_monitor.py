"""Items scored during a run: figures, unchanged weights, the floor and its export, mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, write_jsonl
from tests.helpers.kills import killed_at
from tests.helpers.processes import complete_ranks
from tests.helpers.retention import BASE, options
from tests.helpers.runs import arguments, records, weights
from trainer import evaluate
from trainer.checksums import write_checksum
from trainer.cli import parse
from trainer.config import Config
from trainer.errors import UserError
from trainer.evaluation import config as evaluation
from trainer.evaluation.score_items import Outcome, Outcomes
from trainer.evaluation.suites.table import GROUPS
from trainer.evaluation.tokens import Key
from trainer.report import answers
from trainer.report.run_page import write_report
from trainer.retention import monitor
from trainer.retention.monitor import ForgettingMonitor
from trainer.run import train
from trainer.runtime import checkpoint
from trainer.runtime.result import RunResult


def run(data: Path, output: Path, *more) -> RunResult:
    return train(parse(Config, arguments(BASE, data / "domain.jsonl", output, *options(data, *more)), "trainer.run"))


def plain(data: Path, output: Path, *more) -> RunResult:
    """Run with the same options, without measurements."""
    found = parse(Config, arguments(BASE, data / "domain.jsonl", output, *options(data, *more)), "trainer.run")
    return train(replace(found, forgetting=replace(found.forgetting, general=[], domain=[], every=0, floor=None)))


# ---------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def measured_run(data, tmp_path_factory):
    torch.set_num_threads(1)
    return run(data, tmp_path_factory.mktemp("measured") / "run", "--forgetting.every", "3", "--logging.tensorboard", "true")


@pytest.mark.slow
def test_the_figures_are_those_of_trainer_evaluate(data, measured_run, tmp_path):
    result = evaluate.evaluate(parse(evaluation.Config, [
        "--adapter", str(measured_run.folder / "adapter"), "--data.general", str(data / "kept.jsonl"),
        "--data.domain", str(data / "learnt.jsonl"), "--generation.max_tokens", "24",
        "--device", "cpu", "--output", str(tmp_path / "out")], "trainer.evaluate"))
    found = records(measured_run.folder, "forgetting")
    assert [r["step"] for r in found] == [0, 3, 6, 8] and measured_run.status == 0
    for role in ("general", "domain"):
        expected, first, last = result["roles"][role], found[0], found[-1]
        assert first[role] == last[f"{role}_base"] == expected["base"]["accuracy"] and first[f"{role}_lost"] == first[f"{role}_kl"] == 0
        assert last[role] == expected["model"]["accuracy"] and last[f"{role}_interval"] == expected["model"]["accuracy_interval"]
        assert (last[f"{role}_lost"], last[f"{role}_gained"]) == (expected["change"]["lost"], expected["change"]["gained"])
        assert last[f"{role}_kl"] == pytest.approx(expected["change"]["kl_per_token"], rel=1e-4) and last[f"{role}_kl"] > 0.01
        assert last[f"{role}_logprob"] == pytest.approx(expected["model"]["logprob_per_token"], rel=1e-4)
    assert found[-1]["general_retained"] == result["roles"]["general"]["change"]["retention"] < 1
    assert found[-1]["files"] == {"kept": found[-1]["general"], "learnt": found[-1]["domain"]}
    assert measured_run.forgetting == {name: value for name, value in found[-1].items() if name != "time"}


@pytest.mark.slow
def test_the_page_and_the_logs_have_them(measured_run):
    write_report(measured_run.folder)
    page = (measured_run.folder / "report.html").read_text()
    assert "General and domain accuracy" in page and "KL(base || model)" in page and (measured_run.folder / "forgetting.png").exists()
    assert page.count('data-column="General KL"') == 4 and "exported" in page
    assert any(b"forgetting/general_kl" in path.read_bytes() for path in (measured_run.folder / "tensorboard").iterdir())
    assert not (measured_run.folder / "kept").exists()
    changed, last = answers.read(measured_run.folder), records(measured_run.folder, "forgetting")[-1]
    for kind, name in (("forgotten", "lost"), ("gained", "gained")):
        assert [one.kind for one in changed].count(kind) == last[f"general_{name}"] + last[f"domain_{name}"]
    assert changed and "<h2>What changed</h2>" in page


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    ("--lora.dropout", "0.1", "--retention.kl_weight", "0.3", "--activation_checkpointing", "full", "--data.eval_fraction", "0.1"),
    ("--method", "full", "--optim.lr", "1e-3", "--precision", "bf16"),
])
def test_measuring_changes_no_weight_and_no_loss(data, tmp_path, more):
    run(data, tmp_path / "measured", "--forgetting.every", "2", "--logging.every", "1", *more)
    plain(data, tmp_path / "plain", "--logging.every", "1", *more)
    name = "model/model.safetensors" if "--method" in more else "adapter/adapter_model.safetensors"
    assert (tmp_path / "measured" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    for kind in ("step", "eval"):
        one, two = ([(r["step"], r["loss"]) for r in records(tmp_path / side, kind)] for side in ("measured", "plain"))
        assert one == two


@pytest.mark.slow
def test_a_saved_adapter_is_measured_before_it_is_trained_and_its_base_is_without_it(data, measured_run, tmp_path):
    again = run(data, tmp_path / "run", "--lora.path", str(measured_run.folder / "adapter"), "--max_steps", "1")
    first, before = records(again.folder, "forgetting")[0], records(measured_run.folder, "forgetting")
    assert first["general"] == before[-1]["general"] and first["general_base"] == before[0]["general"]
    assert first["general_kl"] == pytest.approx(before[-1]["general_kl"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--lora.dropout", "0.1"), ("--method", "full", "--optim.lr", "1e-3")])
def test_a_killed_run_goes_on_bit_for_bit(data, tmp_path, more):
    """Killed after a better state was kept than its checkpoint knows of."""
    more = (*more, "--checkpoint.every", "4", "--forgetting.every", "1", "--forgetting.floor", "0.05", "--logging.every", "1")
    run(data, tmp_path / "whole", *more)

    with killed_at(step=7):
        run(data, tmp_path / "cut", *more)
    known = checkpoint.kept_steps(tmp_path / "cut" / "checkpoints")
    assert known and {int(path.name[5:]) for path in (tmp_path / "cut" / "kept").iterdir()} >= known
    run(data, tmp_path / "cut", *more, "--resume", "auto")
    name = "model/model.safetensors" if "--method" in more else "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, two = ([{k: v for k, v in r.items() if k != "time"} for r in records(tmp_path / side, "forgetting")] for side in ("whole", "cut"))
    assert one == two and len(one) == 9


@pytest.mark.slow
def test_resuming_with_other_items_is_refused(data, tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_bytes((data / "kept.jsonl").read_bytes())
    run(data, tmp_path / "run", "--forgetting.general", str(items), "--checkpoint.every", "4")
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:5]))
    (tmp_path / "run" / "adapter").rename(tmp_path / "aside")
    with pytest.raises(UserError, match="resume: .* made with another configuration: items was"):
        run(data, tmp_path / "run", "--forgetting.general", str(items), "--checkpoint.every", "4", "--resume", "auto")


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(data, tmp_path):
    more = ("--forgetting.every", "4", "--forgetting.floor", "0.05", "--data.eval_fraction", "0.1")
    run(data, tmp_path / "one", *more)
    ranks = complete_ranks("trainer.run", arguments(BASE, data / "domain.jsonl", tmp_path / "two", *options(data, *more)))
    assert [status for status, _, _ in ranks] == [0, 0], ranks
    one, two = (records(tmp_path / name, "forgetting") for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 4, 8]
    assert [r["general_kl"] for r in one] == pytest.approx([r["general_kl"] for r in two], rel=1e-2)
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").exists()


# ---------------------------------------------------------------- the floor


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that scripts a run's measurements and returns the master weights by step.

    It takes step -> (right general items of 16, right domain items of 8).
    """
    seen = {}

    def script(figures: dict[int, tuple[int, int]]) -> dict[int, list[torch.Tensor]]:
        def scored(monitor: ForgettingMonitor) -> Outcomes:
            rights, items = figures[script.step], {}
            for f, (file, right) in enumerate(zip(monitor.files, rights)):
                items |= {Key(f, i): Outcome(right=i < right) for i in range(len(file.items))}
            return Outcomes("model", "scripted", items)

        def measured(monitor: ForgettingMonitor, state, optimizer, *more):
            script.step, seen[state.step] = state.step, [group.master.detach().clone() for group in optimizer.groups]
            return measure(monitor, state, optimizer, *more)

        measure = ForgettingMonitor.measure
        monkeypatch.setattr(ForgettingMonitor, "_score", scored)
        monkeypatch.setattr(ForgettingMonitor, "measure", measured)
        return seen

    return script


@pytest.mark.slow
def test_the_best_on_the_domain_of_those_that_hold_the_floor_is_exported(data, tmp_path, scripted, capsys):
    """Need 12.8 of 16 right ones: step 2 has them, 4 learns more but misses, 6 is best, 8 learns less."""
    seen = scripted({2: (15, 2), 4: (12, 8), 6: (13, 5), 8: (16, 4)})
    result = run(data, tmp_path / "run", "--forgetting.every", "2", "--forgetting.floor", "0.8", "--export.format", "both")
    assert result.forgetting["step"] == 6 and result.reason == "max_steps" and result.steps == 8 and result.status == 0
    assert "exporting step 6 of 8, the best of those that hold the floor: general 81.2%, 81.2% of the base's" in capsys.readouterr().out
    assert [(r["holds_floor"], r["best"]) for r in records(result.folder, "forgetting")] == [
        (True, False), (True, True), (False, False), (True, True), (True, False)]
    assert records(result.folder, "end")[0]["kept"] == 6 and not (result.folder / "kept").exists()
    exported = torch.cat([t.flatten() for t in weights(result.folder).values()]).sort().values
    at = {step: torch.cat([m for m in masters]) for step, masters in seen.items()}
    assert torch.equal(exported[exported != 0], at[6][at[6] != 0].sort().values) and not torch.equal(at[6], at[8])


@pytest.mark.slow
def test_full_weights_in_bf16_are_put_back_too(data, tmp_path, scripted):
    scripted({2: (15, 5), 4: (15, 2), 6: (15, 1), 8: (15, 0)})
    more = ("--method", "full", "--optim.lr", "1e-3", "--precision", "bf16", "--forgetting.every", "2", "--optim.lr_scheduler", "constant",
            "--optim.warmup_ratio", "0")
    best = run(data, tmp_path / "best", *more, "--forgetting.floor", "0.8")
    short = plain(data, tmp_path / "short", *more, "--max_steps", "2")
    one, two = (load_file(result.folder / "model" / "model.safetensors") for result in (best, short))
    assert best.forgetting["step"] == 2 and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("patience, generals, stop", [
    (2, (12, 11, 9, 5, 5), 5),  # ever further below: the two that count are the first of the second half
    (2, (16, 14, 12, 12, 13, 12, 12), 7),  # held in between
    (2, (9, 8, 7, 6, 7, 6, 7, 6), 8),  # nearer again at every other
    (3, (12, 10, 11, 9, 8, 7), 6),
    (0, (1, 0, 0, 0, 0, 0, 0, 0), 8),  # never
])
def test_a_run_stops_where_it_keeps_missing_the_floor_and_comes_no_nearer(data, tmp_path, scripted, patience, generals, stop):
    scripted({i: (general, 8) for i, general in enumerate(generals, 1)})
    result = run(data, tmp_path / "run", "--forgetting.every", "1", "--forgetting.floor", "0.8", "--forgetting.patience", str(patience))
    assert result.steps == stop and result.reason == ("floor" if stop < 8 else "max_steps")
    assert result.folder.joinpath("adapter").exists()


@pytest.mark.slow
def test_where_nothing_holds_the_floor_the_nearest_is_exported_and_the_status_says_so(data, tmp_path, scripted, capsys):
    scripted({2: (9, 1), 4: (11, 2), 6: (10, 8), 8: (3, 8)})
    result = run(data, tmp_path / "run", "--forgetting.every", "2", "--forgetting.floor", "0.8", "--forgetting.patience", "0")
    assert result.forgetting["step"] == 4 and result.status == 3 and (result.folder / "adapter").exists()
    assert "WARNING: no measured state held the floor of 80.0%; exporting step 4 of 8, the nearest to it" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("heldout", [True, False])
def test_without_domain_items_the_held_out_loss_decides_or_the_latest(data, tmp_path, scripted, heldout):
    scripted({step: (16,) for step in (2, 4, 6, 8)})
    more = ("--data.eval_fraction", "0.1", "--optim.lr", "0.3", "--eval.every", "4") if heldout else ()
    result = run(data, tmp_path / "run", "--forgetting.domain", "[]", "--forgetting.every", "2", "--forgetting.floor", "1", *more)
    found = records(result.folder, "forgetting")
    losses = {r["step"]: r["heldout_loss"] for r in found[1:]} if heldout else {8: 0.0}
    assert result.forgetting["step"] == min(losses, key=losses.get)
    evaluated = {r["step"]: r["loss"] for r in records(result.folder, "eval")}
    assert not heldout or (set(evaluated) == {0, 4, 8} and all(losses[step] == evaluated[step] for step in (4, 8)))


@pytest.mark.slow
def test_an_early_stop_is_measured_where_it_stops(data, tmp_path, scripted):
    scripted({step: (16, 1) for step in range(9)})
    more = ("--data.eval_fraction", "0.1", "--optim.lr", "1", "--eval.every", "1", "--eval.patience", "1")
    result = run(data, tmp_path / "run", "--forgetting.every", "5", "--forgetting.floor", "0.5", *more)
    assert result.reason == "early stopping" and result.forgetting["step"] == result.steps < 5


@pytest.mark.slow
def test_a_kept_state_that_is_gone_is_one_line(data, tmp_path, scripted, monkeypatch):
    scripted({2: (16, 5), 4: (16, 2), 6: (16, 1), 8: (16, 0)})
    monkeypatch.setattr("trainer.retention.monitor.load_file", lambda path: load_file(path.with_name("absent")))
    with pytest.raises(UserError, match="forgetting: cannot read .*step-00000002/weights.safetensors, the state of step 2 that was kept"):
        run(data, tmp_path / "run", "--forgetting.every", "2", "--forgetting.floor", "0.5")


def test_kept_states_are_those_that_whole_checkpoints_refer_to(tmp_path):
    for step, kept in {2: {"step": 1}, 4: None, 6: {"step": 5}, 8: {"step": 7}}.items():
        file = tmp_path / f"step-{step:08d}" / "state.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"identity": {}, "step": step, "kept_measurement": kept}))
        write_checksum(file)
        if step == 6:
            file.write_text(file.read_text()[:-1])
    assert checkpoint.kept_steps(tmp_path) == {1, 7}
    checkpoint.remove_all_but(tmp_path, {4, 8})
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.rglob("state.json*"):
        path.unlink()
    checkpoint.remove_all_but(tmp_path, set())
    assert not tmp_path.exists()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("more, expected", [
    (["--forgetting.floor", "1.5"], r"forgetting.floor: expected a share of the base's accuracy, 0 < floor <= 1, got 1.5"),
    (["--forgetting.floor", "0"], "forgetting.floor: expected a share"),
    (["--forgetting.floor", "nan"], "forgetting.floor: expected float or null, got nan"),
    (["--forgetting.every", "-1"], "forgetting.every, forgetting.patience: expected 0 or more"),
    (["--forgetting.max_tokens", "0"], "forgetting.max_tokens: expected 1 or more, got 0"),
    (["--forgetting.general", "[]", "--forgetting.domain", "[]", "--forgetting.floor", "0.9"],
     "forgetting.floor: expected general items, as forgetting.general, beside it, got none"),
    (["--forgetting.general", "[]", "--forgetting.domain", "[]", "--forgetting.every", "5"], "forgetting.every: expected general items"),
    (["--forgetting.general", "[]"], "forgetting.domain: expected general items"),
    (["--forgetting.general", "absent.jsonl"], "absent.jsonl: expected a file .* found no such file"),
    (["--forgetting.general", "DATA/unanswered.jsonl", "--forgetting.metric", "exact"],
     "unanswered.jsonl: metric exact expects answers, found the columns prompt; map them"),
    (["--forgetting.metric", "regex"], "kept.jsonl: metric regex expects a pattern with a group, found none; set forgetting.regex"),
    (["--forgetting.metric", "choice"], "kept.jsonl: metric choice expects choices, found the columns prompt, answer"),
    (["--forgetting.general", "DATA/text.jsonl", "--forgetting.floor", "0.9"],
     "forgetting.floor: expected general items whose answers are right or wrong, found only held-out text in forgetting.general"),
    (["--forgetting.general", "[{path: DATA/kept.jsonl, max_records: 0}]"],
     "forgetting.general: max_records: expected 1 or more items, got 0"),
    (["--forgetting.general", "[{path: DATA/kept.jsonl, metrik: exact}]"],
     "forgetting.general: expected a path, or a list of items in YAML with the keys path, name, metric"),
    (["--forgetting.general", "DATA/learnt.jsonl", "--forgetting.floor", "0.9"],
     "forgetting.floor: expected general items of which the base answers some right, got 0 of 8; raise forgetting.max_tokens"),
    (["--model.path", "null", "--model.config", str(BASE), "--method", "full"], "forgetting.general: expected model.path"),
])
def test_mistakes_are_one_line_before_anything_is_trained(data, tmp_path, more, expected):
    write_jsonl([{"prompt": "What is 3 + 4?"}], data / "unanswered.jsonl")
    with pytest.raises(UserError, match=expected) as raised:
        run(data, tmp_path / "run", *(text.replace("DATA", str(data)) for text in more))
    assert "\n" not in str(raised.value) and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_options_of_trainer_evaluate_work_unchanged(data, tmp_path):
    """Measure a list of files with options of their own, among them choices and held-out text."""
    items = [item for item in heldout_items(GENERAL, 1)]
    write_jsonl([{"question": item.instruction, "choices": [item.answer + "s", item.answer], "answer": 1} for item in items],
                tmp_path / "choice.jsonl")
    write_jsonl([{"q": item.instruction, "a": f"It is {item.answer}"} for item in items], tmp_path / "regex.jsonl")
    listed = [{"path": str(tmp_path / "choice.jsonl"), "choice_by": "tokens"}, str(data / "text.jsonl"),
              {"path": str(tmp_path / "regex.jsonl"), "columns": {"prompt": "q", "answer": "a"}, "regex": "(.+)",
               "answer_regex": "It is (.*)"}]
    result = run(data, tmp_path / "run", "--forgetting.general", json.dumps(listed), "--forgetting.domain", str(data / "text.jsonl"))
    found = records(result.folder, "forgetting")
    assert found[0]["files"] == {"choice": 1, "regex": 1}
    assert found[0]["general"] == pytest.approx(sum(found[0]["files"].values()) / 2)
    assert "domain" not in found[0] and found[-1]["domain_logprob"] != found[0]["domain_logprob"]


def test_a_suite_may_be_monitored_by_its_name():
    files = monitor.read(parse(Config, ["--model.path", "a", "--data.train", "b", "--forgetting.general", "suite:mini"], "trainer.run"))
    assert tuple(file.name for file in files) == GROUPS["mini"]
