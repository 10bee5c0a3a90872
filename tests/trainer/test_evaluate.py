"""Scores of items against plain transformers and torch, whole evaluations, and mistakes.

The model is the base of the miniature world; its adapter is drawn at random, strong enough to lose some items and keep others.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import heldout_items, write_jsonl
from kernels.nf4 import dequantize_nf4
from tests.helpers import tiny
from tests.helpers.adapters import save_random_adapter
from tests.helpers.processes import complete
from trainer.cli import parse
from trainer.config import Model
from trainer.errors import UserError
from trainer.evaluate import evaluate
from trainer.evaluation.config import Config, Data
from trainer.evaluation.generation import generate_completions
from trainer.evaluation.items import read_files
from trainer.evaluation.likelihood import kl_per_row
from trainer.evaluation.models import find_models, load_each, template_of
from trainer.evaluation.score_items import score
from trainer.evaluation.tokens import Key, encode
from trainer.model.forward import LmHead
from trainer.model.quantization import is_quantized, nf4_of
from trainer.report import answers

BASE = FAMILY["base"].folder
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_random_adapter(BASE, tmp_path_factory.mktemp("adapter") / "adapter", rank=4, spread=0.12)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files of every kind."""
    folder, items = tmp_path_factory.mktemp("items"), heldout_items(GENERAL, 3)
    write_jsonl([item.record for item in items], folder / "exact.jsonl")
    write_jsonl([{"question": item.instruction, "choices": [item.answer[::-1] + "s", item.answer, item.answer + item.answer], "answer": 1}
                 for item in items], folder / "choice.jsonl")
    write_jsonl([{"question": item.instruction, "answer": f"#### {item.answer}"} for item in items], folder / "regex.jsonl")
    write_jsonl([{"text": f"{item.instruction} {item.answer}"} for item in items], folder / "text.jsonl")
    return folder


def config(*arguments) -> Config:
    return parse(Config, ["--device", "cpu", "--generation.max_tokens", "24", *map(str, arguments)], "trainer.evaluate")


def scored(*arguments):
    """Return the item files, and the outcomes of base and model (or of the model only)."""
    evaluation_config, outcomes = config(*arguments), {}
    items = read_files(evaluation_config.data)
    for loaded in load_each(find_models(evaluation_config), evaluation_config, CPU):
        base = outcomes.get("base")
        outcomes[loaded.name] = score(loaded, items, evaluation_config, base.base_states if base else None, remember=base is None)
    return items, outcomes


@pytest.fixture(scope="module")
def stock(adapter):
    """Plain transformers and PEFT."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval(), AutoTokenizer.from_pretrained(BASE)


@torch.no_grad()
def plain_logprob(model, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


def chat_ids(tokenizer, question: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True)["input_ids"]


# ---------------------------------------------------------------- against plain transformers


@pytest.mark.slow
def test_log_probs_of_choices_and_answers_are_those_of_transformers(adapter, files, stock):
    items, outcomes = scored("--adapter", adapter, "--data.general", files / "choice.jsonl")
    model, tokenizer = stock
    for name in ("base", "model"):
        for item, outcome in zip(items[0].items, outcomes[name].of_file(0)):
            prompt = chat_ids(tokenizer, item.prompt[0]["content"])
            spelt = [tokenizer(choice, add_special_tokens=False).input_ids for choice in item.choices]
            if name == "base":
                with model.disable_adapter():
                    expected = [plain_logprob(model, prompt, ids) for ids in spelt]
            else:
                expected = [plain_logprob(model, prompt, ids) for ids in spelt]
            assert outcome.choice_logprobs == pytest.approx(expected, abs=2e-4)
            assert outcome.logprob == outcome.choice_logprobs[1] and outcome.tokens == len(spelt[1])
            assert outcome.bytes == len(item.choices[1].encode())
            best = {"sum": expected, "characters": [e / len(c) for e, c in zip(expected, item.choices)],
                    "tokens": [e / len(ids) for e, ids in zip(expected, spelt)]}
            assert outcome.picks == {norm: values.index(max(values)) == 1 for norm, values in best.items()}


def test_an_answer_in_a_chat_is_scored_with_the_end_of_its_turn(files, stock):
    items, outcomes = scored("--model.path", BASE, "--data.domain", files / "exact.jsonl", "--data.metric", "exact")
    model, tokenizer = stock
    with model.disable_adapter():
        for item, outcome in zip(items[0].items, outcomes["model"].of_file(0)):
            answer = [*tokenizer(item.answers[0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            expected = plain_logprob(model, chat_ids(tokenizer, item.prompt[0]["content"]), answer)
            assert outcome.logprob == pytest.approx(expected, abs=2e-4) and outcome.tokens == len(answer)
            assert outcome.bytes == len(item.answers[0].encode()), "special tokens have no bytes"


def test_without_a_chat_template_choices_follow_the_prompt_and_a_space(tmp_path, model_folder):
    """Score, like lm-evaluation-harness, the tokens of the whole without those of the stripped prompt."""
    write_jsonl([{"prompt": "The quick brown", "choices": ["fox", "lazy dog", "zzz"], "answer": "fox"}], tmp_path / "a.jsonl")
    _, outcomes = scored("--model.path", model_folder, "--data.general", tmp_path / "a.jsonl", "--data.chat", "false")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(model_folder)
    prompt = tokenizer("The quick brown").input_ids
    spelt = [tokenizer(f"The quick brown {choice}").input_ids[len(prompt):] for choice in ("fox", "lazy dog", "zzz")]
    assert tokenizer.decode(spelt[0][0]) == " fox" and tokenizer.decode(spelt[2][0]) == " ", "with the word, and alone"
    expected = [plain_logprob(model, prompt, ids) for ids in spelt]
    assert outcomes["model"].of_file(0)[0].choice_logprobs == pytest.approx(expected, abs=1e-4)


def test_an_item_with_equal_choices_is_scored_and_counted(tmp_path, model_folder):
    """Count either of two equal choices as right, wherever the index of the right one points: ARC-easy has such an item."""
    rows = [{"question": "Which?", "choices": ["fox", "fox", "zzzzzz"], "answer": answer} for answer in (0, 1)]
    write_jsonl(rows, tmp_path / "a.jsonl")
    _, outcomes = scored("--model.path", model_folder, "--data.general", tmp_path / "a.jsonl")
    first, second = outcomes["model"].of_file(0)
    assert first.choice_logprobs[:2] == pytest.approx([first.choice_logprobs[0]] * 2, abs=1e-4)
    assert first.right and second.right
    assert outcomes["model"].notes == ["a: items with equal choices: 2; either of the two counts"]


def test_a_continuation_is_scored_after_each_choice_of_a_beginning(tmp_path, model_folder):
    row = {"choices": ["The quick", "The lazy old"], "continuation": "brown fox", "answer": 0}
    write_jsonl([row], tmp_path / "a.jsonl")
    _, outcomes = scored("--model.path", model_folder, "--data.general", tmp_path / "a.jsonl", "--data.chat", "false")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(model_folder)
    beginnings = [tokenizer(choice).input_ids for choice in row["choices"]]
    expected = [plain_logprob(model, ids, tokenizer(f"{choice} brown fox").input_ids[len(ids):])
                for ids, choice in zip(beginnings, row["choices"])]
    assert outcomes["model"].of_file(0)[0].choice_logprobs == pytest.approx(expected, abs=1e-4)
    assert outcomes["model"].of_file(0)[0].right == (expected[0] > expected[1])


@torch.no_grad()
def test_a_continuation_is_right_if_each_of_its_tokens_is_the_likeliest(tmp_path, model_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(model_folder)
    prompts = [f"The {word} fox jumps over" for word in ("quick", "lazy", "brown", "old")]
    likeliest = [tokenizer.decode(model(torch.tensor([tokenizer(p).input_ids])).logits[0, -1].argmax()) for p in prompts]
    kept = [(p, word[1:]) for p, word in zip(prompts, likeliest) if word[:1] == " " and word[1:].isalpha()]
    rows = [{"prompt": p, "answer": word} for p, word in kept] + [{"prompt": prompts[0], "answer": "zebra"}]
    write_jsonl(rows, tmp_path / "a.jsonl")
    arguments = ["--data.general", tmp_path / "a.jsonl", "--data.metric", "continuation", "--data.chat", "false"]
    _, outcomes = scored("--model.path", model_folder, *arguments)
    assert [outcome.right for outcome in outcomes["model"].of_file(0)] == [True] * len(kept) + [False]
    assert outcomes["model"].of_file(0)[-1].logprob < 0


def test_answers_under_rules_are_judged_strictly_and_loosely_beside_what_is_said(adapter, tmp_path):
    rows = [{"prompt": "Say something.", "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
             "kwargs": [{}, {"relation": relation, "num_words": 1}]} for relation in ("at least", "less than")]
    write_jsonl(rows, tmp_path / "a.jsonl")
    results = evaluate(config("--adapter", adapter, "--data.general", tmp_path / "a.jsonl", "--output", tmp_path / "out"))
    file, = results["files"]
    records = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    for name in ("base", "model"):
        outcomes = [record[name] for record in records]
        assert [outcome["right"] for outcome in outcomes] == [all(outcome["rules"]["strict"]) for outcome in outcomes]
        assert [outcome["rules"]["strict"][0] for outcome in outcomes] == ["," not in outcome["prediction"] for outcome in outcomes]
        assert file["rules"]["strict, by instruction"][name]["accuracy"] == sum(sum(o["rules"]["strict"]) for o in outcomes) / 4
        assert file[name]["said"]["ended"] == sum(outcome["finished"] for outcome in outcomes) / 2
        assert file[name]["said"]["words"] == sum(len(re.findall(r"\w+", outcome["prediction"])) for outcome in outcomes) / 2
    assert {"lost", "gained", "p"} <= set(file["change"]["ended"]) and {"lost", "gained", "p"} <= set(file["rules"]["loose"]["change"])
    assert "rules, loose, by instruction" in (tmp_path / "out/report.html").read_text() and records[0]["asked"]


def test_a_file_has_its_own_longest_answer_and_may_ask_for_an_end(tmp_path, model_folder):
    write_jsonl([{"prompt": "Say something.", "rules": ["length_constraints:number_words"],
                  "kwargs": [{"relation": "less than", "num_words": 1000}]}], tmp_path / "a.jsonl")
    entries = json.dumps([{"path": str(tmp_path / "a.jsonl"), "max_tokens": n, "must_end": must} for n in (3, 5) for must in (False, True)])
    evaluation_config = parse(Config, ["--device", "cpu", "--model.path", str(model_folder), "--data.general", entries], "trainer.evaluate")
    items = read_files(evaluation_config.data)
    loaded, = load_each(find_models(evaluation_config), evaluation_config, CPU)
    outcomes = [score(loaded, items, evaluation_config).of_file(f)[0] for f in range(4)]
    assert [len(loaded.template.tokenizer(o.prediction).input_ids) <= n for o, n in zip(outcomes, (3, 3, 5, 5))] == [True] * 4
    assert [o.finished for o in outcomes] == [False] * 4 and [o.right for o in outcomes[1::2]] == [False, False]
    assert outcomes[1].rules == {"strict": [False], "loose": [False]}


@pytest.mark.slow
@torch.no_grad()
def test_kl_to_the_base_is_that_of_plain_torch(adapter, files, stock):
    items, outcomes = scored("--adapter", adapter, "--data.general", files / "exact.jsonl", "--data.domain", files / "text.jsonl")
    model, tokenizer = stock
    for f, file in enumerate(items):
        for item, outcome in zip(file.items, outcomes["model"].of_file(f)):
            if item.text is None:
                question, answer = (turn["content"] for turn in item.chat)
                prompt = chat_ids(tokenizer, question)
                ids = [*prompt, *tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            else:
                ids = [*tokenizer(item.text).input_ids, tokenizer.eos_token_id]
                prompt = ids[:1]
            assert outcome.logprob == pytest.approx(plain_logprob(model, prompt, ids[len(prompt):]), abs=2e-3)
            q = model(torch.tensor([ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1).double()
            with model.disable_adapter():
                p = model(torch.tensor([ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1).double()
            assert outcome.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-4) and outcome.kl > 0
            assert outcome.tokens == len(ids) - len(prompt)
    assert all(outcome.kl is None for outcome in outcomes["base"].items.values())


def test_heads_that_differ_are_compared_slice_by_slice():
    x, y, weight, other_weight = torch.randn(5, 8), torch.randn(5, 12), torch.randn(40, 8), torch.randn(40, 12)
    plain, capped = LmHead(weight, None, None, 1.0), LmHead(other_weight, torch.randn(40), 5.0, 0.5)
    p, q = capped.logits(y).log_softmax(-1), plain.logits(x).log_softmax(-1)
    torch.testing.assert_close(kl_per_row(x, plain, y, capped), (p.exp() * (p - q)).sum(-1))
    same = LmHead(other_weight, torch.randn(40), None, 1.0)
    p = same.logits(y).log_softmax(-1)
    torch.testing.assert_close(kl_per_row(x, plain, y, same), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_generated_answers_are_those_of_transformers_one_by_one(adapter, files, stock):
    model, tokenizer = stock
    evaluation_config = config("--adapter", adapter, "--data.general", files / "exact.jsonl", "--data.metric", "exact")
    items = read_files(evaluation_config.data)
    for loaded in load_each(find_models(evaluation_config), evaluation_config, CPU):
        prompts = [prompt.ids for prompt in encode(items, loaded.template, evaluation_config, loaded.context).prompts]
        found = generate_completions(loaded.model, loaded.template, prompts, [24] * len(prompts), batch_size=7)
        before = loaded.model.config._attn_implementation
        with model.disable_adapter() if loaded.name == "base" else torch.no_grad():
            for ids, answer in zip(prompts, found):
                out = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=24, pad_token_id=2)
                out = out[0, len(ids):].tolist()
                assert answer.text == tokenizer.decode(out, skip_special_tokens=True)
                assert answer.tokens == len(out) and answer.finished == (out[-1] == tokenizer.eos_token_id)
        assert before == loaded.model.config._attn_implementation == "steadfast_packed", "packs go on as before"


def test_attention_that_caps_its_logits_generates_as_in_transformers(tmp_path):
    folder = tiny.save_model(tmp_path / "gemma2", "gemma2", attn_logit_softcapping=0.5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(100)  # so that there is something to cap
    model.save_pretrained(folder)
    write_jsonl([{"prompt": "The quick brown fox", "answer": "x"}, {"prompt": "How many", "answer": "x"}], tmp_path / "a.jsonl")
    _, outcomes = scored("--model.path", folder, "--data.general", tmp_path / "a.jsonl")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for outcome, question in zip(outcomes["model"].of_file(0), ("The quick brown fox", "How many")):
        ids = torch.tensor([chat_ids(tokenizer, question)])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)[0, ids.shape[1]:]
        assert outcome.prediction == tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (the `quant` extra) is not installed")
@torch.no_grad()
def test_a_base_in_four_bits_is_its_dequantised_weights(adapter, files):
    """Check it with the adapter off: bitsandbytes' forward misreads layers of this width on some CPUs."""
    evaluation_config = config("--adapter", adapter, "--data.general", files / "exact.jsonl", "--data.metric", "exact",
                               "--load_in_4bit", "true")
    items, dense = read_files(evaluation_config.data), AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    for loaded in load_each(find_models(evaluation_config), evaluation_config, CPU):
        if loaded.name == "base":
            for name, module in loaded.model.get_base_model().named_modules():
                if is_quantized(module):
                    dense.get_submodule(name.removesuffix(".base_layer")).weight.copy_(dequantize_nf4(nf4_of(module)))
            found = score(loaded, items, evaluation_config)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for item, outcome in zip(items[0].items, found.of_file(0)):
        prompt = chat_ids(tokenizer, item.prompt[0]["content"])
        answer = [*tokenizer(item.answers[0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert outcome.logprob == pytest.approx(plain_logprob(dense, prompt, answer), abs=1e-3)
    assert sum(outcome.right for outcome in found.of_file(0)) > len(found.items) / 2


# ---------------------------------------------------------------- whole evaluations


@pytest.mark.slow
def test_the_command_leaves_figures_items_and_a_page(adapter, files, tmp_path):
    (tmp_path / "e.yaml").write_text(json.dumps({
        "output": str(tmp_path / "out"), "adapter": str(adapter), "generation": {"max_tokens": 24}, "device": "cpu",
        "data": {"general": [{"path": str(files / "exact.jsonl"), "metric": "exact"}, str(files / "choice.jsonl")],
                 "domain": [{"path": str(files / "regex.jsonl"), "regex": "#### (.+)"}, str(files / "text.jsonl")]}}))
    status, shown, errors = complete("trainer.evaluate", ["--config", tmp_path / "e.yaml"])
    assert status == 0, errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [f["name"] for f in results["files"]] == ["exact", "choice", "regex", "text"] and len(lines) == 4 * 24
    for file in results["files"]:
        own = [line for line in lines if line["file"] == file["name"]]
        assert file["change"]["kl_per_token"] == pytest.approx(
            sum(line["model"]["kl"] for line in own) / sum(line["model"]["tokens"] for line in own))
        if file["metric"] != "logprob":
            marks = [(line["base"]["right"], line["model"]["right"]) for line in own]
            assert file["change"]["lost"] == marks.count((True, False)) and file["change"]["gained"] == marks.count((False, True))
            assert file["model"]["accuracy"] == sum(after for _, after in marks) / 24
    exact, choice, regex, _ = results["files"]
    assert exact["base"]["accuracy"] > 0.6 and exact["change"]["lost"] > 0, "the base can do it, and the adapter forgets some"
    assert regex["base"]["accuracy"] == 0, "nobody writes ####"
    assert choice["model"]["chance_adjusted"] == pytest.approx((choice["model"]["accuracy"] - 1 / 3) / (2 / 3))
    assert results["roles"]["general"]["items"] == 48 and results["roles"]["general"]["base"]["judged"] == 48
    read = answers.read(tmp_path / "out")
    for kind, name in (("forgotten", "lost"), ("gained", "gained")):
        assert [one.kind for one in read].count(kind) == sum(results["roles"][role]["change"][name] for role in ("general", "domain"))
    first, line = read[0], next(line for line in lines if line["base"].get("right") and not line["model"]["right"])
    assert (first.kind, first.source, first.prompt, first.expected) == ("forgotten", "exact", line["question"], line["answers"][0])
    assert (first.base, first.tuned) == (line["base"]["prediction"], line["model"]["prediction"]) and first.base_ended
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h3>Forgotten items</h3>" in page and "<ins>" in page
    assert "Accuracy, general" in page and page.count("<img") == 3 and "all 2 files" in shown
    assert re.search(r"general +exact +exact +24 +\d+\.\d% \[", shown), shown
    assert "holds the results of another evaluation" in refused("--config", tmp_path / "out" / "config.yaml")


@pytest.mark.slow(10)
@pytest.mark.parametrize("command", ["evaluate", "gate"])
def test_in_a_browser_the_page_fits_is_readable_and_reachable(browser, adapter, files, tmp_path, command):
    more = ["--data.domain", files / "regex.jsonl", "--data.regex", "#### (.+)"] if command == "evaluate" else []
    status, _, errors = complete(f"trainer.{command}", ["--adapter", adapter, "--data.general", files / "exact.jsonl", "--device", "cpu",
                                                        "--generation.max_tokens", "16", "--output", tmp_path / "out", *more])
    page = tmp_path / "out" / ("report.html" if command == "evaluate" else "gate.html")
    assert page.is_file(), errors
    assert browser.mistakes(page.as_uri(), tmp_path) == []


@pytest.mark.slow
def test_a_model_alone_and_two_models(files, tmp_path):
    alone = evaluate(config("--model.path", BASE, "--data.general", files / "choice.jsonl", "--output", tmp_path / "alone"))
    assert alone["base"] is None and "change" not in alone["files"][0] and alone["files"][0]["model"]["accuracy"] > 0.6
    copy = shutil.copytree(BASE, tmp_path / "copy")
    two = evaluate(config("--model.path", copy, "--base.path", BASE, "--data.general", files / "choice.jsonl",
                          "--output", tmp_path / "two"))
    change = two["files"][0]["change"]
    assert (change["lost"], change["gained"], change["p"]) == (0, 0, 1) and change["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert two["files"][0]["base"]["accuracy"] == alone["files"][0]["model"]["accuracy"]


@pytest.mark.slow
def test_models_of_other_tokens_are_compared_without_kl(files, model_folder, tmp_path):
    found = evaluate(config("--model.path", BASE, "--base.path", model_folder, "--data.general", files / "choice.jsonl",
                            "--output", tmp_path / "out"))
    assert "kl_per_token" not in found["files"][0]["change"] and found["files"][0]["change"]["gained"] > 0
    assert found["notes"] == [f"KL to the base was not measured: the base predicts {len(tiny.tokenizer())} tokens, the model 103"]


def test_kl_tokens_bound_what_is_kept(adapter, files):
    _, outcomes = scored("--adapter", adapter, "--data.general", files / "text.jsonl", "--scoring.kl_tokens", "200")
    measured = [outcome.tokens for outcome in outcomes["model"].of_file(0) if outcome.kl is not None]
    assert 100 < sum(measured) <= 200
    _, outcomes = scored("--adapter", adapter, "--data.general", files / "text.jsonl", "--scoring.kl_tokens", "0")
    assert all(outcome.kl is None for outcome in outcomes["model"].of_file(0))


def test_held_out_texts_that_are_too_long(tmp_path):
    write_jsonl([{"text": "short text"}, {"text": "long text " * 20}], tmp_path / "a.jsonl")
    arguments = ("--model.path", BASE, "--data.general", tmp_path / "a.jsonl", "--scoring.tokens_per_pack", "64")
    with pytest.raises(UserError, match=r"a.jsonl, line 2: 201 tokens exceed scoring.tokens_per_pack = 64; set data.on_overlong to drop"):
        scored(*arguments)
    _, cut = scored(*arguments, "--data.on_overlong", "truncate")
    _, dropped = scored(*arguments, "--data.on_overlong", "drop")
    assert cut["model"].of_file(0)[1].tokens == 63 and cut["model"].of_file(0)[1].bytes == 63
    assert dropped["model"].of_file(0)[1].logprob is None and dropped["model"].notes == ["1 held-out texts were dropped: too long"]
    assert cut["model"].items[Key(0, 0)].logprob == pytest.approx(dropped["model"].items[Key(0, 0)].logprob, abs=1e-4)


def test_right_answers_too_long_to_measure_are_judged_all_the_same(tmp_path):
    write_jsonl([{"question": "Reverse ab.", "answer": "b" * 600}, {"question": "Reverse ab.", "answer": "ba"}], tmp_path / "a.jsonl")
    _, outcomes = scored("--model.path", BASE, "--data.general", tmp_path / "a.jsonl", "--generation.stop", '["b"]')
    long, short = outcomes["model"].of_file(0)
    assert long.right is False and long.logprob is None and short.logprob < 0
    assert outcomes["model"].notes == ["1 answers were too long to measure their log-prob"]
    assert "b" not in short.prediction and short.finished, "a stop text ends an answer"


# ---------------------------------------------------------------- mistakes


def test_a_pattern_that_yaml_would_take_for_a_comment(tmp_path):
    assert config("--data.regex", "#### (.+)").data.regex == "#### (.+)"
    (tmp_path / "e.yaml").write_text("data:\n  regex: #### (.+)")
    expected = "data.{}: expected a pattern in quotes, as YAML takes what follows a # for a comment, got None"
    assert refused("--config", tmp_path / "e.yaml", "--data.domain", "a") == expected.format("regex")
    (tmp_path / "e.yaml").write_text("data:\n  general:\n  - path: a\n    regex: #### (.+)")
    assert refused("--config", tmp_path / "e.yaml") == expected.format("general: regex")


def refused(*arguments) -> str:
    with pytest.raises(UserError) as raised:
        evaluate(config(*arguments))
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("arguments, expected", [
    (["--data.general", "a.jsonl"], "model.path: expected a model, or an adapter that names its base, got neither"),
    (["--data.general", "[a", "--model.path", "m"], 
     r"data.general: expected a path, or a list of items in YAML with the keys path, name, .*, got \[a"),
    (["--model.path", "m", "--data.general", "a", "--generation.max_tokens", "0"], "generation.max_tokens: expected 1 or more, got 0"),
    (["--model.path", "m", "--data.general", "a", "--statistics.confidence", "95"], "statistics.confidence: expected 0 < confidence < 1"),
    (["--model.path", "m", "--data.general", "a", "--force_base", "true"], "force_base: expected an adapter beside it, got none"),
    (["--model.path", "m", "--data.general", "a", "--base.tokenizer", "t"], "base.tokenizer: expected base.path beside it, got none"),
    (["--model.path", "m", "--data.general", "a", "--task_folder", "t"], "task_folder: expected tasks beside it, got none"),
])
def test_options_that_cannot_be(arguments, expected):
    assert re.match(expected, refused(*arguments))


def test_models_and_adapters_that_do_not_fit(adapter, files, model_folder, tmp_path):
    items = ("--data.general", files / "choice.jsonl", "--output", tmp_path / "out")
    assert refused("--model.path", tmp_path / "none", *items) == f"model.path: there is no folder {tmp_path / 'none'}"
    assert refused("--model.path", BASE, "--base.path", tmp_path / "none", *items) == f"base.path: there is no folder {tmp_path / 'none'}"
    assert refused("--adapter", tmp_path, *items) == f"adapter: expected a folder with adapter_config.json, found none in {tmp_path}"
    other = refused("--adapter", adapter, "--model.path", model_folder, *items)
    assert re.match(r"adapter: .* was trained on .*base, not on model.path = .*; leave out model.path, or, if that is a copy", other)
    unfit = refused("--adapter", adapter, "--model.path", model_folder, "--force_base", "true", *items)
    assert re.match(f"adapter: the adapter in {adapter} does not fit this model: ", unfit)
    assert "set lora.path" not in refused("--model.path", BASE, "--base.path", BASE / "none", *items)
    lost = shutil.copytree(adapter, tmp_path / "lost")
    settings = json.loads((lost / "adapter_config.json").read_text())
    for base, expected in ((str(tmp_path / "gone"), "model.path: there is no folder"), (None, "names no base; set model.path")):
        (lost / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        assert expected in refused("--adapter", lost, *items)
    (lost / "adapter_config.json").write_text("{")
    assert "adapter: cannot read" in refused("--adapter", lost, *items)
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_base_may_bear_the_adapter(adapter, files, tmp_path):
    copy = shutil.copytree(BASE, tmp_path / "copy")
    _, moved = scored("--adapter", adapter, "--model.path", copy, "--force_base", "true", "--data.general", files / "choice.jsonl")
    _, here = scored("--adapter", adapter, "--data.general", files / "choice.jsonl")
    assert [o.kl for o in moved["model"].of_file(0)] == [o.kl for o in here["model"].of_file(0)]


def test_prompts_that_do_not_fit_the_context(tmp_path):
    write_jsonl([{"question": "a" * 495, "answer": "b"}], tmp_path / "a.jsonl")
    arguments = ("--model.path", BASE, "--data.general", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert re.search(r"a.jsonl, line 1: a prompt of 499 tokens and generation.max_tokens = 24 exceed the model's context of 512; lower", (
        refused(*arguments)))
    chats = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}] * 2}]
    write_jsonl(chats, tmp_path / "a.jsonl")
    assert "expected one prompt where data.chat is false, found a chat of 3 turns" in refused(
        *arguments, "--data.metric", "exact", "--data.chat", "false")


def test_tasks_without_their_library_name_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused("--model.path", BASE, "--tasks", "arc_easy,piqa") == (
        "tasks: needs the package lm-eval, which is not installed; pip install 'steadfast-sft[eval]'")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm (the `synth` extra) is not installed")
@pytest.mark.skipif(not os.environ.get("STEADFAST_VLLM"), reason="starts vLLM twice; STEADFAST_VLLM=1 runs it")
def test_vllm_gives_the_answers_of_transformers(adapter, files, tmp_path):
    arguments = ("--adapter", adapter, "--data.general", files / "exact.jsonl", "--data.metric", "exact", "--output")
    for engine in ("transformers", "vllm"):
        evaluate(config(*arguments, tmp_path / engine, "--generation.engine", engine))
    found = [[json.loads(line) for line in (tmp_path / engine / "results.jsonl").read_text().splitlines()]
             for engine in ("transformers", "vllm")]
    for name in ("base", "model"):
        one, other = ([line[name]["prediction"] for line in lines] for lines in found)
        assert sum(a == b for a, b in zip(one, other)) >= len(one) - 1, "but for a tie"
    assert len({line["model"]["prediction"] for line in found[1]}) > 5
    assert [line["base"]["prediction"] for line in found[1]] != [line["model"]["prediction"] for line in found[1]]


def test_what_vllm_cannot_do(adapter, files, monkeypatch, tmp_path):
    arguments = ("--adapter", adapter, "--data.general", files / "regex.jsonl", "--generation.engine", "vllm", "--output", tmp_path / "out")
    assert refused(*arguments, "--load_in_4bit", "true").startswith("generation.engine: vllm cannot load a model in 4 bits")
    broken = f"import sys; print('ValueError: no DoRA'); sys.exit(1)  # {tmp_path}"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", broken], **more))
    assert refused(*arguments) == (f"generation.engine: vllm failed on {BASE}: ValueError: no DoRA; see {tmp_path / 'out' / 'vllm.log'}, "
                               "or use transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(*arguments).startswith("generation.engine: vllm is not installed; pip install")


def test_a_keyword_that_the_template_does_not_read_is_refused():
    options = Config(data=Data(template_kwargs={"enable_thinking": False}))
    with pytest.raises(UserError, match="data.template_kwargs: expected keywords that .* reads .*, got enable_thinking"):
        template_of(Model(path=str(BASE)), options)
