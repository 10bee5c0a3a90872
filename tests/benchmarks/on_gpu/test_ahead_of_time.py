"""Every kernel, compiled ahead of time at its shipped launch settings for six parts, keeps to tests/kernels/budgets.

A kernel that is meant to use more, or a new one: `python -m benchmarks.on_gpu.ahead_of_time` writes the budgets anew; look at
the difference. Adding `--check --compile all` to it compiles every kernel, changed or not.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from benchmarks.on_gpu.ahead_of_time import BLOCK, INSTALLED, PINS, README, ROOT, budgets_file, cases, digests_file, faults, read, table
from kernels._launch import SHARED_MEMORY, triton

GOOD = {"registers": 64, "spills": 0, "shared": 1024, "dots": 1, "HGMMA": 4, "ATOMG": 0, "RED": 0}
BUDGET = {"registers": 64, "spills": 0, "shared": 1024}


def compiling(*command):
    """Run a module in a process without Triton's interpreter; return its exit status and what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow(10)
@pytest.mark.skipif(INSTALLED not in PINS, reason=f"budgets are those of Triton {' and '.join(PINS)}, found {triton.__version__}")
def test_every_kernel_keeps_its_budget():
    """Compiles what was changed since the budgets were written, and one case in any event."""
    status, said = compiling("benchmarks.on_gpu.ahead_of_time", "--check", "--compile", "dropout mask")
    assert status == 0, said


@pytest.mark.slow
def test_figures_are_read_and_a_digest_follows_all_that_a_kernel_is_made_of():
    status, said = compiling("tests.helpers.product_kernel")
    assert status == 0, said
    found = json.loads(said.splitlines()[-1])
    assert found["figures"]["sm_90"]["HGMMA"]
    assert all(figures["dots"] == 1 and figures["registers"] for figures in found["figures"].values())
    assert len({*found["same"]}) == 1 and len({*found["same"], *found["other"]}) == 5


@pytest.mark.parametrize("version", PINS)
def test_every_case_has_budgets_and_digests(version):
    """A kernel that is new or changed needs budgets under both pins: run the command under each."""
    budgets, digests = read(budgets_file(version)), read(digests_file(version))
    assert digests.keys() == {name.split(" / ")[0] for name in budgets} == cases().keys()
    assert all(by_part.keys() == SHARED_MEMORY.keys() for by_part in digests.values())


@pytest.mark.parametrize("version", PINS)
def test_no_budget_allows_a_spill_or_more_shared_memory_than_there_is(version):
    budgets = read(budgets_file(version))
    assert budgets
    for name, by_part in budgets.items():
        assert by_part.keys() <= SHARED_MEMORY.keys(), name
        for part, budget in by_part.items():
            assert budget["spills"] == 0, (name, part)
            assert budget["shared"] <= SHARED_MEMORY[part], (name, part)


@pytest.mark.parametrize(("change", "expected"), [
    ({}, None),
    ({"registers": 80}, "registers: budget 64, found 80"),
    ({"spills": 2}, "spills: budget 0, found 2"),
    ({"shared": 2048}, "shared: budget 1024, found 2048"),
    ({"shared": 300000}, "shared: budget 1024, found 300000"),
    ({"HGMMA": 0}, "a product without HGMMA"),
    ({"ATOMG": 1}, "1 atomics"),
])
def test_faults_are_seen(change, expected):
    found = faults("kernel", "sm_90", GOOD | change, BUDGET)
    assert (expected is None and not found) or any(expected in fault for fault in found), found


def test_a_kernel_without_a_budget_is_a_fault():
    assert "no budget" in faults("kernel", "sm_90", GOOD, None)[0]


def test_the_table_shows_the_budgets():
    assert BLOCK.search(README.read_text())[0] == table(read(budgets_file(PINS[0])))
