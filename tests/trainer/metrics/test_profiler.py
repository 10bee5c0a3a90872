"""Test that a step never makes the host wait between log steps, and that `--logging.profile_steps` names the waits there are."""

import gzip
import json

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.runs import arguments
from trainer.cli import parse
from trainer.config import Config
from trainer.config_rules import profiled_steps
from trainer.errors import UserError
from trainer.metrics.profiler import HostWaits, summary, wait_lines, waits_for_device
from trainer.run import train

CPU, aten = torch.device("cpu"), torch.ops.aten
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(*args):
    return train(parse(Config, arguments(*args), "trainer.run"))


def counted(work) -> dict[str, int]:
    found = HostWaits(CPU)
    with found.watching():
        work()
    assert all("test_profiler.py" in line for _, line in found.found)
    return {operation: count for (operation, _), count in found.found.items()}


READERS = {
    "item": (lambda t: t.sum().item(), "aten._local_scalar_dense.default"),
    "bool": (lambda t: bool(t.sum() > 0), "aten._local_scalar_dense.default"),
    "float": (lambda t: float(t[0]), "aten._local_scalar_dense.default"),
    "tolist": (lambda t: t.tolist(), "tolist"),
    "cpu": (lambda t: t.cpu(), "cpu"),
    "numpy": (lambda t: t.numpy(), "numpy"),
    "nonzero": (lambda t: t.nonzero(), "aten.nonzero.default"),
    "equal": (lambda t: torch.equal(t, t.clone()), "aten.equal.default"),
    "boolean index": (lambda t: t[t > 1], "aten.index.Tensor"),
    "masked_select": (lambda t: t.masked_select(t > 1), "aten.masked_select.default"),
    "unique": (lambda t: t.unique(), "aten._unique2.default"),
    "repeat_interleave": (lambda t: t.repeat_interleave(torch.tensor([1, 2, 0])), "aten.repeat_interleave.Tensor"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_way_of_reading_back_is_counted(name):
    work, operation = READERS[name]
    t = torch.tensor([0.0, 1.0, 2.0])
    assert counted(lambda: work(t)).get(operation) == 1


def test_what_needs_no_wait_is_not_counted():
    t, places = torch.arange(6.0).view(2, 3), torch.tensor([1, 0])
    assert counted(lambda: (t[places], t.index_select(0, places), t.argmax(), t.where(t > 1, 0), t.clone().index_put_((places,), t),
                            t.double(), t.to("cpu", torch.float16))) == {}


def test_boolean_assignment_is_counted():
    t = torch.arange(3.0)

    def assign():
        t[t > 1] = torch.zeros(1)

    assert "aten.index_put_.default" in counted(assign)


def test_a_copy_between_devices_waits_unless_told_not_to():
    """The device of a meta tensor stands for a GPU."""
    there, here = torch.empty(3, device="meta"), torch.empty(3)
    assert waits_for_device(aten._to_copy.default, (there,), {"device": CPU})
    assert waits_for_device(aten.copy_.default, (here, there), {}) and waits_for_device(aten.copy_.default, (there, here), {})
    assert not waits_for_device(aten._to_copy.default, (there,), {"device": CPU, "non_blocking": True})
    assert not waits_for_device(aten.copy_.default, (here, there, True), {})
    assert not waits_for_device(aten._to_copy.default, (there,), {"dtype": torch.float16})
    assert not waits_for_device(aten.copy_.default, (here, here), {})


def test_values_of_the_host_are_its_own_to_read():
    """With a GPU as the device, reading a CPU tensor makes nobody wait."""
    found = HostWaits(torch.device("meta"))
    with found:
        torch.arange(3).sum().item()
    assert not found.found


@pytest.mark.slow
@pytest.mark.parametrize("family, extra", [
    ("llama", ["--activation_checkpointing", "full", "--lora.dropout", "0.1"]), ("llama", ["--method", "full", "--precision", "bf16"]),
    ("llama", ["--method", "qlora", "--optim.name", "adamw_8bit"]), ("gemma2", ["--lora.dora"]), ("qwen3", [])])
def test_a_step_between_log_steps_makes_the_host_wait_for_nothing(chats, tmp_path, family, extra, capsys):
    """The whole of it, with the staging of the next one: what the loop does from one step's end to the next one's."""
    model = tiny.save_model(tmp_path / "model", family)
    run(model, chats, tmp_path / "run", "--logging.every", "50", "--max_steps", "4", "--logging.profile_steps", "2-3", *extra)
    assert "step 2: the host waits for the device 0 times" in capsys.readouterr().out


@pytest.mark.slow
def test_a_log_step_is_seen_and_named(model_folder, chats, tmp_path, capsys):
    """Turned round: the same count is not zero where the loop does read back."""
    run(model_folder, chats, tmp_path / "run", "--logging.every", "2", "--logging.profile_steps", "2-4", "--max_steps", "6")
    told = capsys.readouterr().out
    assert "trainer/training/meter.py" in told and "log_interval" in told and "the host waits for the device 1 times" in told


@pytest.mark.slow
def test_the_trace_and_the_table(model_folder, chats, tmp_path):
    plain = run(model_folder, chats, tmp_path / "plain", "--max_steps", "6")
    traced = run(model_folder, chats, tmp_path / "run", "--max_steps", "6", "--logging.profile_steps", "2-5")
    assert traced.loss == plain.loss  # looking changes nothing
    folder = traced.folder / "profile"
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("optimizer") == 3 and "aten::mm" in names  # steps 3, 4 and 5
    lines = (folder / "summary.txt").read_text().splitlines()
    assert lines[0].startswith("profile: 3 steps, ") and len([x for x in lines if "%" in x]) == 10
    own = [float(line.split("%")[0].split()[-2]) for line in lines[2:12]]
    assert own == sorted(own, reverse=True) and own[0] > 0
    assert not (plain.folder / "profile").exists()


@pytest.mark.slow
def test_a_run_that_stops_early_leaves_what_it_has(model_folder, chats, tmp_path):
    """The plan is longer than patience."""
    result = run(model_folder, chats, tmp_path / "run", "--optim.lr", "1e-30", "--data.eval_fraction", "0.1", "--eval.every", "2",
                 "--eval.patience", "2", "--logging.profile_steps", "2-8")
    assert result.reason == "early stopping" and result.steps == 4
    assert (result.folder / "profile" / "summary.txt").read_text().startswith("profile: 2 steps")


@pytest.mark.slow
def test_resumed_behind_the_steps(model_folder, chats, tmp_path, capsys):
    fixed = [model_folder, chats, tmp_path / "run", "--max_steps", "6", "--checkpoint.every", "4"]
    run(*fixed)
    run(*fixed, "--resume", "auto", "--logging.profile_steps", "2-3")
    assert "profile: nothing is profiled: step 2 was done before this start, which resumes from step 4" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["20", "25-20", "0-3", "5-5", "a-b", "20:25", "-3", "1-2-3", ""])
def test_bad_steps_are_one_line(model_folder, chats, tmp_path, given):
    with pytest.raises(UserError, match="logging.profile_steps: expected FIRST-LAST, two steps with 1 <= FIRST < LAST, as in 20-25"):
        run(model_folder, chats, tmp_path / "run", f"--logging.profile_steps={given}")
    assert not (tmp_path / "run").exists()


def test_steps_beyond_the_run_are_one_line(model_folder, chats, tmp_path):
    with pytest.raises(UserError, match=r"logging.profile_steps: expected steps of this run, which has 6, got 5-7"):
        run(model_folder, chats, tmp_path / "run", "--max_steps", "6", "--logging.profile_steps", "5-7")


def test_steps_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("logging: {profile_steps: 20-25}\n")
    assert profiled_steps(parse(Config, ["--config", str(path)], "trainer.run").logging.profile_steps) == range(20, 26)


def test_the_summary_of_a_gpu_counts_its_own_time_and_its_waits():
    class Event:
        def __init__(self, key, device, cpu, count=2):
            self.key, self.self_device_time_total, self.self_cpu_time_total = key, device, cpu
            self.cpu_time_total, self.count, self.is_user_annotation = cpu, count, False

    found = HostWaits(torch.device("cuda"))
    found.found["aten.nonzero.default", "trainer/training/loop.py:1 f"] = 3
    found.by_torch = 3
    text = summary([Event("slow", 3000.0, 1.0), Event("fast", 1000.0, 9000.0), Event("cudaDeviceSynchronize", 0.0, 500.0)], 2, found, 20)
    assert text.splitlines()[0].startswith("profile: 2 steps, 2.00 ms a step on the GPU")
    assert [line.split() for line in text.splitlines()[2:4]] == [["slow", "1.500", "75.0%", "1.0"], ["fast", "0.500", "25.0%", "1.0"]]
    assert ["cudaDeviceSynchronize", "0.250", "1.0"] in [line.split() for line in text.splitlines()]
    assert wait_lines(found, 20)[0] == "step 20: the host waits for the device 3 times (torch's sync debug mode counts 3):"


@needs_cuda
def test_torchs_own_debug_mode_finds_no_wait_in_a_step_on_a_gpu(model_folder, chats, tmp_path, capsys):
    run(model_folder, chats, tmp_path / "run", "--device", "cuda", "--precision", "bf16", "--logging.every", "50", "--max_steps", "6",
        "--logging.profile_steps", "4-6")
    assert "step 4: the host waits for the device 0 times (torch's sync debug mode counts 0)" in capsys.readouterr().out


@needs_cuda
def test_torchs_own_debug_mode_counts_too():
    found = HostWaits(torch.device("cuda"))
    t = torch.ones(3, device="cuda")
    with found.watching():
        t.sum().item()
    assert sum(found.found.values()) == 1 and found.by_torch >= 1
