"""Answers that show what training changed: whose they are, to which prompts, and that they cost a run nothing but time."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.runs import QUESTIONS, arguments, records, text_of, weights, write_chats
from trainer.cli import parse
from trainer.config import Config
from trainer.data.prepare import prepare_data
from trainer.errors import UserError
from trainer.evaluation.items import ItemFile
from trainer.model.locate import load_tokenizer
from trainer.report import answers
from trainer.report.run_page import write_report
from trainer.retention import monitor
from trainer.run import train
from trainer.training import run_folder, show_answers

SHOW = ("--eval.show", "2", "--forgetting.max_tokens", "12", "--max_steps", "6", "--optim.lr_scheduler", "constant")


def options(*args) -> Config:
    return parse(Config, arguments(*args), "trainer.run")


def run(*args):
    return train(options(*args))


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("items") / "general.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n}?", "answer": " "}) + "\n" for n in range(5)))
    return path


@pytest.fixture(scope="module")
def shown(model_folder, chats, items, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shown") / "run"
    run(model_folder, chats, folder, *SHOW, "--data.eval_fraction", "0.1", "--forgetting.general", str(items),
        "--logging.tensorboard", "true")
    return folder


def greedy(model, tokenizer, prompt: str) -> tuple[str, bool]:
    """Return stock transformers' answer of at most 12 tokens, and whether it ended."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    ends = [tokenizer.eos_token_id]
    new = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)[0, ids.shape[1]:]
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False), int(new[-1]) in ends


@pytest.mark.slow
def test_they_are_stock_transformers_answers_of_the_base_and_of_the_exported_adapter(model_folder, shown):
    found = answers.read(shown)
    assert [(one.kind, one.source) for one in found[:4]] == [("held out", "sums")] * 2 + [("general", "general")] * 2
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), shown / "adapter").eval()
    for one in found[:4]:
        assert (one.base, one.base_ended) == greedy(base, tokenizer, one.prompt)
        assert (one.tuned, one.tuned_ended) == greedy(tuned, tokenizer, one.prompt)
    assert dict(QUESTIONS)[found[0].prompt] == found[0].expected and any(one.base != one.tuned for one in found[:4])


@pytest.mark.slow
def test_they_change_nothing_that_is_trained(model_folder, chats, items, shown, tmp_path):
    run(model_folder, chats, tmp_path / "run", *SHOW, "--eval.show", "0", "--data.eval_fraction", "0.1")
    assert all(torch.equal(tensor, weights(shown)[name]) for name, tensor in weights(tmp_path / "run").items())
    assert not (tmp_path / "run" / "answers.jsonl").exists()


@pytest.mark.slow
def test_the_page_and_tensorboard_have_them(shown):
    write_report(shown)
    html = (shown / "report.html").read_text()
    assert "What changed Answers are greedy" in text_of(html) and "Held-out prompts sums What is " in text_of(html)
    assert html.count("<article>") >= 4 and "<ins>" in html
    assert any(b"answers/4" in path.read_bytes() for path in (shown / "tensorboard").iterdir())


@pytest.mark.slow
def test_full_fine_tuning_asks_the_base_before_it_changes_also_in_a_resumed_run(model_folder, chats, tmp_path, monkeypatch, capsys):
    """Export fails once, so that the second process has the trained weights from a checkpoint alone."""
    more = (*SHOW, "--method", "full", "--eval.show", "1", "--optim.lr", "3e-3")
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "merge_and_save", lambda *args: 1 / 0)
        with pytest.raises(UserError, match="ZeroDivisionError"):
            run(model_folder, chats, tmp_path / "run", *more)
    run(model_folder, chats, tmp_path / "run", *more, "--resume", "auto")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    [one] = answers.read(tmp_path / "run")
    assert one.kind == "training" and one.base != one.tuned
    assert (one.base, one.base_ended) == greedy(AutoModelForCausalLM.from_pretrained(model_folder), tokenizer, one.prompt)
    assert (one.tuned, one.tuned_ended) == greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"), tokenizer, one.prompt)
    said = capsys.readouterr().out
    assert "eval.show: 1 prompts (1 training; no general ones: no items of forgetting.general or rows of replay.data fit)" in said


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_is_one_line_and_the_run_ends_well(model_folder, chats, tmp_path, monkeypatch, capsys, when):
    ask, asked = show_answers.ask, []

    def fails(*args):
        asked.append(args)
        if len(asked) == (1 if when == "before" else 2):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return ask(*args)

    monkeypatch.setattr(show_answers, "ask", fails)
    assert run(model_folder, chats, tmp_path / "run", *SHOW).status == 0
    said = capsys.readouterr().err
    assert "WARNING: eval.show: no answers are shown: OutOfMemoryError: CUDA out of memory. Tried\n" in said
    assert weights(tmp_path / "run") and len(asked) == (1 if when == "before" else 2) and records(tmp_path / "run", "end")
    assert not (tmp_path / "run" / "answers.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------- prompts


def prompts(config: Config, items: list[ItemFile] = (), context: int | None = None) -> list[show_answers.Prompt]:
    return show_answers.choose_prompts(config, prepare_data(config, load_tokenizer(config.model)), items, context)


def test_without_an_eval_set_they_are_rows_that_are_trained_on_and_replay_rows(model_folder, chats, tmp_path):
    replay = write_chats(tmp_path / "replay.jsonl", [(f"Say {n}.", f"{n}") for n in range(3)])
    config = options(model_folder, chats, tmp_path, "--eval.show", "4", "--replay.data", str(replay))
    found = prompts(config)
    assert [prompt.kind for prompt in found] == ["training"] * 4 + ["replay"] * 3 and len({prompt.text for prompt in found}) == 7
    assert all(prompt.text in dict(QUESTIONS) for prompt in found[:4]) and found == prompts(config)


def test_domain_items_come_before_rows_that_are_trained_on(model_folder, chats, items, tmp_path):
    both = ("--forgetting.general", str(items), "--forgetting.domain", str(items))
    config = options(model_folder, chats, tmp_path, "--eval.show", "1", *both)
    found = prompts(config, monitor.read(config))
    assert [(prompt.kind, prompt.source) for prompt in found] == [("held out", "general (2)"), ("general", "general")]
    assert found[0].expected == " "


def test_a_chat_is_asked_up_to_its_last_answer_and_a_text_is_continued(model_folder, tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Why?"), ("assistant", "So."), ("user", "Oh.")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 3}) + "\n")
    config = options(model_folder, tmp_path / "chat.jsonl", tmp_path, "--eval.show", "1", "--replay.data", str(tmp_path / "text.jsonl"))
    chat, text = prompts(config)
    assert chat.text == "system: Be brief.\n\nuser: Hi.\n\nassistant: Hello.\n\nuser: Why?" and chat.expected == "So."
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.decode(chat.ids).endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert text.text.startswith("The quick brown fox") and 5 < len(text.ids) <= show_answers.BEGINNING and text.expected is None


def test_a_prompt_too_long_for_the_context_is_left_out_and_an_answer_is_cut_to_what_is_left(model_folder, tmp_path):
    rows = [("What is it? " * 8, "This."), ("Why?", "So.")]
    config = options(model_folder, write_chats(tmp_path / "rows.jsonl", rows), tmp_path, "--eval.show", "2")
    assert len(prompts(config)) == 2
    [prompt] = prompts(config, context=40)
    assert prompt.text == "Why?" and len(prompt.ids) + prompt.max_tokens == 40


# ---------------------------------------------------------------- options and logs


@pytest.mark.parametrize("more, expected", [
    (["--eval.show", "-1"], "eval.show: expected a number of prompts, 0 or more, got -1"),
    (["--eval.show", "1", "--method", "full", "--model.path", "null", "--model.config", "x"], "eval.show: expected model.path"),
])
def test_values_that_cannot_be(more, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        run(tmp_path, tmp_path / "chats.jsonl", tmp_path / "run", *more)
