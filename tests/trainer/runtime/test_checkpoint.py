"""Checkpoints are whole or absent, belong to one configuration, and the newest ones are kept."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.checksums import write_checksum
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


def edit_state(**changes):
    return lambda path: (path / "state.json").write_text(json.dumps(json.loads((path / "state.json").read_text()) | changes))


def edit_tensors(change):
    def edit(path: Path) -> None:
        tensors = load_file(path / "state.safetensors")
        save_file(change({name: tensor.clone() for name, tensor in tensors.items()}), path / "state.safetensors")

    return edit


def overwrite(name: str, start: int, data: bytes | None):
    """Damage bytes counted from the end of a file: write `data`, or flip one bit."""
    def edit(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[start] ^= 1
        if data is not None:
            content[start : start + len(data)] = data
        (path / name).write_bytes(content)

    return edit


DAMAGE = {
    "a flipped bit": overwrite("state.safetensors", -40, None),
    "a zeroed block": overwrite("state.safetensors", -700, bytes(500)),
    "a flipped bit in a checksum": overwrite("state.safetensors.xxh3", 3, None),
    "no checksum": lambda path: (path / "state.json.xxh3").unlink(),
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "fp16": edit_tensors(lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}),
    "a moment of another shape": edit_tensors(lambda tensors: tensors | {"0.exp_avg": torch.zeros(3)}),
    "a missing tensor": edit_tensors(lambda tensors: {name: tensors[name] for name in tensors if name != "1.exp_avg"}),
    "another step": edit_state(step=14),
    "a step that is no number": edit_state(step="two"),
    "an identity that is no mapping": edit_state(identity=[1]),
    "an unknown entry": edit_state(lr=1),
    "no mapping": lambda path: (path / "state.json").write_text("5"),
    "deep JSON": lambda path: (path / "state.json").write_text("[" * 100_000),
    "no text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("fresh_checksums", [False, True])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_one_line_that_names_the_checkpoint_before(tmp_path, damage, fresh_checksums):
    made = optimizer()
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step, a=1), made, keep=2)
    newest = checkpoint.newest(tmp_path)
    damage(newest)
    checksums_alone = damage in [DAMAGE[name] for name in ("a flipped bit", "a zeroed block", "a flipped bit in a checksum", "no checksum")]
    if fresh_checksums and not checksums_alone:  # then the content itself has to be refused
        for name in checkpoint.FILES:
            if (newest / name).exists():
                write_checksum(newest / name)
    other = optimizer(seed=5)
    before = {name: tensor.clone() for name, tensor in other.state().items()}
    checkpoint.has_ended(newest), checkpoint.kept_steps(tmp_path)
    with pytest.raises(UserError) as raised:
        checkpoint.load(newest, {"a": 1}, other)
    assert str(newest) in str(raised.value) and "remove it to resume from step-00000001" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state().items())
    assert checkpoint.load(tmp_path / "step-00000001", {"a": 1}, other).step == 1


def test_the_only_checkpoint_is_removed_to_start_again(tmp_path):
    (checkpoint.save(tmp_path, state(1), optimizer(), keep=1) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="remove it to start again"):
        checkpoint.load(checkpoint.newest(tmp_path), {}, optimizer())


def test_differences_name_nested_options():
    found = checkpoint.differences({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3})
    assert found == ["a.c was [1], is [2]", "d was 2, is None", "e was None, is 3"]
