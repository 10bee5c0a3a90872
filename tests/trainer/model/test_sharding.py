"""Sharded ranks train what one process trains, and each resumes what the other saved."""

import shutil

import pytest
from safetensors.torch import load_file

from tests.helpers import tiny
from tests.helpers.processes import complete, complete_ranks
from tests.helpers.runs import arguments, records
from trainer.cli import parse
from trainer.config import Config
from trainer.config_rules import validate
from trainer.errors import UserError
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import Distributed, process_group

# The last step has one pack, so that the second rank has none of its own.
STEPS = ("--batch.tokens_per_step", "1024", "--logging.every", "1", "--checkpoint.every", "2", "--data.eval_fraction", "0.1")
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # AdamW makes much of the rounding of gradients near 0


@pytest.fixture(scope="module")
def ran(model_folder, chats, tmp_path_factory):
    """A function that runs a command as one process, or as sharded ranks, and returns its folder and what rank 0 printed."""
    def run(ranks: int, *options: str, resumed=None, method="full"):
        output = tmp_path_factory.mktemp("run")
        if resumed:
            shutil.copytree(resumed / "checkpoints" / "step-00000002", output / "checkpoints" / "step-00000002")
            options += ("--optim.weight_decay", "0.1", "--resume", "auto")
        common = arguments(model_folder, chats, output, "--method", method, *STEPS, *options)
        ends = complete_ranks("trainer.run", [*common, "--fsdp.enabled"], ranks) if ranks > 1 else [complete("trainer.run", common)]
        assert [status for status, *_ in ends] == [0] * ranks, [errors[-600:] for *_, errors in ends]
        assert not any("Warning" in errors for _, _, errors in ends)
        return output, ends[0][1]
    return run


@pytest.fixture(scope="module")
def full(ran):
    """The folders of a full fine-tuning by one process and by two sharded ranks."""
    options = ("--optim.weight_decay", "0.1", "--export.check", "true")
    return ran(1, *options)[0], ran(2, *options)[0]


def assert_close(one, other):
    """Compare losses, norms and exported weights of two runs, of which the other may have been resumed."""
    steps, later = records(one, "step"), records(other, "step")
    assert later[-1]["step"] == steps[-1]["step"] == 5
    for a, b in zip(steps[-len(later):], later):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    assert records(one, "eval")[-1]["loss"] == pytest.approx(records(other, "eval")[-1]["loss"], rel=1e-5)
    for name, weight in weights(one).items():
        assert weight.allclose(weights(other)[name], **ROUNDING), name


def weights(run):
    found = {name: tensor for file in run.glob("[am]*/*.safetensors") for name, tensor in load_file(file).items()}
    assert found
    return found


@pytest.mark.slow(8)
def test_full_fine_tuning_equals_one_process(full):
    assert_close(*full)


@pytest.mark.slow(8)
def test_an_adapter_on_a_4bit_base_equals_one_process_beside_a_kl_that_few_packs_have(ran, chats, tmp_path):
    base = tiny.save_model(tmp_path / "base", "llama", intermediate_size=128)  # whole blocks, which bitsandbytes reads on any CPU
    options = ("--replay.data", str(chats), "--replay.ratio", "0.03", "--retention.kl_weight", "0.3",
               "--activation_checkpointing", "selective", "--retention.l2_sp", "0.1", "--export.format", "both", "--export.check", "true")
    (one, _), (two, printed) = (ran(ranks, *options, "--model.path", str(base), method="qlora") for ranks in (1, 2))
    assert_close(one, two)
    assert ["kl" in record for record in records(one, "step")] == ["kl" in record for record in records(two, "step")]
    assert "fsdp: weights, gradients and optimizer states are sharded over 2 ranks" in printed and "checked: " in printed


@pytest.mark.slow(12)
def test_what_some_ranks_saved_others_resume(ran, full):
    one, two = full
    same, _ = ran(2, resumed=two)
    assert [weight.equal(weights(two)[name]) for name, weight in weights(same).items()] == [True] * len(weights(two))
    fewer, printed = ran(1, resumed=two)
    assert_close(one, fewer)
    assert "resuming with 1 ranks from 2" in printed
    more, _ = ran(2, resumed=one)
    assert_close(one, more)


@pytest.mark.parametrize("options", [
    ("--optim.name", "adamw_8bit"), ("--compile", "true"), ("--eval.show", "1"), ("--forgetting.general", "items.jsonl"),
    ("--retention.kl_weight", "0.3", "--retention.kl_sources", "all", "--method", "full"),
    ("--retention.kl_reference", "cached", "--retention.kl_weight", "0.3", "--retention.kl_sources", "all"),
    ("--retention.token_weighting", "stm")])
def test_what_needs_the_whole_model_is_refused(options):
    config = parse(Config, ["--model.path", "m", "--data.train", "d", "--fsdp.enabled", "true", *options], "trainer.run")
    with pytest.raises(UserError, match=f"^{options[0][2:]}: expected its default beside fsdp.enabled"):
        validate(config)


def test_one_process_has_nothing_to_share_with():
    with pytest.raises(UserError, match="^fsdp.enabled: expected several ranks, as torchrun"), process_group(choose_device("cpu"), True):
        pass


def test_ranks_with_fewer_packs_keep_in_step():
    shares = [Distributed(rank, 3, sharded=True).share([0, 1, 2, 3]) for rank in range(3)]
    assert shares == [([0, 3], 0), ([1, 0], 1), ([2, 0], 1)]
    assert Distributed(1, 3).share([0, 1, 2, 3]) == ([1], 0)
