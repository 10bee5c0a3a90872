"""Whole runs on a small model and real files: what they leave, how they stop, how they go on."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import mixtures, tiny
from tests.helpers.processes import Command, complete, complete_ranks
from tests.helpers.runs import QUESTIONS, arguments, records, weights, write_chats
from trainer.cli import parse
from trainer.config import Config
from trainer.data.prepare import prepare_data
from trainer.errors import UserError
from trainer.metrics import log
from trainer.run import train


def run(*args):
    return train(parse(Config, arguments(*args), "trainer.run"))


@pytest.mark.report
@pytest.mark.slow
def test_a_lora_run_leaves_an_adapter_that_stock_peft_loads(model_folder, chats, tmp_path):
    result = run(model_folder, chats, tmp_path / "run", "--epochs", "3", "--data.eval_fraction", "0.1", "--eval.every", "5",
                 "--export.format", "both", "--logging.tensorboard", "true")
    folder = result.folder
    losses = [r["loss"] for r in records(folder, "eval")]
    assert losses[-1] < losses[0] - 0.3 and result.eval_loss == losses[-1] and result.reason == "finished"
    steps = records(folder, "step")
    assert steps[-1]["epoch"] == 3.0 and steps[-1]["step"] == result.steps and all(r["mfu"] > 0 for r in steps)
    assert {"forward", "backward", "optimizer", "data"} <= set(steps[0]["seconds"])
    for name in ("config.yaml", "data.json", "report.html"):
        assert (folder / name).stat().st_size > 100
    assert any((folder / "tensorboard").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    ids = tokenizer("What is 3 + 4?", return_tensors="pt").input_ids
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
        assert (stock(ids).logits - base(ids).logits).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["true", "false"])
def test_a_mixture_of_experts_says_what_its_experts_carry(chats, tmp_path, capsys, experts):
    tokenizer = tiny.tokenizer()
    mixtures.model("qwen2_moe").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ("--lora.experts", experts, "--epochs", "1", "--export.format", "both", "--data.eval_fraction", "0.1")
    result = run(tmp_path / "model", chats, tmp_path / "run", *options)
    of_run = capsys.readouterr().out
    run(tmp_path / "model", chats, tmp_path / "dry", *options, "--dry_run")
    for shown in (of_run, capsys.readouterr().out):
        assert "no adapter: routers and gates: 2 x mlp.shared_expert_gate" in shown
        assert re.search(r"experts: 4 weights adapted, rank 4: \d\d% of the weights\n" if experts == "true" else
                         r"experts: carry no adapter, \d\d% of the weights stay frozen; lora.experts true adapts them\n", shown)
    losses = [r["loss"] for r in records(result.folder, "eval")]
    assert losses[-1] < losses[0] - 0.1
    ids = tokenizer("What is 3 + 4?", return_tensors="pt").input_ids
    merged, loading = AutoModelForCausalLM.from_pretrained(result.folder / "model", output_loading_info=True)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), result.folder / "adapter")
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    torch.testing.assert_close(stock.eval()(ids).logits, merged.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_full_fine_tuning_from_a_random_config(model_folder, chats, tmp_path):
    result = run(model_folder, chats, tmp_path / "run", "--model.path", "null", "--model.config", str(model_folder), "--method", "full",
                 "--epochs", "2")
    steps = records(result.folder, "step")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert AutoModelForCausalLM.from_pretrained(result.folder / "model").dtype == torch.float32


@pytest.mark.slow
def test_the_loss_is_a_mean_over_supervised_tokens_of_the_whole_step(model_folder, chats, tmp_path):
    """Small packs or large ones, the same step has the same loss and gradient norm."""
    found = {}
    for pack in (128, 512):
        folder = tmp_path / str(pack)
        # every sample in the one step, so that its contents do not depend on the packing
        run(model_folder, chats, folder, "--batch.tokens_per_pack", str(pack), "--batch.tokens_per_step", "16384", "--logging.every", "1")
        found[pack] = records(folder, "step")[0]
    assert found[128]["loss"] == pytest.approx(found[512]["loss"], rel=1e-5)
    assert found[128]["grad_norm"] == pytest.approx(found[512]["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_bf16_compute_trains(model_folder, chats, tmp_path):
    fp32 = run(model_folder, chats, tmp_path / "a", "--max_steps", "5")
    bf16 = run(model_folder, chats, tmp_path / "b", "--max_steps", "5", "--precision", "bf16")
    full = run(model_folder, chats, tmp_path / "c", "--max_steps", "5", "--precision", "bf16", "--method", "full")
    assert bf16.loss == pytest.approx(fp32.loss, rel=0.03)
    first, *_, last = records(full.folder, "step")
    assert last["loss"] < first["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_figure(model_folder, chats, tmp_path, mode):
    for name, extra in (("none", []), (mode, ["--activation_checkpointing", mode])):
        run(model_folder, chats, tmp_path / name, "--lora.dropout", "0.1", "--max_steps", "4", *extra)
    one, two = ([(r["loss"], r["grad_norm"]) for r in records(tmp_path / name, "step")] for name in ("none", mode))
    assert one == two


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_and_can_be_profiled(model_folder, chats, tmp_path, capsys):
    for name, extra in (("eager", []), ("compiled", ["--compile", "--logging.profile_steps", "4-5"])):
        run(model_folder, chats, tmp_path / name, "--max_steps", "6", "--logging.every", "3", *extra)
    assert "the host waits for the device 0 times" in capsys.readouterr().out
    one, two = ([r["loss"] for r in records(tmp_path / name, "step")] for name in ("eager", "compiled"))
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
def test_early_stopping_once_memorising_sets_in(model_folder, tmp_path):
    few = write_chats(tmp_path / "few.jsonl", QUESTIONS[:8])
    others = write_chats(tmp_path / "others.jsonl", [(q, "No. " + a) for q, a in QUESTIONS[60:80]])
    result = run(model_folder, few, tmp_path / "run", "--data.eval", str(others), "--epochs", "300", "--optim.lr", "2e-2",
                 "--optim.lr_scheduler", "constant", "--eval.every", "5", "--eval.patience", "2")
    losses = [r["loss"] for r in records(tmp_path / "run", "eval")]
    assert result.reason == "early stopping" and result.steps == 5 * (len(losses) - 1) < 300
    assert min(losses[-2:]) > losses[-3] == min(losses)


def test_a_loss_that_is_not_finite_stops_the_run(model_folder, chats, tmp_path):
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(broken)
    with pytest.raises(UserError) as raised:
        run(broken, chats, tmp_path / "run")
    message = str(raised.value)
    assert message.startswith("step 1: expected a finite loss") and "sums" in message and "last good checkpoint: none" in message


# ---------------------------------------------------------------- stopping and going on


def start(*args) -> Command:
    return Command("trainer.run", arguments(*args))


def wait_for_step(folder: Path, step: int, process: Command) -> None:
    for _ in range(3600):  # three minutes: a loaded machine is slow to start a process
        if (folder / "metrics.jsonl").exists() and any(r["step"] >= step for r in records(folder, "step")):
            return
        assert process.running, process.finish()
        time.sleep(0.05)
    raise AssertionError("the run did not get there in time")


KILLS = int(os.environ.get("STEADFAST_KILLS", "1"))  # more of them in the campaign, or by hand: each costs a start
LONG = ("--epochs", "8", "--checkpoint.every", "3", "--lora.dropout", "0.1", "--data.eval_fraction", "0.1", "--eval.every", "10")


@pytest.fixture(scope="module")
def uninterrupted(model_folder, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    run(model_folder, chats, folder, *LONG, "--checkpoint.every", "0")
    return folder


@pytest.mark.slow
def test_kill_nine_and_resume_is_bitwise_equal(model_folder, chats, tmp_path, uninterrupted):
    folder, total = tmp_path / "run", records(uninterrupted, "end")[0]["steps"]
    for cut in sorted(random.Random(0).sample(range(5, total - 5), KILLS)):
        process = start(model_folder, chats, folder, *LONG, "--resume", "auto")
        wait_for_step(folder, cut, process)
        process.send(signal.SIGKILL)
        process.finish()
    status, output, errors = start(model_folder, chats, folder, *LONG, "--resume", "auto").finish()
    assert status == 0, errors
    assert "resuming from step" in output
    for name, tensor in weights(uninterrupted).items():
        assert torch.equal(tensor, weights(folder)[name]), name
    figures = [[(r["step"], r["loss"]) for r in records(f, "eval")] for f in (folder, uninterrupted)]
    assert figures[0] == figures[1], "the record has no gap and nothing twice"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(model_folder, chats, tmp_path, number, uninterrupted):
    folder = tmp_path / "run"
    process = start(model_folder, chats, folder, *LONG, "--checkpoint.every", "0")
    wait_for_step(folder, 6, process)
    process.send(number)
    status, output, errors = process.finish()
    assert status == 128 + number, errors
    assert "continue with the same command and --resume auto" in output + errors
    result = run(model_folder, chats, folder, *LONG, "--checkpoint.every", "0", "--resume", "auto")
    assert result.reason == "finished"
    assert all(torch.equal(t, weights(folder)[n]) for n, t in weights(uninterrupted).items())


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_is_finished_by_resuming(model_folder, chats, tmp_path):
    options = ("--max_steps", "4", "--checkpoint.every", "2", "--data.eval_fraction", "0.1")
    whole = run(model_folder, chats, tmp_path / "whole", *options)
    cut = tmp_path / "cut"
    run(model_folder, chats, cut, *options)
    shutil.rmtree(cut / "adapter")  # as if killed before the export
    result = run(model_folder, chats, cut, *options, "--resume", "auto")
    assert (result.steps, result.loss, result.eval_loss) == (whole.steps, whole.loss, whole.eval_loss)
    assert all(torch.equal(t, weights(cut)[n]) for n, t in weights(tmp_path / "whole").items())


@pytest.mark.slow
def test_an_early_stop_is_not_trained_past_by_resuming(model_folder, tmp_path):
    few, others = write_chats(tmp_path / "few.jsonl", QUESTIONS[:8]), write_chats(tmp_path / "others.jsonl", [("x", "y z")] * 4)
    options = ("--data.eval", str(others), "--epochs", "300", "--optim.lr", "2e-2", "--optim.lr_scheduler", "constant",
               "--eval.every", "2", "--eval.patience", "1", "--checkpoint.every", "1")
    stopped = run(model_folder, few, tmp_path / "run", *options)
    before = weights(tmp_path / "run")
    again = run(model_folder, few, tmp_path / "run", *options, "--resume", "auto")
    assert stopped.reason == again.reason == "early stopping" and stopped.steps == again.steps < 300
    assert all(torch.equal(t, before[n]) for n, t in weights(tmp_path / "run").items())


@pytest.mark.slow
def test_a_folder_with_a_finished_run_is_not_overwritten(model_folder, chats, tmp_path):
    run(model_folder, chats, tmp_path / "run", "--max_steps", "1")
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for resume in ("never", "auto"):
        assert "holds the adapter of a finished run" in refused(model_folder, chats, tmp_path / "run", "--resume", resume)
    assert "finished run" in refused(model_folder, chats, tmp_path / "run", "--dry_run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == kept


@pytest.mark.slow
def test_another_base_is_refused_on_resume(model_folder, chats, tmp_path):
    base = shutil.copytree(model_folder, tmp_path / "base")
    options = ("--max_steps", "4", "--checkpoint.every", "2")
    run(base, chats, tmp_path / "run", *options)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(base)
    assert "base_weights was" in refused(base, chats, tmp_path / "run", *options, "--resume", "auto")


def test_parts_of_a_record_are_held_out_together(model_folder, tmp_path):
    rows = [(f"Count {i}.", f"record {i} " * 30) for i in range(20)]
    options = ("--data.on_overlong", "split", "--data.max_length", "64", "--data.eval_fraction", "0.3")
    config = parse(Config, arguments(model_folder, write_chats(tmp_path / "long.jsonl", rows), tmp_path / "run", *options), "trainer.run")
    inputs = prepare_data(config, AutoTokenizer.from_pretrained(model_folder))
    trained, evaluated = set(inputs.samples.records), set(inputs.eval_set.samples.records)
    assert len(evaluated) == 6 and len(trained) == 14 and not trained & evaluated and len(inputs.samples) > 30


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(model_folder, chats, tmp_path):
    common = ("--max_steps", "4", "--logging.every", "1", "--data.eval_fraction", "0.1")
    run(model_folder, chats, tmp_path / "one", *common)
    for status, output, errors in complete_ranks("trainer.run", arguments(model_folder, chats, tmp_path / "two", *common)):
        assert status == 0, output + errors
    one, two = (records(tmp_path / name, "step") for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 4]
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["tokens"] == b["tokens"]
    evals = [records(tmp_path / name, "eval")[-1]["loss"] for name in ("one", "two")]
    assert evals[0] == pytest.approx(evals[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("moved"))], ids=["removed", "moved"])
def test_a_folder_that_goes_during_the_run_is_written_anew(model_folder, chats, tmp_path, monkeypatch, capsys, how):
    options = ("--max_steps", "4", "--logging.every", "1", "--checkpoint.every", "1", "--logging.tensorboard", "true")
    run(model_folder, chats, tmp_path / "whole", *options)
    write = log.Log.write

    def gone_before_the_third(self, record):
        if record["kind"] == "step" and record["step"] == 3:
            how(self.path.parent)
        write(self, record)

    monkeypatch.setattr(log.Log, "write", gone_before_the_third)
    capsys.readouterr()
    run(model_folder, chats, tmp_path / "run", *options)
    assert capsys.readouterr().out.count("was removed or moved during the run: settings and records are written again") == 1
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("run", "whole")]
    assert names[0] == names[1] >= {"adapter", "config.yaml", "data.json", "metrics.jsonl", "tensorboard"}
    figures = [[(r["step"], r["loss"]) for r in records(tmp_path / name, "step")] for name in ("run", "whole")]
    assert figures[0] == figures[1] and len(figures[0]) == 4 and records(tmp_path / "run", "end")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- dry run and mistakes


def test_a_dry_run_shows_everything_and_trains_nothing(model_folder, chats, tmp_path, capsys):
    assert run(model_folder, chats, tmp_path / "run", "--dry_run") is None
    shown = capsys.readouterr().out
    assert shown.count("sample ") >= 3 and "[[" in shown and "The answer is" in shown
    assert "% full" in shown and "GB on the device" in shown and "plan: " in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fast, precision, hinted", [(True, "auto", True), (False, "auto", False), (True, "fp32", False)])
def test_a_cpu_that_could_be_faster_is_pointed_out(model_folder, chats, tmp_path, capsys, monkeypatch, fast, precision, hinted):
    monkeypatch.setattr("trainer.training.build.fast_bf16", lambda: fast)
    run(model_folder, chats, tmp_path / "run", "--max_steps", "1", "--precision", precision)
    assert ("--precision bf16" in capsys.readouterr().out) == hinted


@pytest.mark.slow
def test_a_bf16_run_pads_its_packs_and_says_so(model_folder, chats, tmp_path, capsys):
    run(model_folder, chats, tmp_path / "run", "--max_steps", "1", "--precision", "bf16")
    assert "padded to multiples of 64" in capsys.readouterr().out
    run(model_folder, chats, tmp_path / "other", "--max_steps", "1")
    assert "padded" not in capsys.readouterr().out


@pytest.mark.slow
def test_held_out_samples_that_are_trained_on_are_pointed_out(model_folder, chats, tmp_path, capsys):
    run(model_folder, chats, tmp_path / "run", "--dry_run", "--data.eval", str(chats))
    assert "eval set: 120 samples" in (shown := capsys.readouterr().out) and "WARNING: 120 of them are also trained on" in shown
    run(model_folder, chats, tmp_path / "run", "--dry_run", "--data.eval_fraction", "0.1")
    assert "eval set: 12 samples" in (shown := capsys.readouterr().out) and "WARNING" not in shown


def mistake(model_folder, chats, tmp_path, *more) -> str:
    """What a run in a process of its own says, which must be one line on standard error and status 1."""
    status, _, errors = complete("trainer.run", arguments(model_folder, chats, tmp_path / "run", *more))
    lines = errors.strip().splitlines()
    assert status == 1 and len(lines) == 1 and lines[0].startswith("trainer.run: error: "), errors
    return lines[0]


@pytest.mark.slow
def test_a_mistake_is_one_line_on_standard_error(model_folder, tmp_path):
    assert "absent.jsonl" in mistake(model_folder, tmp_path / "absent.jsonl", tmp_path)


def refused(*args) -> str:
    with pytest.raises(UserError) as raised:
        run(*args)
    assert "\n" not in str(raised.value).strip()
    return str(raised.value)


@pytest.mark.slow
def test_data_mistakes(model_folder, tmp_path):
    def given(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    out = tmp_path / "run"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    assert "line 2" in refused(model_folder, given("bad.jsonl", good + '{"messages": [\n'), out)
    assert "columns" in refused(model_folder, given("odd.jsonl", '{"foo": "a", "bar": "b"}\n'), out)
    assert "empty" in refused(model_folder, given("empty.jsonl", ""), out)
    user_only = '{"messages": [{"role": "user", "content": "a"}]}\n'
    assert "supervised" in refused(model_folder, given("user.jsonl", user_only), out)
    long = good.replace('"b"', json.dumps("b " * 500))
    assert "overlong" in refused(model_folder, given("long.jsonl", long), out)


@pytest.mark.slow
def test_model_mistakes(model_folder, chats, tmp_path):
    out = tmp_path / "run"
    assert "rank" in refused(model_folder, chats, out, "--lora.rank", "0")
    assert "rank" in refused(model_folder, chats, out, "--lora.rank", "4096")
    assert "absent" in refused(tmp_path / "absent", chats, out)
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(bare)
    assert "tokenizer" in refused(bare, chats, out)


@pytest.mark.slow
def test_resume_mistakes(model_folder, chats, tmp_path):
    out = tmp_path / "run"
    run(model_folder, chats, out, "--max_steps", "4", "--checkpoint.every", "2")
    assert "--resume auto" in refused(model_folder, chats, out, "--max_steps", "4")
    changed = refused(model_folder, chats, out, "--max_steps", "4", "--resume", "auto", "--optim.lr", "1e-4")
    assert "optim.lr was 0.005, is 0.0001" in changed
