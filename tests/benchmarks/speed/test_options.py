"""Every line is the run that it says, what an option must not change is compared, and a cost is the cost."""

import argparse

import pytest
import torch

from benchmarks.harness import show, timing
from benchmarks.harness.synthetic_models import quiet
from benchmarks.harness.timing import Contender, StepResult
from benchmarks.speed import options
from benchmarks.speed.chat_task import make_task
from benchmarks.speed.options import AGAIN, ALL_ROWS, CACHED, GRADIENT, LIVE, LOSS, NOTHING, OPTIONS, PLAIN, ROUNDED, STEPS
from trainer.errors import UserError
from trainer.model.forward import unwrap_peft
from trainer.model.fused_layers import decoder_layers, row_selecting_layer

MEASURED = ["checkpointing, full", ALL_ROWS, LIVE, CACHED, "DFT"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    quiet()
    return make_task(tmp_path_factory.mktemp("task"), count=24)


@pytest.fixture(scope="module")
def made():
    """The record of a short run, where there is no bitsandbytes."""
    with pytest.MonkeyPatch.context() as few:
        few.setattr(timing, "WARMUP", 1)
        few.setattr(options, "COMPARED", 2)
        few.setattr(options, "COUNTED", 1)
        few.setitem(options.NEEDS, "bitsandbytes", lambda: "bitsandbytes is not installed")
        return options.run(arguments("--quick", "--contenders", "QLoRA", *MEASURED))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return parser.parse_args(words)


# ---------------------------------------------------------------- lines


def test_every_contender_is_a_run_that_the_trainer_accepts(task):
    plain = options.configuration(task, OPTIONS[PLAIN], 5)
    assert (plain.lora.rank, plain.lora.path, plain.precision, plain.device) == (16, None, "fp32", "cpu")
    for name, option in OPTIONS.items():
        config = options.configuration(task, option, 5)
        config.output = plain.output
        assert (config == plain) == (name in (PLAIN, ALL_ROWS))
        for option_name, value in option.values.items():
            found = config
            for part in option_name.split("."):
                found = getattr(found, part)
            assert found == value


@pytest.mark.slow
def test_all_rows_are_computed_and_give_the_same_step(task):
    few, every = (options.build(task, OPTIONS[name], 2).steadfast for name in (PLAIN, ALL_ROWS))
    assert row_selecting_layer(unwrap_peft(few.model)) is not None and row_selecting_layer(unwrap_peft(every.model)) is None
    seen = []
    for one in (few, every):
        mlp = decoder_layers(unwrap_peft(one.model))[-1].mlp
        forward = mlp.forward
        mlp.forward = lambda x, forward=forward: (seen.append(x.shape[1]), forward(x))[1]
    work = next(few.works)
    few.works, every.works = iter([work]), iter([work])
    first, second = few.step(), every.step()
    assert float(first.loss) == pytest.approx(float(second.loss), rel=1e-6)
    assert seen == [first.supervised, first.tokens] and first.supervised < first.tokens
    with pytest.raises(ValueError, match="compute_all_rows: expected a model whose last layer computes some rows alone"):
        options.compute_all_rows(every.model)


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


def test_contenders_that_must_be_alike_are_compared_with_each_other():
    steps = [(2.0, 1.0), (2.0, 1.0), (1.9, 1.0)]
    assert set(options.agreement({PLAIN: steps, LIVE: steps, CACHED: steps})) == {LIVE, CACHED, f"{CACHED} / {LIVE}"}
    with pytest.raises(AssertionError, match=CACHED):
        options.agreement({PLAIN: steps, LIVE: steps, CACHED: [*steps[:2], (1.8, 1.0)]})


@pytest.mark.slow
def test_another_model_is_noticed(task):
    plain, other = (options.build(task, OPTIONS[name], 5) for name in (PLAIN, "checkpointing, full"))
    with torch.no_grad():
        unwrap_peft(other.steadfast.model).get_output_embeddings().weight.mul_(1.01)
    with pytest.raises(AssertionError, match="checkpointing, full: losses and gradient norms differ by"):
        options.agreement({PLAIN: plain.first_steps(), "checkpointing, full": other.first_steps()})


# ---------------------------------------------------------------- cost


def test_double_work_costs_two(monkeypatch):
    monkeypatch.setattr(timing.gc, "collect", lambda *_: 0)  # slow in a process that has run other tests
    now = [0.0]

    def contender(name: str, seconds: float) -> Contender:
        def step() -> StepResult:
            now[0] += seconds
            return StepResult(0.0, 100, 50, 0, 1e6)

        return Contender(name, step)

    three = [contender(PLAIN, 0.5), contender(AGAIN, 0.5), contender("DoRA", 1.0)]
    samples = timing.interleave(three, rounds=3, steps=2, cpu=lambda: now[0], wall=lambda: now[0])
    seconds = {PLAIN: 9.0, AGAIN: 2.0 + 0.5 * options.COMPARED, "DoRA": 4.0 + 1.0 * options.COMPARED}
    rows = {row["contender"]: row for row in options.rows_of(samples, seconds, {PLAIN: 60.0, AGAIN: 60.0, "DoRA": 80.0})}
    assert rows["DoRA"]["cost"] == {"value": 2.0, "low": 2.0, "high": 2.0} and rows[AGAIN]["cost"]["value"] == 1.0
    assert rows["DoRA"]["cpu_seconds"]["value"] == 1.0 and rows["DoRA"]["mib"] == 80.0
    assert rows["DoRA"]["steps_before"] == pytest.approx(4.0) and rows[AGAIN]["steps_before"] == 0.0  # 2 s more, of 0.5 s a step
    assert rows["DoRA"]["options"] == {"lora.dora": True}


@pytest.mark.slow
def test_a_run_has_a_row_for_every_contender(made):
    rows = {row["contender"]: row for row in made["summary"]}
    assert list(rows) == [PLAIN, *(name for name in OPTIONS if name in MEASURED), AGAIN] and made["suite"] == "options-cpu"
    assert set(made["agreement"]) == {"checkpointing, full", ALL_ROWS, LIVE, CACHED, f"{CACHED} / {LIVE}", AGAIN}
    assert max(made["agreement"].values()) < 1e-5
    assert {len({sample["tokens"] for sample in line}) for line in zip(*made["raw"].values(), strict=True)} == {1}  # the same packs
    assert rows[PLAIN]["cost"]["value"] == 1.0 and rows["checkpointing, full"]["mib"] < rows[PLAIN]["mib"] < rows[ALL_ROWS]["mib"]
    assert rows[LIVE]["cost"]["value"] > 1.2 and made["conditions"]["left_out"].keys() == {"QLoRA", *options.FREE}


@pytest.mark.slow
def test_table_and_picture(made, tmp_path):
    view = options.SUITE.views["options"]
    text = show.markdown(made, view)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [PLAIN, *(name for name in OPTIONS if name in MEASURED)]
    assert rows[2].startswith(f"| {PLAIN} | 1.00 (1.00-1.00) |") and AGAIN not in text
    assert show.draw(made, view, tmp_path / "a.png").read_bytes() == show.draw(made, view, tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_what_this_machine_has_not_is_left_out_by_name(made):
    assert "QLoRA" not in [row["contender"] for row in made["summary"]]
    assert any("QLoRA (bitsandbytes is not installed)" in detail and "rsLoRA" in detail for detail in options.caption(made).details)


@pytest.mark.parametrize("words, complaint", [
    (["--contenders", "magic"], f"--contenders: expected names of {'; '.join(OPTIONS)}, got magic"),
    (["--rounds", "1"], "--rounds: expected at least 2, got 1")])
def test_mistakes_are_one_line(words, complaint):
    with pytest.raises(UserError) as raised:
        options.run(arguments(*words))
    assert str(raised.value) == complaint
