"""Every line is the run that it says, what an option must not change is compared, and a cost is the cost."""

import argparse

import pytest
import torch

from benchmarks import plot
from benchmarks.harness import timing
from benchmarks.harness.timing import Line, StepResult
from benchmarks.speed import options, training
from benchmarks.speed.options import AGAIN, ALL_ROWS, GRADIENT, LINES, LIVE, LOSS, NOTHING, PLAIN, ROUNDED, STEPS, STORED, WithOptions
from trainer.errors import UserError
from trainer.model.forward import unwrap_peft
from trainer.model.fused_layers import decoder_layers, row_selecting_layer

MEASURED = ["checkpointing, full", ALL_ROWS, LIVE, STORED, "DFT"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    training.quiet()
    with pytest.MonkeyPatch.context() as few:
        few.setattr(training, "CHATS", 24)
        return training.make_setting(tmp_path_factory.mktemp("setting"), None)


@pytest.fixture(scope="module")
def made():
    """The record of a short run, where there is no bitsandbytes."""
    with pytest.MonkeyPatch.context() as few:
        few.setattr(training, "CHATS", 24)
        few.setattr(timing, "WARMUP", 1)
        few.setattr(options, "COMPARED", 2)
        few.setattr(options, "COUNTED", 1)
        few.setitem(options.NEEDS, "bitsandbytes", lambda: "bitsandbytes is not installed")
        return options.run(arguments("--rounds", "2", "--steps", "1", "--lines", "QLoRA", *MEASURED))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return parser.parse_args(words)


# ---------------------------------------------------------------- lines


def test_every_line_is_a_run_that_the_trainer_accepts(setting):
    plain = options.configuration(setting, LINES[PLAIN], 5)
    assert (plain.lora.rank, plain.lora.path, plain.precision, plain.device) == (16, None, "fp32", "cpu")
    for name, option in LINES.items():
        config = options.configuration(setting, option, 5)
        config.output = plain.output
        assert (config == plain) == (name in (PLAIN, ALL_ROWS))
        for option_name, value in option.values.items():
            found = config
            for part in option_name.split("."):
                found = getattr(found, part)
            assert found == value


def test_all_rows_are_computed_and_give_the_same_step(setting):
    few, every = WithOptions(setting, LINES[PLAIN], 2), WithOptions(setting, LINES[ALL_ROWS], 2)
    assert row_selecting_layer(unwrap_peft(few.job.model)) is not None and row_selecting_layer(unwrap_peft(every.job.model)) is None
    seen = []
    for line in (few, every):
        mlp = decoder_layers(unwrap_peft(line.job.model))[-1].mlp
        forward = mlp.forward
        mlp.forward = lambda x, forward=forward: (seen.append(x.shape[1]), forward(x))[1]
    work = next(few.works)
    every.works = iter([work])
    few.works = iter([work])
    first, second = few.step(), every.step()
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert seen == [first.supervised, first.tokens] and first.supervised < first.tokens
    with pytest.raises(ValueError, match="compute_all_rows: expected a model whose last layer computes some rows alone"):
        options.compute_all_rows(every.job.model)


# ---------------------------------------------------------------- agreement


@pytest.mark.parametrize(("same", "theirs", "worst"), [
    (STEPS, [(2.0, 1.0), (2.0, 1.00004)], 4e-5), (GRADIENT, [(2.0, 1.00004), (3.0, 3.0)], 4e-5), (LOSS, [(2.0, 5.0), (3.0, 3.0)], 0.0),
    (ROUNDED, [(2.02, 5.0), (3.0, 3.0)], 0.01 / 1.01), (NOTHING, [(9.0, 9.0), (9.0, 9.0)], None)])
def test_what_an_option_must_not_change_is_compared(same, theirs, worst):
    ours = [(2.0, 1.0), (2.0, 1.0)]
    assert options.difference("x", same, ours, theirs) == (worst if worst is None else pytest.approx(worst, rel=1e-3))


@pytest.mark.parametrize(("same", "theirs"), [
    (STEPS, [(2.0, 1.0), (2.001, 1.0)]), (STEPS, [(2.0, 1.0), (2.0, 1.001)]), (GRADIENT, [(2.0, 1.001), (2.0, 1.0)]),
    (LOSS, [(2.001, 1.0), (2.0, 1.0)]), (ROUNDED, [(2.1, 1.0), (2.0, 1.0)]), (LOSS, [(float("nan"), 1.0), (2.0, 1.0)]),
    (STEPS, [(2.0, 1.0), (2.0, float("nan"))])])
def test_a_difference_stops_the_run(same, theirs):
    with pytest.raises(AssertionError, match=f"a line: {same} differ by .*, more than"):
        options.difference("a line", same, [(2.0, 1.0), (2.0, 1.0)], theirs)


def test_lines_that_must_be_alike_are_compared_with_each_other():
    steps = [(2.0, 1.0), (2.0, 1.0), (1.9, 1.0)]
    assert set(options.agreement({PLAIN: steps, LIVE: steps, STORED: steps})) == {LIVE, STORED, f"{STORED} / {LIVE}"}
    with pytest.raises(AssertionError, match=STORED):
        options.agreement({PLAIN: steps, LIVE: steps, STORED: [*steps[:2], (1.8, 1.0)]})


def test_another_model_is_noticed(setting):
    plain, other = WithOptions(setting, LINES[PLAIN], 5), WithOptions(setting, LINES["checkpointing, full"], 5)
    with torch.no_grad():
        unwrap_peft(other.job.model).get_output_embeddings().weight.mul_(1.01)
    with pytest.raises(AssertionError, match="checkpointing, full: losses and gradient norms differ by"):
        options.agreement({PLAIN: plain.first_steps(), "checkpointing, full": other.first_steps()})


# ---------------------------------------------------------------- cost


def test_double_work_costs_two(monkeypatch):
    monkeypatch.setattr(timing.gc, "collect", lambda *_: 0)  # slow in a process that has run other tests
    now = [0.0]

    def line(name: str, seconds: float) -> Line:
        def step() -> StepResult:
            now[0] += seconds
            return StepResult(0.0, 100, 50, 0, 1e6)

        return Line(name, step)

    lines = [line(PLAIN, 0.5), line(AGAIN, 0.5), line("DoRA", 1.0)]
    samples = timing.interleave(lines, rounds=3, steps=2, cpu=lambda: now[0], wall=lambda: now[0])
    seconds = {PLAIN: 9.0, AGAIN: 2.0 + 0.5 * options.COMPARED, "DoRA": 4.0 + 1.0 * options.COMPARED}
    rows = {row["line"]: row for row in options.rows_of(samples, seconds, {PLAIN: 60.0, AGAIN: 60.0, "DoRA": 80.0})}
    assert rows["DoRA"]["cost"] == {"value": 2.0, "low": 2.0, "high": 2.0} and rows[AGAIN]["cost"]["value"] == 1.0
    assert rows["DoRA"]["cpu_seconds"]["value"] == 1.0 and rows["DoRA"]["mib"] == 80.0
    assert rows["DoRA"]["steps_before"] == pytest.approx(4.0) and rows[AGAIN]["steps_before"] == 0.0  # 2 s more, of 0.5 s a step
    assert rows["DoRA"]["options"] == {"lora.dora": True}


def test_a_run_has_a_row_for_every_line(made):
    rows = {row["line"]: row for row in made["summary"]}
    assert list(rows) == [PLAIN, *(name for name in LINES if name in MEASURED), AGAIN] and made["suite"] == "options-cpu"
    assert set(made["agreement"]) == {"checkpointing, full", ALL_ROWS, LIVE, STORED, f"{STORED} / {LIVE}", AGAIN}
    assert max(made["agreement"].values()) < 1e-5
    assert {len({sample["tokens"] for sample in line}) for line in zip(*made["raw"].values(), strict=True)} == {1}  # the same packs
    assert rows[PLAIN]["cost"]["value"] == 1.0 and rows["checkpointing, full"]["mib"] < rows[PLAIN]["mib"] < rows[ALL_ROWS]["mib"]
    assert rows[LIVE]["cost"]["value"] > 1.2 and made["conditions"]["left_out"].keys() == {"QLoRA", "rsLoRA"}


def test_table_and_picture(made, tmp_path):
    text = plot.markdown(made)
    lines = text.splitlines()
    assert len(lines) == 2 + 1 + len(MEASURED) + 2 and [line.split(" | ")[0][2:] for line in lines[3:-2]] == [
        name for name in LINES if name in MEASURED]
    assert lines[2].startswith(f"| {PLAIN} | 1.00 (1.00-1.00) |") and AGAIN not in text and "No line of rsLoRA: it changes" in text
    assert plot.draw(made, tmp_path / "a.png").read_bytes() == plot.draw(made, tmp_path / "b.png").read_bytes()


def test_what_this_machine_has_not_is_left_out_by_name(made):
    assert "QLoRA" not in [row["line"] for row in made["summary"]]
    assert "No line of QLoRA: bitsandbytes is not installed." in options.conditions(made)


@pytest.mark.parametrize("words, complaint", [
    (["--lines", "magic"], f"--lines: expected names of {', '.join(LINES)}, got magic"),
    (["--rounds", "1"], "--rounds, --steps: expected at least 2 and 1, got 1 and 2")])
def test_mistakes_are_one_line(words, complaint):
    with pytest.raises(UserError) as raised:
        options.run(arguments(*words))
    assert str(raised.value) == complaint
