"""The run's page: it says what the run logged, it needs nothing beside it, and a run cut short still gets one."""

import base64
import json
import re

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from tests.helpers.runs import text_of
from trainer.errors import UserError
from trainer.report import answers, page, run_page, run_plots, run_records
from trainer.report.run_page import write_report
from trainer.report.run_records import read_run

PNG = b"\x89PNG\r\n\x1a\n"


def step(number: int, loss: float = 2.0, **more) -> dict:
    seconds = {"data": 0.1, "forward": 1.0, "backward": 2.0, "optimizer": 0.4}
    return {"kind": "step", "step": number, "loss": loss, "lr": 1e-4, "tokens_per_s": 1000.0 + number,
            "supervised_per_s": 400.0, "mfu": None, "memory_gb": 1.5, "seconds": seconds} | more


def evaluation(number: int, loss: float) -> dict:
    return {"kind": "eval", "step": number, "loss": loss, "tokens": 10}


def end(steps: int, reason: str = "finished", **more) -> dict:
    totals = {"steps": steps, "seconds": 150.0, "tokens": 20_000, "supervised": 8_000}
    return {"kind": "end", "step": 20, "reason": reason} | totals | more


def source(name: str, role: str, epoch_samples: int, share_samples: float, share_tokens: float) -> dict:
    return {"name": name, "role": role, "samples": 100, "tokens": 5000, "supervised": 900, "kept": 100, "dropped": 7,
            "truncated": 3, "split": 2, "tokens_lost": 1234, "epoch_samples": epoch_samples,
            "share_samples": share_samples, "share_tokens": share_tokens}


DATA = {
    "sources": [source("gsm8k", "domain", 100, 0.75, 0.6), source("<b>general</b>", "replay", 250, 0.25, 0.4)],
    "lengths": [10, 20, 30, 200] * 5, "pack_fill": [256, 250, 128], "tokens_per_pack": 256, "packing_efficiency": 0.825,
    "model": {"path": "m/llama", "family": "llama", "parameters": 7_000_000, "trainable": 350_000},
    "backends": {"attention": "sdpa per sample"},
}
COMMAND = "python -m trainer.run --seed 17"
CONFIG = {"seed": 17, "optim": {"lr": 1e-4}, "versions": {"torch": "2.13.0"}, "command": COMMAND}


def run_folder(folder, records=(), data=None, config=None):
    folder.mkdir(exist_ok=True)
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if data is not None:
        (folder / "data.json").write_text(json.dumps(data))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def page_of(folder) -> str:
    write_report(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    records = [step(10, 2.5), evaluation(10, 2.25), step(20, 1.5), evaluation(20, 1.125), end(20)]
    folder = run_folder(tmp_path_factory.mktemp("run") / "my-run", records, DATA, CONFIG)
    return folder, page_of(folder)


@pytest.mark.slow
def test_the_page_says_what_the_run_logged(whole):
    text = text_of(whole[1])
    assert "my-run Finished 20 steps in 2 min 30 s. Eval loss fell from 2.25 to 1.125." in text
    assert "Eval loss 1.125 best, at step 20" in text
    assert "Real tokens/s 1.01k median; 400 supervised" in text
    assert "Tokens seen 20k 40.0% supervised" in text
    assert "gsm8k domain 100 5k 7 3 2 0 0 1,234 100 1 75.0% 60.0%" in text
    assert "replay 100 5k 7 3 2 0 0 1,234 250 2.5 25.0% 40.0%" in text
    assert "Replay is 25.0% of the samples and 40.0% of the tokens." in text
    assert "20 samples: median 25, mean 65, longest 200 tokens." in text
    assert "3 packs in the first epoch: 82.6% full, the emptiest 50.0%." in text
    assert "trainable 350k (5.00%)" in text
    assert "attention sdpa per sample" in text and "torch 2.13.0" in text
    assert "seed: 17" in text and f"Made by {COMMAND}" in text


def test_the_page_stands_alone(whole):
    """Every address in it is data, and no script runs."""
    addresses = re.findall(r"""(?:src|srcset|href)=["']([^"']*)""", whole[1])
    assert len(addresses) == 1 + 2 * 6
    assert all(address.startswith("data:") for address in addresses)
    assert "<script" not in whole[1] and "url(" not in whole[1] and "@import" not in whole[1]


@pytest.mark.slow
def test_images_are_embedded_and_left_beside(whole):
    folder, html = whole
    embedded = [base64.b64decode(image) for image in re.findall(r'img src="data:image/png;base64,([^"]*)', html)]
    names = ["loss", "learning_rate", "throughput", "lengths", "pack_fill", "mixture"]
    beside = [(folder / f"{name}.png").read_bytes() for name in names]
    assert sorted(embedded) == sorted(beside)
    assert all(image.startswith(PNG) for image in embedded)


def test_names_are_escaped(whole):
    assert "&lt;b&gt;general&lt;/b&gt;" in whole[1]
    assert "<b>general" not in whole[1]


@pytest.mark.parametrize("records, sentence", [
    ([], "No step was logged."),
    ([step(1)], "No end was logged after 1 step: the run was killed, or is still running."),
    ([step(5), end(5, "max_steps")], "Stopped at its limit of 5 steps in 2 min 30 s."),
    ([step(5, 1.0), step(9, 2.0), end(9, "signal")], "run the same command with --resume auto. Training loss rose from 1 to 2."),
    ([step(5), end(5, "early stopping")], "Stopped early after 5 steps in 2 min 30 s: the eval loss stopped falling"),
    ([step(5), end(5, "disk full", seconds=3.0)], "Ended after 5 steps in 3 s: disk full."),
    ([step(5), step(6, float("nan"))], "Training loss went from 2 to nan."),
])
def test_outcome(tmp_path, records, sentence):
    run = read_run(run_folder(tmp_path, records))
    assert sentence in run_page.outcome(run)


def test_a_resumed_run_counts_each_step_once(tmp_path):
    """Killed at step 40 with a checkpoint at 20: what was logged after 20 was undone."""
    undone = [step(30, 9.0), step(40, 9.0), evaluation(40, 9.0), end(40, "signal")]
    records = [step(10), step(20), evaluation(20, 2.0), *undone, step(30, 1.5), step(35, 1.25)]
    run = read_run(run_folder(tmp_path, records))
    assert [(record["step"], record["loss"]) for record in run.steps] == [(10, 2.0), (20, 2.0), (30, 1.5), (35, 1.25)]
    assert [record["step"] for record in run.evaluations] == [20]
    assert run.end is None


def test_an_evaluation_and_a_step_of_the_same_number_are_both_kept(tmp_path):
    run = read_run(run_folder(tmp_path, [evaluation(10, 2.0), step(10), step(20), evaluation(20, 1.0)]))
    assert [len(run.steps), len(run.evaluations)] == [2, 2]


def test_of_very_many_steps_some_are_held_and_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(run_records, "MOST_STEPS", 20)
    lines = [{"kind": "step", "step": step, "loss": 1.0} for step in [*range(1, 70), *range(50, 100)]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    steps = [record["step"] for record in run.steps]
    assert run.every == 6 and len(steps) <= 21 and steps[0] == 1 and steps[-1] == 99 and steps == sorted({*steps})
    assert "1 in 6" in {fact.value for fact in run_page.facts(run)}


def test_torn_lines_are_counted_and_shown(tmp_path):
    run_folder(tmp_path, [step(1)])
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"kind": "step", "st' + json.dumps(step(2)) + "\n" + json.dumps(step(3)) + "\n{")
    run = read_run(tmp_path)
    assert [record["step"] for record in run.steps] == [1, 3]
    assert run.unreadable == 2
    assert "could not be read: 2" in text_of(page_of(tmp_path))


def test_time_by_phase(tmp_path):
    """20 logged steps of 3.5 s, 10 at a time, in a run of 150 s: what is left over is evaluation and saving."""
    run = read_run(run_folder(tmp_path, [step(10), step(20), end(20)]))
    found = {phase.name: (round(phase.seconds, 9), round(phase.share, 9)) for phase in run_page.phases(run)}
    expected = {"data": 2.0, "forward": 20.0, "backward": 40.0, "optimizer": 8.0, "evaluation, saving": 80.0}
    assert found == {name: (seconds, round(seconds / 150, 9)) for name, seconds in expected.items()}


@pytest.mark.parametrize("records, data, config", [
    ([], None, None),
    ([], {}, {}),
    ([], DATA, None),
    ([step(1)], None, None),
    ([step(1, float("nan")), end(1)], {"sources": [{"name": "a", "role": "domain"}]}, {"versions": None}),
    ([{"kind": "step", "step": 1, "loss": None}, {"kind": "end", "step": 1, "steps": 1, "reason": "finished"}], None, CONFIG),
], ids=["nothing", "empty files", "no metrics", "one step", "nan", "few keys"])
def test_a_run_cut_short_gets_its_page(tmp_path, records, data, config):
    html = page_of(run_folder(tmp_path, records, data, config))
    assert html.rstrip().endswith("</html>")
    assert f"<h1>{tmp_path.name}</h1>" in html
    assert "None" not in text_of(html) and "Undefined" not in html


def drawn(plot_made_by, monkeypatch):
    """The axes of the plot that `plot_made_by()` makes, in the light theme."""
    caught = {}
    monkeypatch.setattr(run_plots, "plot", lambda name, title, caption, draw, height=0: caught.update(draw=draw))
    plot_made_by()
    axes = Figure().subplots()
    caught["draw"](axes, page.LIGHT)
    return axes


def test_the_loss_plot_shows_both_losses(tmp_path, monkeypatch):
    run = read_run(run_folder(tmp_path, [step(10, 3.0), evaluation(10, 2.5), step(20, 2.0), evaluation(20, 1.5)]))
    lines = drawn(lambda: run_plots.loss_plot(run), monkeypatch).lines
    shown = {line.get_label(): line.get_xydata().tolist() for line in lines}
    assert shown == {"training": [[10, 3.0], [20, 2.0]], "eval": [[10, 2.5], [20, 1.5]]}


def test_a_long_loss_curve_is_smoothed_in_place(tmp_path, monkeypatch):
    """The mean over a window stands at the window's middle: on a straight line it lies on that line."""
    run = read_run(run_folder(tmp_path, [step(i, 0.5 * i) for i in range(1, 101)]))
    raw, smooth = (line.get_xydata() for line in drawn(lambda: run_plots.loss_plot(run), monkeypatch).lines)
    assert len(raw) == 100 and len(smooth) < 100
    assert np.abs(smooth[:, 1] - 0.5 * smooth[:, 0]).max() <= 0.25 + 1e-9


def test_many_sources_are_summed_up(monkeypatch):
    sources = [source(f"s{i}", "domain", 1, 0.05, 0.05) for i in range(20)]
    axes = drawn(lambda: run_plots.mixture_plot(sources), monkeypatch)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"s{i}" for i in range(9)] + ["11 others"]
    assert [round(bar.get_width(), 6) for bar in axes.containers[0]] == [5.0] * 9 + [55.0]


def test_histograms_count_everything(monkeypatch):
    lengths = np.array([1, 1, 7, 4096])
    assert sum(bar.get_height() for bar in drawn(lambda: run_plots.lengths_plot(lengths), monkeypatch).patches) == 4
    fill = np.array([0.01, 0.5, 1.0, 1.0])
    assert sum(bar.get_height() for bar in drawn(lambda: run_plots.pack_fill_plot(fill), monkeypatch).patches) == 4


@pytest.mark.parametrize("say, value, expected", [
    (page.number, 12345, "12,345"), (page.number, 1234.5, "1,234"), (page.number, 1.51834, "1.518"),
    (page.number, None, "–"), (page.compact, 950, "950"), (page.compact, 3120, "3.12k"), (page.compact, -2500, "-2.5k"),
    (page.compact, 999_999, "1M"), (page.compact, 7_150_000, "7.15M"), (page.compact, 1.2e9, "1.2B"),
    (page.percent, 0.1234, "12.3%"), (page.percent, None, "–"), (page.duration, 4.25, "4.25 s"),
    (page.duration, 59.99, "1 min 0 s"), (page.duration, 724, "12 min 4 s"), (page.duration, 11_100, "3 h 5 min"),
    (run_plots.scientific, 2e-4, "2e-4"), (run_plots.scientific, 1.5e-5, "1.5e-5"), (run_plots.scientific, 0.0, "0"),
    (run_plots.scientific, float("nan"), "nan"),
])
def test_numbers_in_words(say, value, expected):
    assert say(value) == expected


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="expected a run folder, found none at .*absent"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize("name, content, message", [
    ("data.json", "{", "cannot read .*data.json"),
    ("data.json", "[1]", "expected a mapping in .*data.json, found list"),
    ("config.yaml", "a: [", "cannot read .*config.yaml"),
])
def test_files_that_no_run_writes(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow(10)
def test_in_a_browser_the_page_fits_is_readable_and_reachable(browser, tmp_path):
    """With everything that a run can have: a floor, a search, answers side by side."""
    scores = {"kind": "forgetting", "general": 0.91, "general_base": 0.95, "general_retained": 0.95, "general_lost": 12,
              "general_gained": 3, "general_kl": 0.0123, "general_interval": [0.85, 0.95], "domain": 0.75, "domain_base": 0.1,
              "domain_kl": 1.25, "domain_interval": [0.6, 0.85], "floor": 0.9}
    records = [scores | {"step": 0, "general": 0.95, "domain": 0.1}, step(10, 2.5, kl=0.2), evaluation(10, 2.25),
               scores | {"step": 10, "holds_floor": True}, step(20, 1.5, kl=0.1), evaluation(20, 1.125),
               scores | {"step": 20, "holds_floor": False, "general": 0.5}, end(20)]
    folder = run_folder(tmp_path / "a-run-of-a-very-long-name-that-has-no-end-and-no-spaces", records, DATA, CONFIG)
    probe = {"ratio": 0.05, "kl_weight": 0.3, "steps": 5, "tokens": 900, "seconds": 12.5, "general": 0.9, "general_retained": 0.94,
             "domain": 0.8, "holds_floor": False}
    choice = probe | {"ratio": 0.1, "holds_floor": True}
    (folder / "replay_search.json").write_text(json.dumps({"probes": [probe, choice], "choice": choice}))
    pairs = [answers.Answers("held out", "sums", "Why? " * 90, "The cat sat.", "The dog sat.", True, False, "A dog."),
             answers.Answers("forgotten", "items", "x" * 300, "y" * 300, "", True, True)]
    answers.write(folder, pairs)
    write_report(folder)
    assert "Probe runs" in (html := (folder / "report.html").read_text()) and "<ins>dog</ins>" in html and "Measurements" in html
    assert browser.mistakes((folder / "report.html").as_uri(), tmp_path) == []
