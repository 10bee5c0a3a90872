"""One owner of an output folder at a time."""

import pytest

from tests.helpers import runs
from tests.helpers.processes import complete_ranks
from trainer import evaluate as evaluation
from trainer import interpolate as interpolation
from trainer import run as training
from trainer.cli import parse
from trainer.config import Config
from trainer.errors import UserError
from trainer.evaluation.config import Config as Evaluation
from trainer.files import sole_owner

MODEL = ["--model.path", "m"]
COMMANDS = {
    "trainer.run": lambda out: training.train(parse(Config, [*MODEL, "--data.train", "t", "--output", out, "--resume", "auto"], "")),
    "evaluation": lambda out: evaluation.evaluate(parse(Evaluation, [*MODEL, "--output", out], "")),
    "trainer.interpolate": lambda out: interpolation.interpolate(
        parse(interpolation.Interpolate, [*MODEL, "--tuned", "t", "--output", out], "")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_command_in_a_folder_is_refused(tmp_path, command):
    with sole_owner(tmp_path / "out", command), pytest.raises(UserError, match="^output: .*(another .* is using|in use)"):
        COMMANDS[command](str(tmp_path / "out"))


def test_a_folder_has_one_owner_and_no_trace_of_it(tmp_path):
    folder = tmp_path / "out"
    with sole_owner(folder, "it"):
        with pytest.raises(UserError, match="another it is using"), sole_owner(folder, "it"):
            pass
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with sole_owner(folder, "it"), sole_owner(tmp_path / "empty", "it"):
        pass
    assert not (tmp_path / "empty").exists()


@pytest.mark.slow
def test_every_rank_of_a_second_run_in_a_folder_ends(model_folder, tmp_path):
    chats, folder = runs.write_chats(tmp_path / "chats.jsonl"), tmp_path / "out"
    with sole_owner(folder, "trainer.run"):
        ends = complete_ranks("trainer.run", runs.arguments(model_folder, chats, folder))
        assert [path.name for path in folder.iterdir()] == [".lock"]
    line = f"trainer.run: error: output: another trainer.run is using {folder}; wait for it, or choose another folder\n"
    assert [(status, error) for status, _, error in ends] == [(1, line)] * 2
