"""One thread per test process, no network, deterministic arithmetic, and the longest files first.

Without a GPU Triton's kernels run in its interpreter, which has to be asked for before they are imported.
"""

import gc
import os
import sys
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import _launch
from tests.helpers.interpreter import mend_bf16

if _launch.INTERPRETED:
    mend_bf16()


def pytest_addoption(parser):
    parser.addoption("--campaign-seed", type=int, default=0, help="seed of the attacks in tests/campaign")


def pytest_collection_modifyitems(config, items):
    """With several workers, start the files that take longest first, so that none is left to the end."""
    if not hasattr(config, "workerinput"):
        return
    seconds = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        seconds[item.path] += 0.05 if slow is None else slow.args[0] if slow.args else 2
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish():
    """Keep all that was imported and collected out of the collector's walks, which else go through millions of objects that stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_arithmetic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Let runs leave out their page of pictures, which takes longer than they do, except in tests that are marked `report`."""
    if run_folder := sys.modules.get("trainer.training.run_folder"):
        write_report = sys.modules["trainer.report.run_page"].write_report
        run_folder.write_report = write_report if item.get_closest_marker("report") else lambda folder: None


@pytest.fixture(scope="session")
def tokenizer():
    from tests.helpers import tiny  # transformers: the kernels' tests run without it

    return tiny.tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small Llama with random weights, its tokenizer and chat template, saved the way hub models are."""
    from tests.helpers import tiny

    return tiny.save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A file of chats about sums."""
    from tests.helpers.runs import write_chats

    return write_chats(tmp_path_factory.mktemp("data") / "sums.jsonl")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, headless; tests that take it are skipped where there is none."""
    from tests.helpers.browser import start

    started = start(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()
