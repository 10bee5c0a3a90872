"""The divergence from the base and the pull towards it: the whole step against plain torch, one sample at a time; and whole runs."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.forgetting.miniature.domain import DOMAIN
from benchmarks.forgetting.miniature.family import FAMILY
from benchmarks.forgetting.miniature.skills import GENERAL
from benchmarks.forgetting.miniature.world import training_records, write_jsonl
from kernels import linear_cross_entropy
from tests.helpers import tiny
from tests.helpers.kills import killed_at
from tests.helpers.models import stir
from tests.helpers.retention import CPU, ROLES, assert_close, copied_gradients, plain_rows, ready_run, samples, step, stock
from tests.helpers.runs import Readbacks, arguments, records, weights
from trainer import config
from trainer.cli import parse
from trainer.config import Config, Lora, Optim
from trainer.config_rules import validate
from trainer.data.batch import collate
from trainer.data.samples import Piece
from trainer.errors import UserError
from trainer.metrics.throughput import model_size
from trainer.model.forward import forward_hidden
from trainer.model.loading import use_packed_attention
from trainer.model.lora import adapted_layers, adapters_disabled, add_adapter
from trainer.model.patch import patch
from trainer.optim.adamw import FlatAdamW
from trainer.retention import kl as retention
from trainer.run import train
from trainer.runtime import checkpoint
from trainer.training.memory_estimate import estimate
from trainer.training.training_run import TrainingRun


def without_targets(log_probs: torch.Tensor, chat: Piece, rows: np.ndarray) -> torch.Tensor:
    """log-probabilities [S,V], in the rows of supervised tokens those of all other tokens renormalised, with 0 for the token itself."""
    made = []
    for row, token, supervised in zip(log_probs, chat.input_ids[1:][rows], chat.supervised[1:][rows], strict=True):
        others = torch.cat([row[:token], row[token + 1:]]).log_softmax(-1)
        made.append(torch.cat([others[:token], others.new_zeros(1), others[token:]]) if supervised else row)
    return torch.stack(made)


def plain_step(model: nn.Module, base: nn.Module, chats: list[Piece], kl: float, kl_on: str, direction: str, tokens: str,
               masked: bool = False):
    """The objective's two terms and the gradient of their sum, in fp64."""
    loss = divergence = weight = counted = 0.0
    for chat in chats:
        ids, supervised, own, source, *_ = chat
        ours = plain_rows(model, chat)
        targets = torch.from_numpy(ids[1:].astype(np.int64))[torch.from_numpy(supervised[1:])]
        loss, weight = loss - own * ours.gather(1, targets[:, None]).sum(), weight + own * len(targets)
        if kl_on == "all" or source == ROLES.index(kl_on):
            whole = chat._replace(supervised=np.ones(len(ids), dtype=bool)) if tokens == "all" else chat
            ours, theirs = plain_rows(model, whole), plain_rows(base, whole).detach()
            if masked:
                rows = np.flatnonzero(whole.supervised[1:])
                ours, theirs = (without_targets(side, chat, rows) for side in (ours, theirs))
            mean = torch.log((ours.exp() + theirs.exp()) / 2)
            pairs = {"forward": [(theirs, ours)], "reverse": [(ours, theirs)], "js": [(theirs, mean), (ours, mean)]}[direction]
            terms = [(p.exp() * (p - q)).sum() for p, q in pairs]
            divergence, counted = divergence + own * sum(terms) / len(terms), counted + own * len(ours)
    loss, divergence = loss / weight, divergence / counted
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss, divergence, torch.autograd.grad(loss + kl * divergence, trained)


@pytest.mark.parametrize("tokens", ["supervised", "all"])
@pytest.mark.parametrize("family, adapter, kl_on, direction", [
    ("llama", "lora", "replay", "forward"), ("gemma2", "lora", "all", "reverse"), ("granite", "lora", "replay", "js"),
    ("llama", "full", "replay", "forward"), ("qwen3", "full", "all", "js"), ("gemma2", "full", "replay", "reverse"),
])
def test_the_step_is_that_of_plain_torch(family, adapter, kl_on, direction, tokens):
    run = ready_run(family, adapter, kl_weight=0.7, kl_sources=kl_on, kl_direction=direction, kl_positions=tokens)
    expected = plain_step(*stock(run), samples(), 0.7, kl_on, direction, tokens)
    loss, divergence, gradients = step(run, [samples()])
    assert float(divergence) > 1e-3
    assert_close((loss, divergence), expected[:2])
    assert_close(gradients, expected[2])


@pytest.mark.parametrize("family, adapter, kl_on, direction, tokens", [
    ("llama", "lora", "domain", "forward", "supervised"), ("gemma2", "full", "all", "reverse", "supervised"),
    ("granite", "lora", "all", "js", "all"), ("llama", "full", "replay", "forward", "all")])
def test_masked_targets_are_left_out_of_the_divergence(family, adapter, kl_on, direction, tokens):
    run = ready_run(family, adapter, kl_weight=0.7, kl_sources=kl_on, kl_direction=direction, kl_positions=tokens, kl_mask_target=True)
    expected = plain_step(*stock(run), samples(), 0.7, kl_on, direction, tokens, masked=True)
    for packs in ([samples()], [samples()[:2], samples()[2:]]):
        loss, divergence, gradients = step(run, packs)
        assert float(divergence) > 1e-3
        assert_close((loss, divergence), expected[:2])
        assert_close(gradients, expected[2])


@pytest.mark.parametrize("tokens", ["supervised", "all"])
def test_samples_of_the_kl_alone_are_not_taught(tokens):
    """Their words have no loss: it is that of the other samples, which alone count in its mean."""
    domain, replay = ([chat for chat in samples() if chat.source == source] for source in (0, 1))
    held = dict(kl_weight=0.7, kl_direction="reverse", kl_positions=tokens)
    both, taught = step(ready_run("llama", **held, kl_only=True), [samples()]), step(ready_run("llama"), [domain])
    drawn, plain = step(ready_run("llama", **held, kl_only=True), [replay]), step(ready_run("llama", **held), [replay])
    assert_close(both[:2], (taught[0], plain[1]), 1e-5)
    assert float(drawn[0]) == 0
    assert_close(both[2], [a + b for a, b in zip(taught[2], drawn[2])], 1e-4)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("kl_on, tokens", [("replay", "supervised"), ("all", "supervised"), ("replay", "all")])
def test_how_a_step_is_packed_changes_nothing(adapter, kl_on, tokens):
    chats = samples()
    run = ready_run("llama", adapter, kl_weight=0.7, kl_sources=kl_on, kl_positions=tokens)
    whole = step(run, [chats])
    for packs in ([[chat] for chat in chats], [[chats[0], chats[3]], [chats[4], chats[1]], [chats[2]]], [chats[::-1]]):
        one = step(run, packs)
        assert_close(one[:2], whole[:2], 1e-5)
        assert_close(one[2], whole[2], 1e-4)


def test_two_ranks_add_up_to_one():
    """What each rank gives, added: the weights that both divide by are the whole step's."""
    chats = samples()
    run = ready_run("llama", kl_weight=0.7)
    packs = [[chats[0], chats[1]], [chats[2]], [chats[3]], [chats[4]]]
    whole = step(run, packs)
    ranks = [step(run, packs[rank::2], chats) for rank in (0, 1)]
    for i in (0, 1):
        assert_close([ranks[0][i] + ranks[1][i]], [whole[i]], 1e-5)
    assert_close([a + b for a, b in zip(ranks[0][2], ranks[1][2])], whole[2], 1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_at_its_start_an_adapter_is_the_base(dora):
    def start(**options) -> TrainingRun:
        model = tiny.model("llama").train()
        use_packed_attention(model)
        model = add_adapter(model, Lora(rank=4, dora=dora, dropout=0.5))
        patch(model)
        made = ready_run("llama", **options)
        made.model, made.optimizer = model, FlatAdamW(model.parameters(), Optim())
        made.kl = retention.prepare(config.Retention(**options), model, ROLES)
        made.optimizer.step = lambda lr: made.seen.append(copied_gradients(made.optimizer, model))
        return made

    with_kl, without = (step(start(kl_weight=kl, kl_sources="all"), [samples()])
                        for kl in (0.7, 1e-12))  # with 0, dropout has other draws to make
    assert abs(float(with_kl[1])) < 1e-6 and torch.equal(with_kl[0], without[0])
    assert_close(with_kl[2], without[2], 1e-5)


def test_steps_without_replay_have_no_divergence():
    chats = [chat for chat in samples() if chat.source == 0]
    loss, divergence, gradients = step(ready_run("llama", kl_weight=0.7), [chats])
    plain = step(ready_run("llama"), [chats])
    assert divergence is None and torch.equal(loss, plain[0]) and all(map(torch.equal, gradients, plain[2]))


@pytest.mark.parametrize("adapter, options", [
    ("lora", {"kl_weight": 0.3}), ("full", {"kl_weight": 0.3, "kl_sources": "all"}), ("lora", {"token_weighting": "dft"}),
    ("lora", {"token_weighting": "eaft"}),
    ("full", {"token_weighting": "dft", "kl_weight": 0.3, "kl_positions": "all"}),
    ("lora", {"kl_weight": 0.3, "kl_sources": "domain", "kl_mask_target": True}),
])
def test_a_step_reads_nothing_back(adapter, options):
    run = ready_run("llama", adapter, **options)
    with Readbacks() as readbacks:
        step(run, [samples(), samples()])
    assert readbacks.found == []


def test_without_options_the_step_has_the_bits_it_always_had():
    """The step as it was before there were any, written out."""
    assert Config().retention == config.Retention(kl_weight=0.0, token_weighting="none", l2_sp=0.0)
    assert retention.prepare(Config().retention, None, ROLES) is None and retention.describe(Config().retention, "lora", 0) == []
    run, before = ready_run("gemma2"), ready_run("gemma2")
    packs, total = [samples()[:3], samples()[3:]], torch.zeros(())
    weight = sum(collate([chat]).weight_sum for chat in samples())
    for pack in packs:
        batch, out = collate(pack), before.model.get_output_embeddings()
        rows = forward_hidden(before.model, batch, batch.supervised_rows)
        loss = linear_cross_entropy(rows, out.weight, batch.targets, bias=out.bias, token_weight=batch.weights, ignore_index=None,
                                    softcap=before.model.config.final_logit_softcapping, reduction="sum") / weight
        loss.backward()
        total += loss.detach()
    found, divergence, gradients = step(run, packs)
    assert divergence is None and torch.equal(found, total)
    assert all(map(torch.equal, gradients, copied_gradients(before.optimizer, before.model)))


# ---------------------------------------------------------------- the base


def test_switching_off_leaves_fused_layers_and_gradients_as_they_were(caplog):
    run = ready_run("llama")
    layers, batch = adapted_layers(run.model), collate(samples())
    trained = [p.requires_grad for p in run.model.parameters()]
    base = tiny.model("llama")
    use_packed_attention(base)
    patch(base)
    before = forward_hidden(run.model, batch)
    with adapters_disabled(layers), torch.no_grad():
        assert torch.equal(forward_hidden(run.model, batch), forward_hidden(base, batch))
    assert torch.equal(forward_hidden(run.model, batch), before) and not caplog.records
    assert [p.requires_grad for p in run.model.parameters()] == trained


def test_pefts_own_layers_are_switched_off_too():
    model = add_adapter(tiny.model("llama").train(), Lora(rank=4, dropout=0.5))
    use_packed_attention(model.get_base_model())
    stir(model)
    plain, batch = tiny.model("llama"), collate(samples())
    use_packed_attention(plain)
    assert torch.equal(retention.FrozenBase(model).hidden(batch, batch.supervised_rows),
                       forward_hidden(plain, batch)[batch.supervised_rows])
    assert model.training and not any(layer.disable_adapters for layer in adapted_layers(model))


def test_the_bases_flops_are_those_that_torch_counts():
    for adapter in ("lora", "full"):
        model = tiny.model("llama", tie_word_embeddings=False, attn_implementation="eager")
        size, tokens = model_size(add_adapter(copy.deepcopy(model), Lora(rank=4)) if adapter == "lora" else model), 96
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.randint(5, 300, (1, tokens)), use_cache=False)
        causal_half = 2 * tokens**2 * size.attention_width  # eager attention computes the full square
        assert counter.get_total_flops() == pytest.approx(size.base_flops(tokens, tokens, tokens**2) + causal_half, rel=0.01)


def test_a_second_copy_and_what_training_began_with_are_in_the_memory_estimate():
    model = tiny.model("llama")
    count = sum(p.numel() for p in model.parameters())
    plain, held = (estimate(model, Config(method="full", retention=r), torch.float32, CPU)
                   for r in (config.Retention(), config.Retention(kl_weight=0.3, l2_sp=0.1)))
    assert held.weights - plain.weights == 4 * count and held.masters - plain.masters == 4 * count
    adapted = add_adapter(model, Lora(rank=4))
    plain, held = (estimate(adapted, Config(retention=r), torch.float32, CPU)
                   for r in (config.Retention(), config.Retention(kl_weight=0.3)))
    assert held == plain


def test_no_room_for_the_copy_is_one_line(monkeypatch):
    def full(model):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny.model("llama")
    monkeypatch.setattr(retention.copy, "deepcopy", full)
    with pytest.raises(UserError, match="^retention.kl_weight: expected room .* train an adapter, .* or set retention.kl_weight to 0$"):
        retention.prepare(config.Retention(kl_weight=0.3), model, ROLES)


# ---------------------------------------------------------------- weights that decay to where they began


def test_decay_towards_the_start_is_what_it_says():
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    plain = copy.deepcopy(model)
    starts = [p.detach().clone() for p in plain.parameters()]
    flat, adamw = FlatAdamW(model.parameters(), Optim(max_grad_norm=0)), torch.optim.AdamW(plain.parameters(), weight_decay=0.0)
    flat.enable_l2_sp(3.0)
    for i in range(6):
        for one in (model, plain):
            one(torch.randn(11, 7, generator=torch.Generator().manual_seed(i))).square().sum().backward()
        with torch.no_grad():
            for p, start in zip(plain.parameters(), starts):
                p += 0.05 * 3.0 * (start - p)
        adamw.param_groups[0]["lr"] = 0.05
        adamw.step()
        adamw.zero_grad()
        flat.step(0.05)
        flat.zero_grad()
    for ours, expected in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    kept = [group.master.clone() for group in flat.groups]
    for group in flat.groups:
        group.master.grad.fill_(math.nan)
    flat.step(0.05)
    assert all(map(torch.equal, kept, (group.master for group in flat.groups))), "a step that is not finite changes nothing"


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    write_jsonl(training_records(DOMAIN, 120, seed=0), folder / "domain.jsonl")
    write_jsonl(training_records(GENERAL, 60, seed=1), folder / "general.jsonl")
    return folder


def run(data: Path, output: Path, *more):
    options = ("--replay.data", str(data / "general.jsonl"), "--data.max_length", "256", *more)
    return train(parse(Config, arguments(FAMILY["base"].folder, data / "domain.jsonl", output, *options), "trainer.run"))


def divergence_on_replay(data: Path, adapter: Path) -> float:
    """Mean KL(base || model) over the answers to replay prompts, by stock PEFT."""
    base = FAMILY["base"].folder
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    total = count = 0
    for line in (data / "general.jsonl").read_text().splitlines()[:30]:
        chat = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True).input_ids
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True).input_ids
        with torch.no_grad():
            ours = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
            with model.disable_adapter():
                theirs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
        total, count = total + float((theirs.exp() * (theirs - ours)).sum()), count + len(ours)
    return total / count


@pytest.mark.report
@pytest.mark.slow
def test_a_run_with_it_stays_nearer_to_its_base(miniature, tmp_path):
    for name, kl in (("without", "0"), ("with", "1.0")):
        run(miniature, tmp_path / name, "--epochs", "2", "--retention.kl_weight", kl)
    near, far = (divergence_on_replay(miniature, tmp_path / name / "adapter") for name in ("with", "without"))
    assert 0 < near < 0.6 * far
    steps = records(tmp_path / "with", "step")
    assert all(r["kl"] >= 0 and r["seconds"]["base"] > 0 for r in steps) and steps[0]["kl"] != steps[-1]["kl"]
    assert not any("kl" in r or "base" in r["seconds"] for r in records(tmp_path / "without", "step"))
    page = (tmp_path / "with" / "report.html").read_text()
    assert "KL to the base" in page and (tmp_path / "with" / "kl.png").exists()
    assert "KL to the base" not in (tmp_path / "without" / "report.html").read_text()


@pytest.mark.slow
def test_a_run_says_what_it_holds_to(miniature, tmp_path, capsys):
    run(miniature, tmp_path / "run", "--max_steps", "1", "--retention.kl_weight", "0.3", "--retention.l2_sp", "2")
    shown = capsys.readouterr().out
    assert "retention: 0.3 * KL(base || model) on replay samples; base: the model without its adapter" in shown
    assert "retention: L2-SP: weights decay by lr * 2 a step towards their start" in shown and "  kl 0.0000  lr" in shown
    run(miniature, tmp_path / "dry", "--dry_run", "--method", "full", "--retention.kl_weight", "0.3", "--retention.kl_direction", "js",
        "--retention.kl_mask_target", "true")
    expected = ("0.3 * Jensen-Shannon divergence from the base on replay samples, their targets masked; base: a frozen second copy of the "
                "model, 0.00137 GB")
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_decays_to_where_it_began(miniature, tmp_path):
    """At l2 = 1 / lr each step begins where the run did, so no weight gets further than one step goes."""
    options = ("--max_steps", "8", "--optim.lr_scheduler", "constant", "--optim.warmup_ratio", "0")
    for name, l2 in (("free", "0"), ("held", "200")):
        run(miniature, tmp_path / name, *options, "--retention.l2_sp", l2)
    free, held = (max(float(tensor.abs().max()) for key, tensor in weights(tmp_path / name).items() if "lora_B" in key)
                  for name in ("free", "held"))
    assert held <= 5e-3 * 1.01 and free > 2 * held


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("--retention.kl_weight", "0.3", "--retention.token_weighting", "flow", "--retention.l2_sp", "0.5", "--lora.dropout", "0.1"),
    ("--retention.kl_weight", "0.3", "--retention.kl_sources", "all", "--retention.token_weighting", "stm", "--retention.l2_sp", "0.5",
     "--method", "full", "--retention.kl_positions", "all", "--optim.lr", "1e-3", "--precision", "bf16"),
])
def test_a_killed_run_goes_on_bit_for_bit(miniature, tmp_path, options):
    options = (*options, "--max_steps", "8", "--checkpoint.every", "2", "--logging.every", "1")
    run(miniature, tmp_path / "whole", *options)

    with killed_at(step=6):
        run(miniature, tmp_path / "cut", *options)
    assert checkpoint.newest(tmp_path / "cut" / "checkpoints").name == "step-00000004"
    run(miniature, tmp_path / "cut", *options, "--resume", "auto")
    name = "adapter/adapter_model.safetensors" if "full" not in options else "model/model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    figures = [[(r["step"], r["loss"], r["kl"]) for r in records(tmp_path / side, "step")] for side in ("whole", "cut")]
    assert figures[0] == figures[1] and len(figures[0]) == 8
    with pytest.raises(UserError, match="retention.kl_weight was 0.3, is 0.4"):
        (tmp_path / "cut" / name).unlink()
        (tmp_path / "cut" / name).parent.rename(tmp_path / "aside")
        run(miniature, tmp_path / "cut", *options, "--resume", "auto", "--retention.kl_weight", "0.4")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("options, expected", [
    (["--retention.kl_weight", "0.3"],
     "retention.kl_weight: expected replay samples to count .*, or retention.kl_sources=domain or all, got none"),
    (["--retention.kl_weight", "0.3", "--replay.data", "x.jsonl", "--replay.ratio", "0"], "retention.kl_weight: expected replay samples"),
    (["--retention.kl_weight", "-1"], "retention.kl_weight: expected 0 or more, got -1.0"),
    (["--retention.kl_weight", "nan"], "retention.kl_weight: expected float, got nan"),
    (["--retention.l2_sp", "-0.1"], "retention.l2_sp: expected 0 or more, got -0.1"),
    (["--retention.l2_sp", "1e6"],
     "retention.l2_sp: expected at most 1 / optim.lr = 200, at which a step goes all the way back, got 1000000.0"),
    (["--retention.stm_threshold", "1"], "retention.stm_threshold: expected a perplexity above 1, got 1.0"),
    (["--retention.l2_sp", "1", "--model.path", "null", "--model.config", "x", "--method", "full"],
     "retention.l2_sp: expected model.path, as random weights are no base, got model.config"),
    (["--retention.token_weighting", "flow", "--model.path", "null", "--model.config", "x", "--method", "full"],
     "retention.token_weighting: expected model.path"),
    (["--retention.kl_direction", "backward"], "retention.kl_direction: expected one of 'forward'"),
    (["--retention.token_weighting", "dtf"], "retention.token_weighting: expected one of 'none', 'dft', 'eaft', 'stm', 'flow'"),
    (["--retention.kl_directoin", "js"], "unknown option retention.kl_directoin: did you mean retention.kl_direction"),
])
def test_mistakes_are_one_line(options, expected):
    with pytest.raises(UserError, match=expected) as raised:
        validate(parse(Config, arguments("model", "chats.jsonl", "out", *options), "trainer.run"))
    assert "\n" not in str(raised.value)
