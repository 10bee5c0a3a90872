"""A base that is read once, from disk, holds a run as one that runs in every step does: the same losses and gradients, fewer forwards."""

import copy
import errno
import os
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import tiny
from tests.helpers.kills import Killed, killed_at
from tests.helpers.models import stir
from tests.helpers.processes import complete_ranks
from tests.helpers.retention import CPU
from tests.helpers.runs import Readbacks, arguments, records, write_domain_and_replay
from trainer import config
from trainer.cli import parse
from trainer.config import Config, Lora
from trainer.data.prepare import TrainingData, prepare_data
from trainer.errors import UserError
from trainer.metrics.throughput import model_size
from trainer.metrics.timers import Phases
from trainer.model.forward import lm_head, supervised_hidden
from trainer.model.loading import use_packed_attention
from trainer.model.locate import load_tokenizer
from trainer.model.lora import add_adapter
from trainer.model.patch import patch
from trainer.retention import cached_base
from trainer.retention import kl as retention
from trainer.run import train
from trainer.runtime import checkpoint
from trainer.runtime.distributed import Distributed
from trainer.training import build, export_trial, loop, loss
from trainer.training.loader import StepLoader, StepWork
from trainer.training.loop import train_step
from trainer.training.memory_estimate import estimate

ROLES = ("domain", "replay")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_domain_and_replay(tmp_path_factory.mktemp("chats"))


def settings(model: Path, chats: Path, output: Path, *more: str) -> Config:
    return parse(Config, arguments(model, chats / "domain.jsonl", output, "--replay.data", str(chats / "replay.jsonl"), "--epochs", "2",
                                   "--batch.tokens_per_pack", "128", "--batch.tokens_per_step", "256", "--logging.every", "1",
                                   "--retention.kl_weight", "0.7", *more), "trainer.run")


def run(*args: str | Path):
    return train(settings(*args))


def stored_files(folder: Path) -> list[Path]:
    """The files of states, and whatever else is left of them."""
    files = set(folder.glob("base-states-*"))
    return sorted(files - {path.with_name(f"{path.name}.xxh3") for path in files})


# ---------------------------------------------------------------- steps


def held_both_ways(model: nn.Module, inputs: TrainingData, folder: Path, **options) -> list[retention.KlToBase]:
    """What holds a run to this model, live and stored."""
    asked = [config.Retention(kl_weight=0.7, kl_reference=base, **options) for base in ("live", "cached")]
    live, stored = (retention.prepare(one, model, ROLES) for one in asked)
    return [live, cached_base.with_cached_base(stored, inputs.samples, inputs.plan, folder, {}, CPU, Distributed())]


def objective(model: nn.Module, held: retention.KlToBase, work: StepWork) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The divergence and the gradients of a step's objective."""
    total, divergence = 0.0, torch.zeros((), dtype=torch.float64)
    for batch in work.batches:
        reference = held.reference(batch, Phases(CPU))
        supervised, kl = (supervised_hidden(model, batch), None) if reference is None else held.hidden_and_kl(model, batch, reference)
        total = total + loss.cross_entropy(lm_head(model), supervised, batch) / work.weight_sum
        if reference is not None:
            divergence = divergence + kl / work.kl_weight_sum
    trained = [p for p in model.parameters() if p.requires_grad]
    return float(divergence.detach()), torch.autograd.grad(total + held.options.kl_weight * divergence, trained)


@pytest.mark.slow
@pytest.mark.parametrize("family, adapter, kl_on, kl_tokens", [
    ("llama", "lora", "replay", "supervised"), ("llama", "lora", "all", "supervised"), ("llama", "lora", "replay", "all"),
    ("llama", "lora", "all", "all"), ("gemma2", "lora", "all", "all"), ("llama", "full", "all", "all"), ("qwen2", "full", "all", "all")])
def test_steps_of_two_epochs_have_the_gradients_of_a_live_base(model_folder, chats, tmp_path, family, adapter, kl_on, kl_tokens):
    """In double precision, where only the order of sums differs: samples meet other company in the pass than in the packs of a step."""
    cfg = settings(model_folder, chats, tmp_path)
    inputs = prepare_data(cfg, load_tokenizer(cfg.model))
    model = tiny.model(family, torch.float64).train()
    use_packed_attention(model)
    if adapter == "lora":
        model = add_adapter(model, Lora(rank=4)).double()
        stir(model)
    patch(model)
    held = held_both_ways(model, inputs, tmp_path, kl_sources=kl_on, kl_positions=kl_tokens)
    if adapter == "full":
        stir(model)
    counting = []
    for step in range(inputs.plan.total):
        works = [StepLoader(inputs.plan, inputs.samples, Distributed(), CPU, one).load(step) for one in held]
        (live, expected), (stored, found) = (objective(model, one, work) for one, work in zip(held, works))
        assert abs(live - stored) <= 1e-12 * live and (live > 1e-4) == (works[0].kl_weight_sum > 0)
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).norm()) <= 1e-11 * float(b.norm()) + 1e-15
        assert not any(batch.kl and batch.kl.reference for batch in works[1].batches)
        counting += [inputs.plan.place(step).epoch] * (live > 0)
    assert min(counting.count(epoch) for epoch in (0, 1)) > 3


def test_the_file_holds_what_the_stock_base_says(model_folder, chats, tmp_path):
    cfg = settings(model_folder, chats, tmp_path)
    inputs = prepare_data(cfg, load_tokenizer(cfg.model))
    stock = tiny.model("llama")
    model = copy.deepcopy(stock)
    use_packed_attention(model)
    patch(model)
    _, held = held_both_ways(model, inputs, tmp_path)
    replay = np.flatnonzero(inputs.samples.sources == 1)
    path, = stored_files(tmp_path)
    assert path.stat().st_size == inputs.samples.supervised[replay].sum() * 64 * 4
    for i in replay[::-1]:
        ids, supervised = inputs.samples[i]
        with torch.no_grad():
            hidden = stock.model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0, :-1]
        torch.testing.assert_close(held.cached_states([i]), hidden[torch.from_numpy(supervised[1:].copy())], rtol=1e-4, atol=1e-5)
    assert torch.equal(held.cached_states(replay[[5, 2]]), torch.cat([held.cached_states([replay[5]]), held.cached_states([replay[2]])]))


def test_a_step_counts_the_head_of_the_base_alone(model_folder, chats, tmp_path):
    cfg = settings(model_folder, chats, tmp_path)
    inputs = prepare_data(cfg, load_tokenizer(cfg.model))
    model = add_adapter(tiny.model("llama"), Lora(rank=4))
    use_packed_attention(model.get_base_model())
    size = model_size(model)
    live, stored = (StepLoader(inputs.plan, inputs.samples, Distributed(), CPU, held).load(0).counts
                    for held in held_both_ways(model, inputs, tmp_path))
    assert live.base_tokens > live.base_supervised == stored.base_supervised > 0
    assert size.base_flops(stored.base_tokens, stored.base_supervised, stored.base_squared_lengths) == \
        2 * size.head * stored.base_supervised
    assert (live.tokens, live.supervised, live.squared_lengths) == (stored.tokens, stored.supervised, stored.squared_lengths)


def test_only_what_the_run_sees_is_stored(model_folder, chats, tmp_path):
    cfg = settings(model_folder, chats, tmp_path, "--max_steps", "2")
    inputs = prepare_data(cfg, load_tokenizer(cfg.model))
    seen = np.unique(np.concatenate([pack for step in range(2) for pack in inputs.plan[step]]))
    assert np.array_equal(inputs.plan.seen(), seen) and len(seen) < len(inputs.samples)
    whole = settings(model_folder, chats, tmp_path)
    assert len(prepare_data(whole, load_tokenizer(whole.model)).plan.seen()) == len(inputs.samples)
    held = retention.prepare(config.Retention(kl_weight=1.0, kl_reference="cached"), tiny.model("llama"), ROLES)
    counts = cached_base.cached_rows(held, inputs.samples, inputs.plan, torch.float32).counts
    counted = seen[inputs.samples.sources[seen] == 1]
    assert np.array_equal(np.flatnonzero(counts), counted) and np.array_equal(counts[counted], inputs.samples.supervised[counted])


# ---------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    (), ("--lora.dropout", "0.2", "--retention.kl_sources", "all", "--retention.kl_positions", "all"),
    ("--retention.kl_sources", "all", "--retention.token_weighting", "stm", "--retention.token_weighting_sources", "all",
     "--retention.stm_threshold", "400"),
    ("--method", "full", "--optim.lr", "1e-3"), ("--method", "full", "--retention.kl_positions", "all", "--retention.kl_direction", "js"),
    ("--method", "qlora", "--retention.kl_positions", "all"), ("--lora.dora", "true", "--activation_checkpointing", "full"),
])
def test_runs_have_the_figures_of_a_live_base(model_folder, chats, tmp_path, options):
    if "qlora" in options:
        pytest.importorskip("bitsandbytes")
        model_folder = tiny.save_model(tmp_path / "wide", "llama", hidden_size=128, intermediate_size=256)
    for base in ("live", "cached"):
        run(model_folder, chats, tmp_path / base, *options, "--retention.kl_reference", base)
    live, stored = (records(tmp_path / base, "step") for base in ("live", "cached"))
    assert len(live) == len(stored) > 8 and max(r.get("kl", 0.0) for r in live) > 1e-4
    for a, b in zip(live, stored):
        assert a.get("kl", 0.0) == pytest.approx(b.get("kl", 0.0), rel=1e-3, abs=1e-6) and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert "base" not in b["seconds"] and ("kl" not in a or "base" in a["seconds"])
    assert not stored_files(tmp_path / "cached"), "a finished run leaves no file"


@pytest.mark.slow
def test_a_saved_adapter_is_not_a_part_of_the_base(model_folder, chats, tmp_path):
    run(model_folder, chats, tmp_path / "first", "--retention.kl_weight", "0")
    for base in ("live", "cached"):
        run(model_folder, chats, tmp_path / base, "--lora.path", str(tmp_path / "first" / "adapter"), "--retention.kl_reference", base)
    live, stored = ([r["kl"] for r in records(tmp_path / base, "step") if "kl" in r] for base in ("live", "cached"))
    assert live[0] > 1e-3 and stored == pytest.approx(live, rel=1e-3)


KILLED = ("--retention.kl_reference", "cached", "--retention.kl_sources", "all", "--max_steps", "8", "--checkpoint.every", "2")
ADAPTER, FULL = ("--lora.dropout", "0.1"), ("--method", "full", "--optim.lr", "1e-3", "--precision", "bf16")


@pytest.fixture(scope="module")
def ended(model_folder, chats, tmp_path_factory):
    """The folders of a whole run and of one that was killed, by options."""
    made = {}

    def run_and_kill(options: tuple[str, ...]) -> tuple[Path, Path]:
        if options not in made:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp("ended")
            run(model_folder, chats, folder / "whole", *options)
            with killed_at(step=6):
                run(model_folder, chats, folder / "cut", *options)
            made[options] = folder / "whole", folder / "cut"
        return made[options]

    return run_and_kill


@pytest.mark.slow
@pytest.mark.parametrize(("options", "found"), [(ADAPTER, "whole"), (ADAPTER, "gone"), (ADAPTER, "damaged"), (ADAPTER, "unfinished"),
                                                (FULL, "whole"), (FULL, "gone")])
def test_a_killed_run_goes_on_bit_for_bit(model_folder, chats, ended, tmp_path, monkeypatch, capsys, options, found):
    """Also where the file is gone or damaged: it is made again by the base, not by what training has made of it."""
    options = (*options, *KILLED)
    whole, killed = ended(options)
    shutil.copytree(killed, tmp_path / "cut")
    assert checkpoint.newest(tmp_path / "cut" / "checkpoints").name == "step-00000004"
    path, = stored_files(tmp_path / "cut")
    before = path.read_bytes()
    checksum = path.with_name(f"{path.name}.xxh3")
    if found == "gone":
        path.rename(path.with_suffix(".partial"))
    elif found == "damaged":
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    elif found == "unfinished":
        checksum.unlink()
    capsys.readouterr()

    def as_it_was(*args):
        state = load_or_start(*args)
        assert path.read_bytes() == before and state.step == 4
        return state

    load_or_start = build.load_or_start
    monkeypatch.setattr(build, "load_or_start", as_it_was)
    run(model_folder, chats, tmp_path / "cut", *options, "--resume", "auto")
    shown = capsys.readouterr().out
    assert ("the base's hidden states are those in" in shown) == (found == "whole") and ("the base read" in shown) == (found != "whole")
    told = {"damaged": "made anew: .* is damaged: it differs from its checksum", "unfinished": "made anew: .*xxh3 is missing"}
    assert re.search(told.get(found, ""), shown)
    name = "model/model.safetensors" if "full" in options else "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()
    figures = [[(r["step"], r["loss"], r["kl"]) for r in records(folder, "step")] for folder in (whole, tmp_path / "cut")]
    assert figures[0] == figures[1] and len(figures[0]) == 8


@pytest.mark.slow
def test_a_run_that_a_signal_stops_keeps_its_file(model_folder, chats, tmp_path, monkeypatch, capsys):
    options = ("--retention.kl_reference", "cached", "--max_steps", "4")

    def stopped_after_step_two(run, work, phases):
        if work.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, work, phases)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", stopped_after_step_two)
        assert run(model_folder, chats, tmp_path / "run", *options).signal == signal.SIGTERM
    assert len(stored_files(tmp_path / "run")) == 1
    run(model_folder, chats, tmp_path / "run", *options, "--resume", "auto")
    assert "the base's hidden states are those in" in capsys.readouterr().out and not stored_files(tmp_path / "run")


@pytest.mark.slow
def test_what_another_run_stored_is_not_read(model_folder, chats, tmp_path, monkeypatch):
    def killed(run, work, phases):
        raise Killed

    names = []
    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", killed)
        for seed in ("0", "1"):
            with pytest.raises(Killed):
                run(model_folder, chats, tmp_path / "run", "--retention.kl_reference", "cached", "--seed", seed)
            names += [path.name for path in stored_files(tmp_path / "run")]
    assert len(names) == 2 and names[0] != names[1]
    (tmp_path / "run" / names[1]).write_bytes(b"cut short")
    run(model_folder, chats, tmp_path / "run", "--retention.kl_reference", "cached", "--seed", "1")
    run(model_folder, chats, tmp_path / "other", "--retention.kl_reference", "cached", "--seed", "1")
    one, two = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "other"))
    assert one == two


@pytest.mark.slow
def test_two_ranks_write_one_file(model_folder, chats, tmp_path):
    common = ("--retention.kl_reference", "cached", "--retention.kl_sources", "all")
    run(model_folder, chats, tmp_path / "one", *common)
    cfg = ["--replay.data", str(chats / "replay.jsonl"), "--epochs", "2", "--batch.tokens_per_pack", "128",
           "--batch.tokens_per_step", "256", "--logging.every", "1", "--retention.kl_weight", "0.7", *common]
    ranks = complete_ranks("trainer.run", arguments(model_folder, chats / "domain.jsonl", tmp_path / "two", *cfg))
    assert [status for status, _, _ in ranks] == [0, 0], ranks
    shown = "".join(output for _, output, _ in ranks)
    assert shown.count("the base's hidden states at") == 1 and shown.count("the base read 64 samples") == 1
    one, two = (records(tmp_path / name, "step") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-7)
    assert not stored_files(tmp_path / "two")


def test_a_step_reads_nothing_back(model_folder, chats, tmp_path):
    cfg = settings(model_folder, chats, tmp_path / "run", "--retention.kl_reference", "cached")
    tokenizer = load_tokenizer(cfg.model)
    run, _ = build.build(cfg, prepare_data(cfg, tokenizer), CPU, Distributed(), (), tokenizer)
    work = run.loader.load(0)
    with Readbacks() as readbacks:
        kl = train_step(run, work, Phases(CPU)).kl
    assert readbacks.found == [] and float(kl) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_the_run_and_the_dry_run_say_what_it_takes(model_folder, chats, tmp_path, capsys):
    run(model_folder, chats, tmp_path / "run", "--dry_run", "--retention.kl_reference", "cached", "--method", "full")
    dry = capsys.readouterr().out
    run(model_folder, chats, tmp_path / "run", "--max_steps", "999", "--retention.kl_reference", "cached", "--method", "full")
    shown = capsys.readouterr().out
    said = [line.partition(" (")[0] for text in (dry, shown) for line in text.splitlines() if "hidden states at" in line]
    cfg = settings(model_folder, chats, tmp_path)
    samples = prepare_data(cfg, load_tokenizer(cfg.model)).samples
    tokens = int(samples.supervised[samples.sources == 1].sum())
    line = f"retention: the base's hidden states at {tokens:,} tokens take {tokens * 256 / 1e6:.3g} MB in {tmp_path / 'run'}"
    assert said == [line, line] and "on replay samples; base: run once, its hidden states cached on disk" in shown
    assert shown.index("hidden states at") < shown.index("the base read 24 samples in")


def test_the_memory_estimate_has_a_head_instead_of_a_copy():
    model = tiny.model("llama")
    asked = [config.Retention(kl_weight=kl, kl_reference="cached") for kl in (0, 0.3)]
    full = [estimate(model, Config(method="full", retention=one), torch.float32, CPU) for one in asked]
    states = 2 * Config().batch.tokens_per_step * 64 * 4
    assert full[1].weights - full[0].weights == model.get_output_embeddings().weight.numel() * 4
    assert full[1].loss - full[0].loss == states
    adapted = add_adapter(model, Lora(rank=4))
    plain, held = (estimate(adapted, Config(retention=one), torch.float32, CPU) for one in asked)
    assert held.weights == plain.weights and held.loss - plain.loss == states


# ---------------------------------------------------------------- mistakes


def test_a_disk_without_room_is_one_line(model_folder, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    monkeypatch.setattr(export_trial, "_space", lambda *args: "enough")  # the export's own check comes first
    for more in ((), ("--dry_run",)):
        with pytest.raises(UserError, match="retention.kl_reference: expected .* MB of free disk space in .*, found 0.001 MB; "
                                            "choose another --output, count fewer tokens, or set retention.kl_reference to live") as raised:
            run(model_folder, chats, tmp_path / "run", "--retention.kl_reference", "cached", *more)
        assert "\n" not in str(raised.value) and not stored_files(tmp_path / "run")


def test_a_disk_that_fills_up_is_one_line(model_folder, chats, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cached_base.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="retention.kl_reference: cannot write .*partial: No space left on device; choose another --output"):
        run(model_folder, chats, tmp_path / "run", "--retention.kl_reference", "cached")
    assert not stored_files(tmp_path / "run")


def test_a_disk_that_fails_while_it_is_written_is_one_line(model_folder, chats, tmp_path, monkeypatch):
    def failing(*args):
        yield np.array([0]), torch.zeros(0, 64)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cached_base, "_base_states", failing)
    with pytest.raises(UserError, match="retention.kl_reference: cannot write .*partial: Input/output error; choose another --output"):
        run(model_folder, chats, tmp_path / "run", "--retention.kl_reference", "cached")
    assert not stored_files(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_one_line(model_folder, chats, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output: cannot write the folder .*: Not a directory; choose another output"):
        run(model_folder, chats, tmp_path / "file" / "run", "--retention.kl_reference", "cached")


@pytest.mark.slow
def test_a_change_of_the_base_between_runs_is_refused(model_folder, chats, tmp_path):
    options = ("--checkpoint.every", "2", "--max_steps", "4")
    run(model_folder, chats, tmp_path / "run", *options)
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match="retention.kl_reference was live, is cached"):
        run(model_folder, chats, tmp_path / "run", *options, "--resume", "auto", "--retention.kl_reference", "cached")
