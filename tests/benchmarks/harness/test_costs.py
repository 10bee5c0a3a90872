"""Memory and operations of a step, counted where both are known."""

import pytest
import torch

from benchmarks.harness.costs import counted_operations, height_mib, step_costs

MIB = 2**20


def test_the_height_is_what_is_held_at_one_time():
    def one_after_another():
        for _ in range(3):
            torch.zeros(4 * MIB // 4)

    assert height_mib(one_after_another) == pytest.approx(4, rel=1e-3)
    assert height_mib(lambda: [torch.zeros(4 * MIB // 4) for _ in range(3)]) == pytest.approx(12, rel=1e-3)


def test_what_lies_there_before_does_not_count():
    x = torch.zeros(16 * MIB // 4)
    assert height_mib(lambda: x.add_(1)) < 0.01


def test_the_backward_counts():
    x = torch.randn(MIB // 4, requires_grad=True)

    def step():
        (x.exp() * 2).sum().backward()
        x.grad = None

    assert 2 <= height_mib(step) <= 5  # exp and its product, then two gradients beside what is saved


def test_views_and_allocations_are_no_operations():
    x = torch.randn(4, 6)
    assert counted_operations(lambda: x.t()[1:].reshape(20).unsqueeze(0)) == 1  # reshape has to copy
    assert counted_operations(lambda: torch.empty(3).detach()) == 0
    assert counted_operations(lambda: (x @ x.t()).relu_().sum()) == 3


def test_operations_of_the_backward_count():
    x = torch.randn(3, requires_grad=True)
    forward = counted_operations(lambda: x.exp().sum())
    assert forward == 2 and counted_operations(lambda: x.exp().sum().backward()) > forward


def test_a_line_is_counted_over_several_steps():
    sizes = iter([2, 1, 3, 1])
    costs = step_costs(lambda: torch.zeros(next(sizes) * MIB // 4), steps=4)
    assert costs.mib == pytest.approx(3, rel=1e-3) and costs.operations == 1
    assert step_costs(lambda: torch.zeros(1), countable=False, steps=1).operations is None
