"""The device of a run on machines with GPUs, which this one need not have: torch is told of some."""

from contextlib import nullcontext

import pytest
import torch

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import Distributed, process_group


@pytest.fixture
def gpus(monkeypatch):
    """Let torch find as many GPUs as asked for."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.mark.parametrize("option", ["auto", "cuda"])
def test_a_gpu_has_the_index_of_its_rank(gpus, option):
    gpus(4)
    assert choose_device(option) == torch.device("cuda", 0)
    assert choose_device(option, 3) == torch.device("cuda", 3)
    assert choose_device("cpu", 3) == torch.device("cpu")


def test_ranks_without_a_gpu_are_told(gpus):
    gpus(2)
    with pytest.raises(UserError, match="^device: expected a GPU for each rank on this machine, found 2 for rank 2 .*fewer ranks"):
        choose_device("auto", 2)
    gpus(0)
    assert choose_device("auto", 2) == torch.device("cpu")
    with pytest.raises(UserError, match="^device: expected a CUDA GPU, found none"):
        choose_device("cuda")


@pytest.mark.parametrize("device,backend", [(torch.device("cuda", 1), "nccl"), (torch.device("cpu"), "gloo")])
def test_a_process_group_knows_its_gpu(monkeypatch, device, backend):
    current, groups, ended = [], [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **options: groups.append((name, options.get("device_id"))))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(distributed, "ending_together", lambda rank, size: nullcontext())
    on_gpu = device.type == "cuda"
    with process_group(device) as dist:
        assert dist == Distributed(1, 2) and groups == [(backend, device if on_gpu else None)] and current == [device] * on_gpu
    assert ended


def test_ranks_that_torchrun_restarts_meet_apart_from_those_before(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 1, 2)]))
    assert distributed._meeting() == {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    meeting = distributed._meeting()
    meeting.pop("store").set("address", "new")
    assert store.get("restart-1/address") == b"new" and meeting == {"rank": 1, "world_size": 2}
