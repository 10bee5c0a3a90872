"""SDFT: the base, shown an example, teaches the model on its own answers; TRL's losses are ours, and a kill changes nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import training_records, write_jsonl
from tests.helpers.adapters import save_random_adapter
from tests.helpers.kills import killed_at
from tests.helpers.retention import BASE
from tests.helpers.runs import arguments, records, weights
from trainer import cli
from trainer.config import Config, OnPolicy
from trainer.config_rules import validate
from trainer.data.chat_template import ChatTemplate
from trainer.data.demonstrations import demonstration, fill
from trainer.errors import UserError
from trainer.run import train

PROMPT = "{prompt} {answer}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdft")
    write_jsonl(training_records(DOMAIN, 24, seed=0), folder / "domain.jsonl")
    write_jsonl(training_records(GENERAL, 24, seed=0), folder / "general.jsonl")
    save_random_adapter(BASE, folder / "adapter", rank=4, spread=0.1)
    return folder


def run(data, output, *more):
    options = arguments(BASE, data / "domain.jsonl", output, "--on_policy.method", "sdft", "--on_policy.prompt", PROMPT,
                        "--on_policy.max_tokens", "16", "--logging.every", "1", *map(str, more))
    return train(cli.parse(Config, options, "trainer.run"))


def answers_of(folder) -> list[list[dict]]:
    return [[json.loads(line) for line in path.open()] for path in sorted((folder / "answers").glob("*.jsonl"))]


@pytest.mark.slow(20)
def test_losses_are_those_of_trl_step_by_step(data, tmp_path, monkeypatch):
    """TRL's trainer gets our answers and the prompts in our order, with one chat a step."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    steps, lr = 6, 2e-4
    run(data, tmp_path / "ours", "--lora.path", data / "adapter", "--on_policy.every", "1", "--max_steps", steps, "--optim.lr", lr,
        "--batch.max_samples_per_pack", "1", "--batch.tokens_per_step", "256", "--optim.lr_scheduler", "constant",
        "--optim.warmup_ratio", "0", "--optim.max_grad_norm", "0")
    ours, drawn = [record["kl"] for record in records(tmp_path / "ours", "step")], answers_of(tmp_path / "ours")

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    chat_of = {tuple(tokenizer.apply_chat_template(record["messages"][:1], add_generation_prompt=True)["input_ids"]): record["messages"]
               for record in training_records(DOMAIN, 24, seed=0)}
    chats = [chat_of[tuple(one["prompt"])] for one, in drawn]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), data / "adapter", is_trainable=True)
    options = SDFTConfig(
        output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_steps=steps, learning_rate=lr,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9, per_device_train_batch_size=1,
        gradient_accumulation_steps=1, num_generations=1, shuffle_dataset=False, distillation_mode="full_logits", distillation_alpha=0.0,
        distillation_is_clip=None, gradient_checkpointing=False, teacher_prompt_template="{prompt} {privileged_context}")
    rows = Dataset.from_list([{"prompt": chat[:1], "privileged_context": chat[1]["content"]} for chat in chats])
    trainer = SDFTTrainer(model, options, rows, processing_class=tokenizer)
    theirs, given, compute_loss = [], iter(drawn), trainer.compute_loss
    monkeypatch.setattr(trainer, "_generate", lambda prompts: (prompts, [next(given)[0]["answer"]]))

    def noted(*args, **kwargs):
        theirs.append(compute_loss(*args, **kwargs))
        return theirs[-1]

    monkeypatch.setattr(trainer, "compute_loss", noted)
    trainer.train()
    assert ours == pytest.approx([loss.item() for loss in theirs], rel=1e-4) and len(set(ours)) == steps


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 8], ids=["within the steps of an answer", "as answers are due"])
def test_a_killed_run_ends_bit_for_bit_as_a_whole_one(data, tmp_path, step):
    options = ("--on_policy.every", "3", "--max_steps", "8", "--epochs", "9", "--checkpoint.every", "2",
               "--replay.data", data / "general.jsonl", "--replay.ratio", "0.5")
    run(data, tmp_path / "whole", *options)
    with killed_at(step):
        run(data, tmp_path / "killed", *options)
    run(data, tmp_path / "killed", *options, "--resume", "auto")
    assert all(torch.equal(tensor, weights(tmp_path / "whole")[name]) for name, tensor in weights(tmp_path / "killed").items())
    whole = answers_of(tmp_path / "whole")
    assert len(whole) == 3 and answers_of(tmp_path / "killed") == whole and whole[0] != whole[1]


@pytest.mark.slow
def test_answers_that_are_gone_are_not_drawn_from_another_model(data, tmp_path):
    options = ("--on_policy.every", "3", "--max_steps", "6", "--epochs", "9", "--checkpoint.every", "2")
    with killed_at(3):
        run(data, tmp_path, *options)
    (tmp_path / "answers" / "step-0000001.jsonl").unlink()
    with pytest.raises(UserError, match="resume: expected the answers of the steps that were interrupted"):
        run(data, tmp_path, *options, "--resume", "auto")


def test_the_teacher_reads_the_example():
    template = ChatTemplate(AutoTokenizer.from_pretrained(BASE))
    config = SimpleNamespace(data=Config().data, on_policy=OnPolicy(prompt="{prompt} As: {answer}"))
    stored = [{"role": role, "content": content, "extra": None} for role, content in (("user", "Spell {answer}."), ("assistant", "Yes."))]
    asked, shown = (template.tokenizer.decode(ids) for ids in demonstration({"messages": stored}, template, config))
    assert "Spell {answer}." in asked and "Spell {answer}. As: Yes." in shown and "Yes." not in asked
    assert asked.split("Spell {answer}.")[1] == shown.split("Yes.")[1]
    assert fill("{prompt}{answer}{answer}", "{answer}", "{prompt}") == "{answer}{prompt}{prompt}"
    for messages in (stored[:1], stored[1:], [stored[1], stored[1]]):
        with pytest.raises(UserError, match="expected a chat that ends with a user's turn and an answer"):
            demonstration({"messages": messages}, template, config)


@pytest.mark.parametrize("more, message", [
    (("--on_policy.every", "0"), "on_policy.every: expected 1 or more, got 0"),
    (("--on_policy.prompt", "{prompt}"), "on_policy.prompt: expected {answer}, the example that the base is shown"),
    (("--retention.kl_mask_target", "true"), "retention.kl_mask_target: expected False beside on_policy.method sdft, got True"),
    (("--data.eval_fraction", "0.1"), "data.eval_fraction: expected 0 beside on_policy.method sdft, got 0.1"),
])
def test_a_mistake_is_named(data, tmp_path, more, message):
    with pytest.raises(UserError) as error:
        validate(cli.parse(Config, arguments(BASE, data / "domain.jsonl", tmp_path, "--on_policy.method", "sdft", *more), "trainer.run"))
    assert str(error.value).startswith(message)
