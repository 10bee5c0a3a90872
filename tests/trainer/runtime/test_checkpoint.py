"""Checkpoints are whole or absent, belong to one configuration, and the newest ones are kept."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from trainer.config import Config, Data, Optim
from trainer.errors import UserError
from trainer.optim.adamw import FlatAdamW
from trainer.runtime import checkpoint
from trainer.runtime.checkpoint import State


def optimizer(seed: int = 0) -> FlatAdamW:
    torch.manual_seed(seed)
    model = nn.Linear(6, 4)
    made = FlatAdamW(model.parameters(), Optim())
    model(torch.randn(3, 6)).sum().backward()
    made.step(0.1)
    return made


def state(step: int, **identity) -> State:
    return State(step=step, loss=1.25, eval_loss=1.75, best_eval_loss=1.5, evals_since_best=2, identity=identity)


def test_round_trip_and_keep_last(tmp_path):
    saved = optimizer()
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, state(step, a=1), saved, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000020", "step-00000030"]
    other = optimizer(seed=5)
    back = checkpoint.load(checkpoint.newest(tmp_path), {"a": 1}, other)
    assert back == state(30, a=1)
    for name, tensor in saved.state().items():
        assert torch.equal(tensor, other.state()[name]), name


def test_a_changed_configuration_is_refused_by_name(tmp_path):
    config = Config(data=Data(train="a.jsonl"))
    checkpoint.save(tmp_path, State(checkpoint.identity(config, 1, samples="f1"), step=1), optimizer(), keep=1)
    config.optim.lr, config.logging.every, config.data.num_proc = 0.5, 99, 7
    with pytest.raises(UserError) as raised:
        checkpoint.load(checkpoint.newest(tmp_path), checkpoint.identity(config, 1, samples="f2"), optimizer())
    message = str(raised.value)
    assert "optim.lr was 0.0002, is 0.5" in message and "samples was f1, is f2" in message
    assert "logging" not in message and "num_proc" not in message


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch, error):
    made = optimizer()
    checkpoint.save(tmp_path, state(1), made, keep=1)

    def refuse(tensors, path):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(UserError) as raised:
        checkpoint.save(tmp_path, state(2), made, keep=1)
    assert "the disk is full" in str(raised.value) and "step-00000001, is whole" in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load(checkpoint.newest(tmp_path), {}, optimizer()).step == 1


def test_a_kill_while_writing_is_as_if_it_never_began(tmp_path, monkeypatch):
    made = optimizer()
    checkpoint.save(tmp_path, state(1), made, keep=1)
    monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, state(2), made, keep=1)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    checkpoint.save(tmp_path, state(2), made, keep=1)
    assert checkpoint.newest(tmp_path).name == "step-00000002"


def test_differences_name_nested_options():
    found = checkpoint.differences({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3})
    assert found == ["a.c was [1], is [2]", "d was 2, is None", "e was None, is 3"]
