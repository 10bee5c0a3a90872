"""Order samples by their loss under the base: measured once, found again, and resumed bit for bit."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.kills import killed_at
from tests.helpers.runs import arguments, records, write_domain_and_replay
from trainer.cli import parse
from trainer.config import Config
from trainer.errors import UserError
from trainer.retention import base_losses
from trainer.run import train

OPTIONS = ("--batch.tokens_per_pack", "128", "--batch.tokens_per_step", "256", "--logging.every", "1", "--max_steps", "8",
           "--checkpoint.every", "2", "--lora.dropout", "0.1", "--replay.ratio", "0.25")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_domain_and_replay(tmp_path_factory.mktemp("chats"))


def command(model: Path, chats: Path, output: Path, curriculum: str, *more: str) -> list[str]:
    return arguments(model, chats / "domain.jsonl", output, "--replay.data", str(chats / "replay.jsonl"), *OPTIONS, "--data.curriculum",
                     curriculum, *more)


def run(*args: str | Path):
    return train(parse(Config, command(*args), "trainer.run"))


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("base-losses-*.npy"))


@pytest.fixture(scope="module")
def ended(model_folder, chats, tmp_path_factory):
    """The folders of a whole run and of one that was killed, by curriculum."""
    made = {}

    def run_and_kill(curriculum: str) -> tuple[Path, Path]:
        if curriculum not in made:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp("ended")
            run(model_folder, chats, folder / "whole", curriculum)
            with killed_at(step=6):
                run(model_folder, chats, folder / "cut", curriculum)
            made[curriculum] = folder / "whole", folder / "cut"
        return made[curriculum]

    return run_and_kill


@pytest.mark.slow
@pytest.mark.parametrize(("curriculum", "found"), [("length", ""), ("loss", "whole"), ("loss", "gone"), ("loss", "damaged")])
def test_a_killed_run_goes_on_bit_for_bit(model_folder, chats, ended, tmp_path, capsys, curriculum, found):
    whole, killed = ended(curriculum)
    shutil.copytree(killed, tmp_path / "cut")
    assert len(stored(tmp_path / "cut")) == (curriculum == "loss")
    for path in stored(tmp_path / "cut"):
        if found == "gone":
            path.unlink()
        elif found == "damaged":
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    capsys.readouterr()
    run(model_folder, chats, tmp_path / "cut", curriculum, "--resume", "auto")
    shown = capsys.readouterr().out
    assert ("read from" in shown) == (found == "whole") and ("the base read 40 samples" in shown) == (found in ("gone", "damaged"))
    assert bool(re.search("made anew: .* is damaged", shown)) == (found == "damaged")
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, tmp_path / "cut")]
    assert weights[0] == weights[1] and not stored(tmp_path / "cut") and not stored(whole)
    figures = [[(r["step"], r["loss"]) for r in records(folder, "step")] for folder in (whole, tmp_path / "cut")]
    assert figures[0] == figures[1] and len(figures[0]) == 8


@pytest.mark.slow
def test_a_checkpoint_of_another_order_is_refused(model_folder, chats, ended, tmp_path, monkeypatch):
    _, killed = ended("loss")
    shutil.copytree(killed, tmp_path / "cut")
    stored(tmp_path / "cut")[0].unlink()
    measured = base_losses.mean_losses
    monkeypatch.setattr(base_losses, "mean_losses", lambda *args: -measured(*args))
    with pytest.raises(UserError, match="curriculum_order was"):
        run(model_folder, chats, tmp_path / "cut", "loss", "--resume", "auto")


@pytest.mark.slow
def test_steps_go_from_what_the_base_finds_easy_to_what_it_finds_hard(model_folder, chats, tmp_path):
    """By the losses of the steps themselves, at a learning rate that changes nothing."""
    run(model_folder, chats, tmp_path / "sorted", "loss", "--optim.lr", "1e-12", "--lora.dropout", "0", "--replay.ratio", "0",
        "--max_steps", "5", "--batch.tokens_per_pack", "256")
    losses = [record["loss"] for record in records(tmp_path / "sorted", "step")]
    assert len(losses) >= 4 and losses == sorted(losses) and losses[-1] > losses[0] + 0.05


def test_the_dry_run_says_that_the_order_is_not_known_yet(model_folder, chats, tmp_path, capsys):
    run(model_folder, chats, tmp_path, "loss", "--dry-run")
    assert "curriculum: the base reads the domain's samples" in capsys.readouterr().out and not stored(tmp_path)


def test_random_weights_have_no_easy_samples(model_folder, chats, tmp_path):
    options = ["--data.train", str(chats / "domain.jsonl"), "--model.config", str(model_folder), "--method", "full", "--data.curriculum",
               "loss"]
    with pytest.raises(UserError, match="^data.curriculum: expected model.path"):
        train(parse(Config, options, "trainer.run"))
