"""The fake GPU sees what a GPU would refuse or wait for: else the other tests here would prove nothing."""

import pytest
import torch

from tests.helpers.fake_gpu import recorded


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), torch.nonzero, lambda x: x.cpu(), lambda x: x.copy_(torch.zeros(4)),
                                  lambda x: torch.cuda.synchronize()])
def test_waits_are_seen(device, wait):
    x = torch.ones(4, device=device)
    with recorded() as calls:
        wait(x)
    assert calls.waits


def test_what_does_not_wait_is_not_taken_for_it(device):
    x, pinned = torch.ones(4, device=device), torch.zeros(4).pin_memory()
    with recorded() as calls:
        x.copy_(pinned, non_blocking=True)
        x.add_(1)
    assert not calls.waits and not calls.faults and len(calls.launches) == 2


@pytest.mark.parametrize("forbidden", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()])
def test_waits_in_a_captured_graph_are_errors(device, forbidden):
    x = torch.ones(4, device=device)
    with recorded() as calls, pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        forbidden(x)
    assert calls.faults


def test_memory_ends_where_the_card_ends(device):
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(200 << 30, dtype=torch.uint8, device=device)
