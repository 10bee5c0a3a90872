"""The search for the least replay that holds the floor: what it probes, what it chooses, what a kill leaves, mistakes."""

import json
import signal
import time
from itertools import product

import pytest

from tests.helpers.kills import Killed
from tests.helpers.processes import Command, complete_ranks
from tests.helpers.retention import BASE, options
from tests.helpers.runs import arguments, records
from trainer.cli import parse
from trainer.config import Config
from trainer.config_rules import validate
from trainer.errors import UserError
from trainer.report.run_page import write_report
from trainer.retention import replay_search
from trainer.retention.monitor import ForgettingMonitor
from trainer.run import train
from trainer.runtime import checkpoint
from trainer.training import loop
from trainer.training.loop import train_step

SHARES = [0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.83]
WEIGHTS = [0.0, 0.3, 1.0]


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("thresholds", list(product([0, 3, 7], repeat=3)) + [(4, 4, 4), (5, 2, 0), (6, 3, 0)])
def test_the_least_share_that_holds_is_found_with_few_probes(thresholds):
    """A made-up world in which weight k holds the floor from its own share on: the least over all weights, the first weight of equals."""
    probed = []

    def probe(share: float, kl: float) -> dict:
        assert (share, kl) not in probed, "no pair is probed twice"
        probed.append((share, kl))
        return {"ratio": share, "kl_weight": kl, "holds_floor": SHARES.index(share) >= thresholds[WEIGHTS.index(kl)]}

    found = replay_search.least_replay(SHARES, WEIGHTS, probe, lambda probe, best: True)
    least = min(thresholds)
    if least == 7:
        assert found is None and len(probed) == 3 + 2  # what fails with the largest share fails
    else:
        assert (found["ratio"], found["kl_weight"]) == (SHARES[least], WEIGHTS[thresholds.index(least)])
        assert len(probed) <= 3 + (1 + 3) + (1 + 2)


def test_a_weight_that_spoils_the_domain_is_not_taken():
    def probe(share: float, kl: float) -> dict:
        accuracy = {0.0: 0.6, 0.3: 0.4, 1.0: 0.2}[kl]
        return {"ratio": share, "kl_weight": kl, "holds_floor": SHARES.index(share) >= 4 - 2 * WEIGHTS.index(kl), "domain": accuracy,
                "domain_base": 0.1}

    found = replay_search.least_replay(SHARES, WEIGHTS, probe, replay_search.learns_enough)
    assert (found["ratio"], found["kl_weight"]) == (SHARES[2], 0.3), (
        "0.3 gains 0.3 of 0.5; 1.0 would do with less replay, but gains 0.1 of 0.3")


def config(data, output, *more) -> Config:
    """A run of eight steps whose probes have two; the replay is drawn upon with repeats."""
    given = parse(Config, arguments(BASE, data / "domain.jsonl", output, *options(
        data, "--replay_search.enabled", "true", "--forgetting.floor", "0.8", "--optim.warmup_steps", "4", "--logging.every", "1",
        *more)), "trainer.run")
    validate(given)
    return given


def test_a_probe_is_the_run_pressed_into_a_part(data, tmp_path):
    given = config(data, tmp_path, "--max_steps", "null", "--epochs", "6", "--eval.every", "5", "--checkpoint.every", "3")
    probe = replay_search.probe_config(given, 0.2, 0.3)
    assert (probe.epochs, probe.max_steps) == (1.5, None)
    assert (probe.optim.warmup_steps, probe.optim.decay_ratio, probe.optim.decay_steps) == (1, 0.2, 0)
    assert (probe.replay.ratio, probe.retention.kl_weight, probe.replay_search.enabled, probe.forgetting.floor) == (0.2, 0.3, False, 0.8)
    assert probe.output == str(tmp_path / "replay_search" / "ratio-0.2-kl-0.3")
    assert probe.forgetting.every == probe.eval.every == probe.checkpoint.every == 0
    assert replay_search.config_with(given, 0.2, 0.3).epochs == 6


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def scripted(monkeypatch):
    """Measurements that are made up by a function (share of replay, weight of the KL) -> share of the general items that stay right."""
    record = ForgettingMonitor._record

    def script(retained) -> None:
        def recorded(monitor: ForgettingMonitor, step: int, *more) -> dict:
            found, config = record(monitor, step, *more), monitor.config
            if step:
                share = retained(config.replay.ratio, config.retention.kl_weight)
                found |= {"general": share, "general_retained": share, "holds_floor": share >= config.forgetting.floor}
            return found
        monkeypatch.setattr(ForgettingMonitor, "_record", recorded)

    return script


@pytest.mark.report
@pytest.mark.slow
def test_the_run_that_follows_has_what_the_probes_chose(data, tmp_path, scripted, capsys):
    scripted(lambda share, kl: share + 0.15 + 0.2 * (kl == 1.0))
    result = train(config(data, tmp_path / "run", "--replay_search.ratios", "[0.35, 0.5, 0.65]"))
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "run" / "replay_search.json").read_text())
    probed = [(p["ratio"], p["kl_weight"], p["holds_floor"]) for p in found["probes"]]
    assert probed == [(0.5, 0.0, False), (0.65, 0.0, True), (0.5, 0.3, False), (0.5, 1.0, True), (0.35, 1.0, False)]
    assert (found["choice"]["ratio"], found["choice"]["kl_weight"]) == (0.5, 1.0) and result.steps == 8 and result.status == 0
    assert all(p["steps"] == 2 and p["tokens"] > 0 and p["seconds"] > 0 and "domain" in p for p in found["probes"])
    assert "replay search: replay 65%, KL weight 0: 80.0% of the base's general accuracy, domain" in shown
    assert ("replay search: chose replay.ratio 0.5 and retention.kl_weight 1, the least that held the floor; 5 probe runs took 10 steps "
            "(125% of the run's)") in shown
    assert shown.count("model family") == 1
    assert "model family" in (tmp_path / "run" / "replay_search" / "ratio-0.5-kl-1" / "log.txt").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Replay search" in page and "5 probe runs" in page and page.count("chosen") == 1 and page.count('data-column="KL weight"') == 5
    left = parse(Config, ["--config", str(tmp_path / "run" / "config.yaml"), "--output", str(tmp_path / "again")], "trainer.run")
    assert (left.replay_search.enabled, left.replay.ratio, left.retention.kl_weight) == (False, 0.5, 1.0)
    train(left)
    one, two = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "again"))
    assert one == two, "the configuration that a run leaves makes it again, without probes"


@pytest.mark.slow
def test_where_no_probe_holds_the_floor_the_nearest_is_taken(data, tmp_path, scripted, capsys):
    scripted(lambda share, kl: 0.3 * share + 0.1 * kl)
    result = train(config(data, tmp_path / "run", "--replay_search.ratios", "[0.2, 0.5]"))
    found = json.loads((tmp_path / "run" / "replay_search.json").read_text())
    assert [(p["ratio"], p["kl_weight"]) for p in found["probes"]] == [(0.5, 0.0), (0.5, 0.3), (0.5, 1.0)] and result.status == 3
    assert ("replay search: WARNING: no probe run held the floor of 80.0%; chose the nearest, replay.ratio 0.5 and "
            "retention.kl_weight 1; 3 probe runs") in capsys.readouterr().out


@pytest.mark.slow
def test_measured_probes_order_by_replay(data, tmp_path):
    """Nothing made up: the figures in replay_search.json are what each probe's own record says."""
    train(config(data, tmp_path / "run", "--replay_search.ratios", "[0.3, 0.8]", "--replay_search.kl_weights", "[0]",
                 "--replay_search.probe_fraction", "0.5"))
    for probe in json.loads((tmp_path / "run" / "replay_search.json").read_text())["probes"]:
        folder = tmp_path / "run" / "replay_search" / f"ratio-{probe['ratio']:g}-kl-0"
        last, end = records(folder, "forgetting")[-1], records(folder, "end")[0]
        assert probe["steps"] == end["steps"] == 4 and probe["tokens"] == end["tokens"]
        assert all(probe[name] == last[name] for name in ("general", "general_lost", "domain", "general_kl", "holds_floor"))


def killed_in(monkeypatch, count: int) -> None:
    """The next runs, killed at the step of this number over all probes."""
    steps = []

    def step(run, work, phases):
        steps.append(work.step)
        if len(steps) == count:
            raise Killed
        return train_step(run, work, phases)

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.slow
def test_a_killed_search_goes_on_after_its_last_probe_and_a_killed_run_keeps_its_choice(data, tmp_path, scripted, monkeypatch):
    scripted(lambda share, kl: share + 0.15)
    given = config(data, tmp_path / "run", "--resume", "auto", "--checkpoint.every", "4", "--replay_search.kl_weights", "[0]")
    for count in (4, 2 + 2 + 5):  # in the second probe; then in the run, past that probe, the third, and a checkpoint
        with monkeypatch.context() as patched, pytest.raises(Killed):
            killed_in(patched, count)
            train(given)
    before = (tmp_path / "run" / "replay_search.json").read_bytes()
    probed = json.loads(before)["probes"]
    assert [(p["ratio"], p["kl_weight"]) for p in probed] == [(0.35, 0.0), (0.65, 0.0), (0.5, 0.0)]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000004"
    killed_in(monkeypatch, 5)  # four steps are left, and no probe
    result = train(given)
    assert result.steps == 8 and (tmp_path / "run" / "replay_search.json").read_bytes() == before
    monkeypatch.undo()


@pytest.mark.slow
def test_a_search_of_other_options_is_not_gone_on_with(data, tmp_path, scripted, monkeypatch):
    scripted(lambda share, kl: share + 0.15)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_in(patched, 4)
        train(config(data, tmp_path / "run"))
    with pytest.raises(UserError, match="resume: the probe runs of .*search.json had another configuration: optim.lr was 0.005, is 0.01"):
        train(config(data, tmp_path / "run", "--resume", "auto", "--optim.lr", "0.01"))
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "run" / "replay_search.json").write_text(damaged)
        with pytest.raises(UserError, match="resume: cannot read .*replay_search.json: .*; remove it to search again"):
            train(config(data, tmp_path / "run", "--resume", "auto"))
    fresh = replay_search.read_earlier(config(data, tmp_path / "run"))
    assert fresh == {"probes": [], "choice": None} and not (tmp_path / "run" / "replay_search").exists()


@pytest.mark.slow
def test_a_signal_in_a_probe_stops_the_command_which_then_goes_on(data, tmp_path):
    process = Command("trainer.run", arguments(BASE, data / "domain.jsonl", tmp_path / "run", *options(
        data, "--max_steps", "200", "--epochs", "100", "--replay_search.enabled", "--forgetting.floor", "0.8",
        "--replay_search.kl_weights", "[0]")))
    log = tmp_path / "run" / "replay_search" / "ratio-0.35-kl-0" / "metrics.jsonl"
    for _ in range(2400):
        if log.exists() and '"step": 0' in log.read_text():
            break
        assert process.running, process.finish()
        time.sleep(0.05)
    process.send(signal.SIGTERM)
    status, _, errors = process.finish()
    assert status == 128 + signal.SIGTERM, errors
    assert f"stopped by signal {signal.SIGTERM} in a probe run; continue with the same command and --resume auto" in errors


@pytest.mark.slow
def test_two_ranks_choose_together(data, tmp_path):
    more = ("--replay_search.enabled", "--forgetting.floor", "0.05", "--replay_search.ratios", "[0.3, 0.8]",
            "--replay_search.kl_weights", "[0]")
    ranks = complete_ranks("trainer.run", arguments(BASE, data / "domain.jsonl", tmp_path / "two", *options(data, *more)))
    assert [status for status, _, _ in ranks] == [0, 0], ranks
    found = json.loads((tmp_path / "two" / "replay_search.json").read_text())
    assert [p["ratio"] for p in found["probes"]] == [0.8, 0.3] and found["choice"]["ratio"] == 0.3
    assert "".join(output for _, output, _ in ranks).count("replay search: ") == 3 and (tmp_path / "two" / "adapter").exists()


def test_a_dry_run_probes_nothing(data, tmp_path, capsys):
    assert train(config(data, tmp_path / "run", "--dry_run")) is None and not (tmp_path / "run").exists()
    assert "probe runs choose it, and retention.kl_weight, when the run starts" in capsys.readouterr().out


def test_the_page_without_an_end_has_the_probes(tmp_path):
    probe = {"ratio": 0.5, "kl_weight": 0.0, "steps": 2, "seconds": 1.0, "tokens": 100, "general": 0.5,
             "general_retained": 0.6, "holds_floor": True}
    (tmp_path / "replay_search.json").write_text(json.dumps({"probes": [probe], "choice": None}))
    write_report(tmp_path)
    assert "1 probe runs: 100 tokens, in 1 s." in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--retention.kl_reference", "cached")])
def test_a_folder_that_cannot_be_written_is_one_line_and_a_probe_leaves_figures_alone(data, tmp_path, more):
    (tmp_path / "file").write_text("")
    one = ("--replay_search.ratios", "[0.5]", "--replay_search.kl_weights", "[1]", *more)
    with pytest.raises(UserError, match="output: cannot write the folder .*/file: File exists; choose another output"):
        train(config(data, tmp_path / "file", *one))
    train(config(data, tmp_path / "run", *one))
    left = {path.name for path in (tmp_path / "run" / "replay_search" / "ratio-0.5-kl-1").iterdir()}
    assert left == {"metrics.jsonl", "config.yaml", "data.json", "log.txt"}


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("more, expected", [
    (["--forgetting.floor", "null"], "replay_search.enabled: expected forgetting.general and forgetting.floor beside it, got no floor"),
    (["--replay.data", "[]"], "replay_search.enabled: expected replay.data beside it, got none"),
    (["--replay.ratio", "0.5"], "replay_search.enabled, replay.ratio: expected one of them: the search chooses from replay_search.ratios"),
    (["--retention.kl_weight", "0.3"], "replay_search.enabled, retention.kl_weight: expected one of them"),
    (["--replay_search.ratios", "[0.5, 0.2]"], r"replay_search.ratios: expected ratios above 0 and below 1, rising, got \[0.5, 0.2\]"),
    (["--replay_search.ratios", "[0, 0.2]"], "replay_search.ratios: expected ratios above 0"),
    (["--replay_search.ratios", "[0.2, 1]"], "replay_search.ratios: expected ratios above 0 and below 1"),
    (["--replay_search.ratios", "[]"], "replay_search.ratios: expected ratios above 0"),
    (["--replay_search.kl_weights", "[-1, 0]"], "replay_search.kl_weights: expected weights of 0 or more, rising"),
    (["--replay_search.kl_weights", "[0.3, 0.3]"], "replay_search.kl_weights: expected weights of 0 or more, rising"),
    (["--replay_search.probe_fraction", "0"], "replay_search.probe_fraction: expected 0 < fraction <= 1, got 0"),
    (["--replay_search.probe_fractions", "0.5"], "unknown option replay_search.probe_fractions: did you mean replay_search.probe_fraction"),
])
def test_mistakes_are_one_line(data, tmp_path, more, expected):
    with pytest.raises(UserError, match=expected) as raised:
        config(data, tmp_path, *more)
    assert "\n" not in str(raised.value)
