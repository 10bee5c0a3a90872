"""The baselines do what they claim: they compute the losses of their samples, and see the samples they report."""

from itertools import islice

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.speed import baselines
from benchmarks.speed.baselines import Batching
from tests.helpers import tiny


def some_samples(count=12, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, count)
    return [(rng.integers(5, 250, n).astype(np.int32), np.arange(n) >= rng.integers(0, n)) for n in lengths]


@pytest.fixture
def adapted(model_folder, tmp_path):
    """Makes the same adapted model each time; its adapter is not zero."""
    torch.manual_seed(1)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(tiny.model("llama"), settings).save_pretrained(tmp_path)
    return lambda: baselines.load_stock(model_folder, tmp_path)


def loss_by_hand(model, samples):
    """Mean cross entropy over supervised tokens, one sample at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, supervised in samples:
            ids, supervised = torch.from_numpy(ids).long(), torch.from_numpy(supervised)
            scores = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            total -= scores[torch.arange(len(ids) - 1), ids[1:]][supervised[1:]].sum().item()
            count += int(supervised[1:].sum())
    return total / count


def test_padded():
    batch = baselines.padded([(np.array([5, 6, 7]), np.array([False, True, True])), (np.array([8]), np.array([True]))], pad_token=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_endless_is_epochs_in_new_orders():
    drawn = list(islice(baselines.endless(5, seed=0), 15))
    epochs = [drawn[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1


def test_plain_loop_trains_on_the_losses_of_its_samples(adapted):
    loop = baselines.padded_loop(adapted(), some_samples(), Batching(samples=4), lr=1e-2)
    batch = loop.next_batch()
    expected = loss_by_hand(adapted(), batch)
    done = loop.step_on(batch)
    assert float(done.loss) == pytest.approx(expected, rel=1e-5)
    lengths = [len(ids) for ids, _ in batch]
    assert (done.tokens, done.padding) == (sum(lengths), 4 * max(lengths) - sum(lengths))
    assert done.supervised == sum(int(mask[1:].sum()) for _, mask in batch)
    assert loop.step_on(batch).loss < done.loss


def test_batches_of_like_lengths():
    lengths = np.random.default_rng(0).integers(3, 100, 64).tolist()
    drawn = list(islice(baselines.grouped(lengths, 4, seed=0), 16))
    assert sorted(i for batch in drawn for i in batch) == list(range(64)) and {len(batch) for batch in drawn} == {4}

    def padding(batches):
        return sum(4 * max(lengths[i] for i in batch) for batch in batches) / sum(lengths) - 1

    assert padding(drawn) < 0.5 * padding(list(islice(baselines.shuffled(64, 4, seed=0), 16)))
    assert drawn != list(islice(baselines.grouped(lengths, 4, seed=1), 16))


def test_filled_packs_fit():
    lengths = [5, 9, 30, 2, 7, 11, 3]
    packs = list(islice(baselines.first_fit(lengths, 20, seed=0), 40))
    assert all(sum(lengths[i] for i in pack) <= 20 or len(pack) == 1 for pack in packs)
    for pack, following in zip(packs, packs[1:]):
        assert sum(lengths[i] for i in pack) + lengths[following[0]] > 20
    assert sorted(list(i for pack in packs for i in pack)[:7]) == list(range(7))


def test_flattened():
    batch = baselines.flattened([(np.array([5, 6, 7]), np.array([True, True, False])), (np.array([8, 9]), np.array([False, True]))])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9]]


SIZE = Batching(samples=4, tokens=48)
FORMS = {
    "grouped": lambda model, samples: baselines.grouped_loop(model, samples, SIZE, 1e-2),
    "packed": lambda model, samples: baselines.packed_loop(model, samples, SIZE, 1e-2),
    "checkpointing": lambda model, samples: baselines.checkpointed(baselines.padded_loop(model, samples, SIZE, 1e-2)),
    "micro-batches": lambda model, samples: baselines.padded_loop(model, samples, SIZE, 1e-2, micro_batch=3),
    # traced, but not by inductor: two minutes of its work are checked where a benchmark compares losses before it measures
    "compiled": lambda model, samples: baselines.compiled(baselines.padded_loop(model, samples, SIZE, 1e-2), "eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_loop_computes_the_losses_of_its_samples(adapted, form):
    """In particular packed samples do not see each other. The second step shows that the gradients are right too."""
    loop, plain = FORMS[form](adapted(), some_samples()), baselines.padded_loop(adapted(), some_samples(), SIZE, 1e-2)
    for _ in range(3):
        batch = loop.next_batch()
        done, expected = loop.step_on(batch), plain.step_on(batch)
        assert float(done.loss) == pytest.approx(float(expected.loss), rel=2e-5)
        assert (done.tokens, done.supervised) == (expected.tokens, expected.supervised)
        if form != "micro-batches":
            assert done.padding == 0 if form == "packed" else done.padding == expected.padding


def test_bf16_has_bf16_weights_and_fp32_adapters_and_autocast_fp32_weights(model_folder, tmp_path, adapted):
    low = baselines.load_stock(model_folder, tmp_path, dtype=torch.bfloat16)
    kinds = {p.requires_grad: p.dtype for p in low.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    loops = [baselines.padded_loop(low, some_samples(), SIZE, 1e-2),
             baselines.padded_loop(adapted(), some_samples(), SIZE, 1e-2, autocast=True)]
    plain = baselines.padded_loop(adapted(), some_samples(), SIZE, 1e-2)
    for loop in loops:
        batch = loop.next_batch()
        loss = float(loop.step_on(batch).loss)
        assert loss != float(plain.gradients(batch)[0]) and loss == pytest.approx(float(plain.gradients(batch)[0]), rel=2e-2)
    assert {p.dtype for p in loops[1].model.parameters()} == {torch.float32}


def test_checkpointing_keeps_fewer_activations(adapted):
    """Bytes that autograd keeps of one step's forward."""
    def kept(loop) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            loop.model(**loop.collate(loop.next_batch()), use_cache=False)
        return sum(sizes)

    plain = baselines.padded_loop(adapted(), some_samples(), SIZE, 1e-2)
    assert kept(baselines.checkpointed(baselines.padded_loop(adapted(), some_samples(), SIZE, 1e-2))) < 0.7 * kept(plain)


def test_the_micro_batch_is_halved_until_it_fits(adapted, monkeypatch):
    loop = baselines.padded_loop(adapted(), some_samples(), SIZE, 1e-2)
    real = loop.gradients

    def limited(samples):
        if (loop.micro_batch or len(samples)) > 1:
            raise torch.cuda.OutOfMemoryError("too much")
        return real(samples)

    monkeypatch.setattr(loop, "gradients", limited)
    loop.halve_until_it_fits()
    assert loop.micro_batch == 1 and all(p.grad is None for p in loop.trained)


def test_why_a_contender_is_missing(monkeypatch):
    assert baselines.missing("no_such_package", torch.device("cuda")) == "no-such-package is not installed"
    assert baselines.missing("peft", torch.device("cpu")) == "its kernels need a GPU"
    assert baselines.missing("peft", torch.device("cuda")) is None


@pytest.mark.parametrize("batches", [baselines.padded_arguments(4), baselines.packed_arguments(48)], ids=["padded", "packed"])
def test_trl_sees_its_samples_and_gives_their_loss(adapted, batches):
    samples = some_samples()
    loop = baselines.Trl(adapted(), samples, tiny.tokenizer(), batches | {"learning_rate": 1e-2})
    before = loss_by_hand(adapted(), samples)
    batch = loop.next_batch()
    seen = loop.samples_of(batch)
    assert float(loop.step_on(batch).loss) == pytest.approx(loss_by_hand(adapted(), seen), rel=1e-5)
    epoch = [seen]
    while sum(map(len, epoch)) < len(samples):
        epoch.append(loop.samples_of(loop.next_batch()))
    ours = sorted((ids.tolist(), mask[1:].tolist()) for ids, mask in samples)
    assert sorted((ids.tolist(), mask[1:].tolist()) for part in epoch for ids, mask in part) == ours
    for _ in range(15):
        done = loop.step()
    assert done.tokens > 0 and (done.padding == 0) == ("packing" in batches)
    assert loss_by_hand(loop.model.eval(), samples) < before
