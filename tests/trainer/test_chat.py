"""Conversations with base and tuned model: stock answers, a history each, commands, mistakes, and records to train on."""

import json
import os
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.adapters import save_random_adapter
from trainer import chat
from trainer.cli import parse
from trainer.data.prepare import prepare_data
from trainer.errors import printable
from trainer.report.streamed_answers import StreamedAnswers


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    return save_random_adapter(model_folder, tmp_path_factory.mktemp("adapter") / "adapter", rank=4, spread=2.0)


@pytest.fixture
def talk(monkeypatch, capsys):
    def talk(lines: str, *options) -> tuple[list[str], list[str]]:
        """Pipe lines into the command; return what it prints, and its errors."""
        read, write = os.pipe()
        os.write(write, lines.encode())
        os.close(write)
        with os.fdopen(read) as piped:
            monkeypatch.setattr(sys, "stdin", piped)
            chat.run(parse(chat.Chat, [*map(str, options), "--max_tokens", "6", "--device", "cpu"], "trainer.chat"))
        out, err = capsys.readouterr()
        return [line for line in out.splitlines() if line.startswith(("base: ", "tuned: ", "added "))], \
            [line for line in err.splitlines() if line.startswith("error: ")]  # others are bars
    return talk


def greedy(model, folder, messages) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0,
                         eos_token_id=tokenizer.eos_token_id)[0, ids.shape[1]:]
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.slow
def test_both_answer_as_stock_models_do_each_with_a_history_of_its_own(talk, model_folder, adapter, tmp_path):
    saved = tmp_path / "chats.jsonl"
    said, errors = talk(f"/system Be short.\nWhat is 1?\n/base\nAnd 2?\n/save {saved}\n/both\n/save {saved}\n/quit\nnever asked\n",
                        "--adapter", adapter)
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter).eval()
    chat_ = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 1?"}]
    first = {name: greedy(model, model_folder, chat_) for name, model in (("base", base), ("tuned", tuned))}
    chat_of_base = [*chat_, {"role": "assistant", "content": first["base"]}, {"role": "user", "content": "And 2?"}]
    second = greedy(base, model_folder, chat_of_base)
    records = [json.loads(line)["messages"] for line in saved.read_text().splitlines()]
    assert first["base"] != first["tuned"] and errors == []
    chat_of_tuned = [*chat_, {"role": "assistant", "content": first["tuned"]}]
    assert records == [[*chat_of_base, {"role": "assistant", "content": second}], chat_of_tuned]
    assert len([line for line in said if not line.startswith("added")]) == 3


def test_a_whole_model_has_no_base_and_what_is_saved_can_be_trained_on(talk, model_folder, tmp_path):
    from tests.helpers.runs import arguments
    from trainer.config import Config
    from trainer.model.locate import load_tokenizer

    saved = tmp_path / "chats.jsonl"
    said, errors = talk(f"/base\n/dance\n/save {saved}\nHello\n/save\n/save {tmp_path}/none/x\n/save {saved}\n/reset\n/save {saved}\n",
                        "--model.path", model_folder)
    assert [error.partition(":")[2].split(":")[0].strip() for error in errors] == ["/base", "/dance", "/save", "/save", "/save", "/save"]
    config = parse(Config, arguments(model_folder, saved, tmp_path / "run"), "trainer.run")
    assert len(said) == 2 and len(prepare_data(config, load_tokenizer(config.model)).samples) == 1


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(talk, model_folder, monkeypatch):
    update, calls = StreamedAnswers.update, []

    def interrupted(self, name, text):
        update(self, name, text)
        calls.append(text)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(StreamedAnswers, "update", interrupted)
    said, errors = talk("Hello\nAnd now?\n", "--model.path", model_folder)
    assert said[0] == f"tuned: {printable(calls[1])}" and len(said) == 2 and len(calls) > 3 and errors == []


def test_a_conversation_that_fills_the_context_says_so(talk, model_folder):
    said, errors = talk("word " * 1000 + "\nHello\n", "--model.path", model_folder)
    assert len(said) == 1 and "/reset begins anew" in errors[0]


def test_nothing_that_a_model_says_steers_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with StreamedAnswers(["base", "tuned"]) as shown:
        shown.update("base", "[red]two[/red] \x1b]0;title\x07")
        shown.update("tuned", "[red]one[/red]")
    out = capsys.readouterr().out
    assert "[red]" in out and "\\x1b]0;title\\x07" in out and "\x1b]0;title" not in out


@pytest.mark.parametrize("options, named", [([], "adapter, model.path"), (["--model.path", "m", "--temperature", "-1"], "temperature")])
def test_options_that_no_chat_can_use(options, named):
    with pytest.raises(Exception, match=f"^{named}: expected"):
        chat.run(parse(chat.Chat, options, "trainer.chat"))
    assert torch.is_grad_enabled()
