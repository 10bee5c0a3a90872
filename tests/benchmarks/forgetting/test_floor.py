"""The floor suite: configurations of its runs, a short one of them, and figures from marks."""


import pytest
import torch

from benchmarks.forgetting import floor
from benchmarks.forgetting.floor import FIXED, HALF, QUARTER, SEARCHED, WHOLE, Plan, Run
from benchmarks.forgetting.miniature import study
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.study import Size
from benchmarks.forgetting.miniature.world import heldout_items, training_records, write_jsonl
from benchmarks.harness import record
from benchmarks.run import main
from tests.helpers.pools import here
from tests.helpers.records import drawn, shown
from trainer.config_rules import validate
from trainer.retention import replay_search

TINY = Plan((Run(), Run(QUARTER), Run(WHOLE, 0.5, monitored=True)), Size(instructions=60, domain=16), epochs=2.0, items=1, every=1)
SOUND = {"base": "novice", "replay": "plus", "rows": 60, "recognised": 1.0, "right": 0.98}


def write_replay(work, count: int) -> None:
    write_jsonl(training_records(GENERAL, count, seed=5), study.replay_file(work, floor.BASE, floor.REPLAY, 0))


# ---------------------------------------------------------------- what is run


def test_names_are_rows_and_files_of_their_own():
    names = [run.name for run in Plan().runs]
    assert len(set(names)) == len(names) == 1 + 2 + 15
    assert names[:3] == ["domain only", "auto, probes of a quarter", "auto, probes of a half"]
    assert "65% replay, KL 1: an eighth" in names and not any(set(name) & set("/.") for name in names)
    assert [run.name for run in Plan().runs if run.monitored] == ["50% replay: the whole"]


@pytest.mark.parametrize("run", [Run(), *SEARCHED, *FIXED], ids=lambda run: run.name)
def test_a_run_has_the_configuration_of_a_search_or_of_its_probe(run, tmp_path):
    write_replay(tmp_path, 60)
    config = floor.recipe(run, TINY, floor.job_of(run, TINY, 0, tmp_path))
    validate(config)
    forgetting, replay, search = config.forgetting, config.replay, config.replay_search
    if run.part and run.ratio is None:
        assert search.enabled and (search.probe_fraction, forgetting.floor) == (run.part.share, 0.99)
        assert (replay.ratio, config.epochs) == (None, TINY.epochs) and forgetting.general and forgetting.domain
        probe, given = replay_search.probe_config(config, 0.5, 0.0), floor.recipe(FIXED[0], TINY, floor.job_of(FIXED[0], TINY, 0, tmp_path))
        assert (probe.max_steps, probe.optim, probe.lora, probe.batch) == (None, given.optim, given.lora, given.batch)
        return
    assert not search.enabled and (replay.ratio, config.retention.kl_weight, forgetting.floor) == (run.ratio, run.kl, None)
    assert bool(replay.data) == bool(run.part) and config.epochs == TINY.epochs * (run.part.share if run.part else 1)
    assert bool(forgetting.general) == run.monitored == bool(forgetting.every)


def test_items_that_are_monitored_are_not_those_of_the_table(tmp_path):
    monitored = floor.write_items(floor.job_of(Run(), TINY, 0, tmp_path), "general", 3).read_text()
    scored = [item.instruction for item in heldout_items(GENERAL, 3, 0)]
    assert monitored.count("\n") == 3 * len(GENERAL) and sum(f'"{instruction}"' in monitored for instruction in scored) < len(scored) / 2


# ---------------------------------------------------------------- a short run


@pytest.mark.slow
def test_a_short_run(monkeypatch, tmp_path, capsys):
    def make_pool(plan: Plan, work) -> dict:
        write_replay(work, plan.size.instructions)
        return SOUND

    monkeypatch.setattr(floor.parallel, "pool", here)
    monkeypatch.setattr(floor, "make_pool", make_pool)
    monkeypatch.setattr(floor, "QUICK", TINY)
    monkeypatch.setattr(study, "ITEMS", {kind: (skills, 2) for kind, (skills, _) in study.ITEMS.items()})
    torch.set_num_threads(1)
    assert main(["floor", "--quick", "--workers", "1", "--results", str(tmp_path)]) == 0
    made = record.newest(tmp_path)["floor-cpu"]
    domain_only, chosen, given = made["summary"]
    assert (domain_only["line"], domain_only["share"], domain_only["probes"]) == ("domain only", None, 0)
    assert chosen["probes"] >= 3 and 0 < chosen["share"] < 1 and chosen["held"] in (True, False)
    probes = made["raw"]["runs"][2]["probes"]
    assert chosen["probe_steps"] == sum(probe["steps"] for probe in probes) / chosen["steps"] and chosen["probe_seconds"] > 0
    assert any((probe["ratio"], probe["kl_weight"]) == (chosen["share"], chosen["kl"]) for probe in probes)
    assert given["share"] == 0.5 and [point["step"] for point in made["raw"]["runs"][3]["curve"]] == list(range(given["steps"] + 1))
    assert made["conditions"]["items"] == {"general": 16, "domain": 4} and str(tmp_path) not in str(made["raw"])
    out = capsys.readouterr().out
    assert "| auto, probes of a quarter | " in out and "Measured all along, 50% replay: the whole: " in out


# ---------------------------------------------------------------- figures


def one(line: str, general: str, **more) -> dict:
    return {"line": line, "seed": 0, "part": None, "share": None, "kl": 0.0, "steps": 100, "seconds": 20.0, "general": general,
            "domain": "1110", "held": None, "probes": [], "curve": []} | more


def runs() -> list[dict]:
    probes = [{"ratio": 0.5, "kl_weight": 0.0, "steps": 30, "seconds": 4.0}, {"ratio": 0.35, "kl_weight": 0.0, "steps": 20, "seconds": 3.0}]
    curve = [{"step": step, "retained": kept, "domain": 0.1} for step, kept in ((0, 1.0), (10, 0.6), (30, 0.7), (85, 0.9), (100, 0.95))]
    return [one("base", "1111100000"), one("domain only", "1000000000"),
            one("auto, probes of a half", "1111000000", part=HALF.name, share=0.5, held=False, probes=probes),
            one("50% replay: the whole", "1111110000", part=WHOLE.name, share=0.5, curve=curve)]


def test_figures_by_hand():
    domain_only, chosen, given = floor.summary(runs())
    assert (domain_only["retained"], chosen["retained"], given["retained"]) == (0.2, 0.8, 1.2) and domain_only["domain"] == 0.75
    assert (chosen["probes"], chosen["probe_steps"], chosen["probe_seconds"]) == (2, 0.5, 7.0)


def test_table_and_picture(tmp_path):
    facts = {"floor": 0.99, "epochs": 10.0, "domain": 600, "tokens": 512, "seeds": 1, "items": {"general": 10, "domain": 4},
             "watched_items": {"general": 8, "domain": 2}, "replay": SOUND, "workers": 2, "seconds": 600.0}
    made = record.make("floor-cpu", facts, {}, floor.summary(runs()), {"runs": runs()})
    text = shown(made)
    assert "| auto, probes of a half | 50% | 0 | 2 | 50% | 7 | 20 | 80.0% | 75.0% |" in text
    assert "| domain only |  |  |  |  |  | 20 | 20.0% | 75.0% |" in text
    assert "The run after 2 probes of a half missed the floor." in text
    assert "60.0% of the base's accuracy at its lowest, step 10 of 100, 70.0% after a third, 90.0% or more in the last fifth, 95.0%" in text
    assert drawn(made, tmp_path / "a.png").read_bytes() == drawn(made, tmp_path / "b.png").read_bytes()


def test_bad_options_are_one_line(capsys):
    assert main(["floor", "--workers", "0"]) == 2
    assert capsys.readouterr().err == "benchmarks.run: --workers: expected at least 1, got 0\n"
