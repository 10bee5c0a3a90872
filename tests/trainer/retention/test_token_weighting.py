"""Compare the weights of tokens with plain torch: DFT, EAFT, ASFT, STM and FLOW; and train with each."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.models import stir
from tests.helpers.retention import assert_close, plain_rows, ready_run, samples, step, stock
from tests.helpers.runs import QUESTIONS, arguments, records, write_chats
from trainer.cli import parse
from trainer.config import BatchSize, Config, Data, Lora, Retention
from trainer.data.batch import batches
from trainer.data.prepare import prepare_data
from trainer.data.samples import Piece
from trainer.errors import UserError
from trainer.model.loading import load_model
from trainer.model.lora import add_adapter
from trainer.model.patch import patch
from trainer.retention import token_weighting
from trainer.retention.kl import FrozenBase
from trainer.run import train
from trainer.runtime.distributed import Distributed
from trainer.training.loader import supervised_weight

CPU = torch.device("cpu")
ROLES = ("domain", "replay")
RANDOM = 363  # perplexity of a token to a model with random weights, about: its vocabulary


def plain_losses(model: torch.nn.Module, chat: Piece) -> torch.Tensor:
    """-log p of a sample's supervised tokens."""
    targets = torch.from_numpy(chat.input_ids[1:].astype(np.int64))[torch.from_numpy(chat.supervised[1:])]
    return -plain_rows(model, chat).gather(1, targets[:, None])[:, 0]


def check_weights(run, on: str, weigh) -> None:
    """Compare loss and gradients of a step with those of losses that `weigh(losses, log_probs)` weights in plain torch."""
    model, _ = stock(run)
    total = weight = 0.0
    for chat in samples():
        losses = plain_losses(model, chat)
        weighted = losses * weigh(losses, plain_rows(model, chat)) if on == "all" or chat.source == 0 else losses
        total, weight = total + chat.weight * weighted.sum(), weight + chat.weight * len(losses)
    expected = total / weight
    gradient = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    for packs in ([samples()], [samples()[:2], samples()[2:]]):
        loss, divergence, gradients = step(run, packs)
        assert divergence is None
        assert_close([loss], [expected])
        assert_close(gradients, gradient)


# ---------------------------------------------------------------- DFT


@pytest.mark.parametrize("family, adapter, on", [("llama", "lora", "domain"), ("gemma2", "lora", "all"), ("llama", "full", "domain")])
def test_dft_is_a_loss_times_its_own_probability(family, adapter, on):
    check_weights(ready_run(family, adapter, token_weighting="dft", token_weighting_sources=on), on,
                  lambda losses, log_probs: torch.exp(-losses.detach()))


def test_dft_beside_a_divergence_adds_up():
    both, dft = (ready_run("llama", token_weighting="dft", kl_weight=kl) for kl in (0.5, 0.0))
    kl, plain = ready_run("llama", kl_weight=0.5), ready_run("llama")
    (a, divergence, one), (b, _, two), (_, same, three), (_, _, four) = (step(run, [samples()]) for run in (both, dft, kl, plain))
    assert torch.equal(a, b) and torch.equal(divergence, same)
    assert_close([x - y for x, y in zip(one, two)], [x - y for x, y in zip(three, four)], 1e-3)


@pytest.mark.parametrize("family, adapter, on", [("llama", "lora", "domain"), ("gemma2", "full", "all")])
def test_eaft_is_a_loss_times_the_entropy_of_its_likeliest_tokens(family, adapter, on):
    def entropy(losses, log_probs):
        return torch.special.entr(log_probs.detach().topk(20).values.softmax(1)).sum(1) / math.log(20)

    check_weights(ready_run(family, adapter, token_weighting="eaft", token_weighting_sources=on), on, entropy)


@pytest.mark.parametrize("family, adapter", [("llama", "lora"), ("gemma2", "full")])
def test_asft_is_dft_and_a_forward_divergence_on_domain_tokens(family, adapter):
    """ASFT of the domain, as the paper has it, beside replay, which is learnt as it is."""
    run = ready_run(family, adapter, token_weighting="dft", kl_weight=0.05, kl_sources="domain")
    model, base = stock(run)
    learnt = anchored = weight = domain_weight = 0.0
    for chat in samples():
        losses = plain_losses(model, chat)
        weight += chat.weight * len(losses)
        if chat.source == 0:
            log_p, log_q = plain_rows(model, chat), plain_rows(base, chat).detach()
            anchored = anchored + chat.weight * torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
            losses, domain_weight = losses * torch.exp(-losses.detach()), domain_weight + chat.weight * len(losses)
        learnt = learnt + chat.weight * losses.sum()
    expected = learnt / weight, anchored / domain_weight
    gradient = torch.autograd.grad(expected[0] + 0.05 * expected[1], [p for p in model.parameters() if p.requires_grad])
    loss, divergence, gradients = step(run, [samples()[:2], samples()[2:]])
    assert float(divergence) > 1e-3
    assert_close((loss, divergence), expected)
    assert_close(gradients, gradient)


def test_probabilities_are_no_part_of_the_gradient():
    losses = torch.tensor([0.5, 3.0], requires_grad=True)
    found = token_weighting.own_probability(losses, torch.tensor([True, False]))
    assert not found.requires_grad and found.tolist() == [pytest.approx(math.exp(-0.5)), 1.0]


# ---------------------------------------------------------------- what the base decides


@pytest.fixture(scope="module")
def prepared(model_folder, tmp_path_factory):
    """A configuration with domain and replay, its samples, and the model that it names."""
    folder = tmp_path_factory.mktemp("data")
    domain, replay = write_chats(folder / "domain.jsonl", QUESTIONS[:25]), write_chats(folder / "general.jsonl", QUESTIONS[60:70])
    config = parse(Config, arguments(model_folder, domain, folder / "run", "--replay.data", str(replay)), "trainer.run")
    model, tokenizer = load_model(config, CPU)
    patch(model)
    return config, prepare_data(config, tokenizer).samples, model


def reweighted(prepared, **options):
    config, given, model = prepared
    config = Config(**{**vars(config), "retention": Retention(**options)})
    return token_weighting.apply_token_weighting(given, config, model, ROLES, CPU, Distributed())


@pytest.mark.parametrize("on", ["domain", "all"])
def test_stm_masks_what_is_improbable_under_the_base(prepared, model_folder, on):
    given = prepared[1]
    stm, told = reweighted(prepared, token_weighting="stm", token_weighting_sources=on, stm_threshold=RANDOM)
    plain, masked, total = AutoModelForCausalLM.from_pretrained(model_folder).double(), 0, 0
    for i in range(len(given)):
        losses, before, after = plain_losses(plain, given.piece(i)).detach().numpy(), given[i][1], stm[i][1]
        expected = before.copy()
        places = np.flatnonzero(before[1:]) + 1
        if on == "all" or given.sources[i] == 0:
            expected[places[np.exp(losses) > RANDOM]] = False
            masked, total = masked + (np.exp(losses) > RANDOM).sum(), total + len(places)
        assert np.array_equal(after, expected) and stm.supervised[i] == expected[1:].sum()
        assert np.array_equal(stm[i][0], given[i][0])
    assert 0.1 < masked / total < 0.9 and told.startswith(f"stm: {masked / total:.1%} of {total:,} supervised tokens are masked; the base")
    assert given.fingerprint != stm.fingerprint


@pytest.mark.parametrize("on", ["domain", "all"])
def test_flow_weighs_samples_by_how_easy_they_are(prepared, model_folder, on):
    given = prepared[1]
    flow, told = reweighted(prepared, token_weighting="flow", token_weighting_sources=on)
    plain = AutoModelForCausalLM.from_pretrained(model_folder).double()
    losses = np.array([float(plain_losses(plain, given.piece(i)).detach().mean()) for i in range(len(given))])
    here = np.ones(len(given), dtype=bool) if on == "all" else given.sources == 0
    expected = np.where(here, np.exp(-losses / np.median(losses[here])), 1.0)
    np.testing.assert_allclose(flow.weights, expected, rtol=1e-5)
    assert told.startswith("flow: sample weights 0.3") and np.array_equal(flow.supervised, given.supervised)


def test_weights_multiply_those_that_samples_have(prepared):
    given = prepared[1].weighted(np.arange(3), np.array([2.0, 3.0, 4.0], dtype=np.float32))
    flow, _ = reweighted((prepared[0], given, prepared[2]), token_weighting="flow")
    plain, _ = reweighted(prepared, token_weighting="flow")
    np.testing.assert_allclose(flow.weights[:3] / plain.weights[:3], [2, 3, 4], rtol=1e-6)
    assert supervised_weight(flow, np.arange(3)) == pytest.approx(float((flow.supervised[:3] * flow.weights[:3]).sum()))


def test_a_base_is_never_the_adapted_model(prepared):
    """Also where training goes on from an adapter."""
    config, given, model = prepared
    expected = token_weighting.base_log_probs(model, given, np.arange(5), config.batch, CPU, Distributed())
    adapted = add_adapter(load_model(config, CPU)[0], Lora(rank=4))
    stir(adapted)
    patch(adapted)
    assert np.array_equal(token_weighting.base_log_probs(adapted, given, np.arange(5), config.batch, CPU, Distributed()), expected)
    batch, = batches(given, [np.arange(5)], CPU)
    assert FrozenBase(adapted).hidden(batch, batch.supervised_rows).shape == (len(batch.targets), 64)


def test_neither_packs_nor_ranks_matter(prepared):
    class Silent(Distributed):
        def sum(self, tensors):
            """Leaves each rank with its own share, which the test adds up."""

    config, given, model = prepared
    indices = np.random.default_rng(0).permutation(len(given))[:20]
    whole = token_weighting.base_log_probs(model, given, indices, config.batch, CPU, Distributed())
    ranks = [token_weighting.base_log_probs(model, given, indices, config.batch, CPU, Silent(rank, 3)) for rank in range(3)]
    assert np.array_equal(sum(ranks), whole) and not np.array_equal(ranks[0], whole)
    one_a_pack = token_weighting.base_log_probs(model, given, indices, BatchSize(max_samples_per_pack=1), CPU, Distributed())
    np.testing.assert_allclose(one_a_pack, whole, rtol=1e-4, atol=1e-5)


def test_parts_of_a_record_are_masked_apart(tokenizer, model_folder, tmp_path):
    """Windows on one record, whose first token is never a target, share its memory."""
    rows = [(f"Count {i}.", f"record {i} " * 30) for i in range(4)]
    data = Data(train=str(write_chats(tmp_path / "long.jsonl", rows)), max_length=64, on_overlong="split",
                cache_dir=str(tmp_path / "cache"))
    given = prepare_data(Config(data=data), tokenizer).samples
    assert len(given) > 8
    keep = np.random.default_rng(0).random(given.supervised.sum()) < 0.5
    masked = given.supervising(np.arange(len(given)), keep)
    found = np.concatenate([masked[i][1][1:][given[i][1][1:]] for i in range(len(given))])
    assert np.array_equal(found, keep) and masked.supervised.sum() == keep.sum()
    assert all(masked[i][1][0] == given[i][1][0] for i in range(len(given)))


def test_nothing_asked_for_nothing_changes(prepared):
    for options in ({}, {"token_weighting": "dft"}, {"token_weighting": "eaft"}):
        same, told = reweighted(prepared, **options)
        assert same is prepared[1] and told is None


def test_a_threshold_that_leaves_nothing_is_one_line(prepared):
    with pytest.raises(UserError, match=r"^retention.stm_threshold: .* at most 1.01 .* \(domain samples\), got none; raise it$"):
        reweighted(prepared, token_weighting="stm", stm_threshold=1.01)


def test_flow_weights_of_samples_without_loss():
    assert token_weighting.flow_weights(np.zeros(3)).tolist() == [1, 1, 1]
    assert token_weighting.flow_weights(np.array([0.0, 1.0, 2.0])) == pytest.approx([1, math.exp(-1), math.exp(-2)])


# ---------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.parametrize("option", ["dft", "eaft", "stm", "flow"])
def test_a_run_learns_with_each(prepared, model_folder, tmp_path, capsys, option):
    data = write_chats(tmp_path / "sums.jsonl")
    result = train(parse(Config, arguments(model_folder, data, tmp_path / "run", "--retention.token_weighting", option, "--epochs", "2",
                                           "--retention.stm_threshold", "1000", "--data.eval_fraction", "0.1"), "trainer.run"))
    losses = [r["loss"] for r in records(result.folder, "eval")]
    shown = capsys.readouterr().out
    assert losses[-1] < losses[0] - 0.5 and f"tokens of domain samples weighted by {option.upper()}" in shown
    assert losses[0] == pytest.approx(math.log(RANDOM), abs=0.5), "what is held out is measured as it is"
    assert (f"\n{option}: " in shown) == (option in ("stm", "flow"))
    supervised = json.loads((result.folder / "data.json").read_text())["sources"][0]["supervised"]
    assert supervised > 0 and sum(r["supervised"] for r in records(result.folder, "step")) == pytest.approx(2 * supervised, rel=0.01)
