"""The transformers engine: sums that do not depend on the batch, and draws from a nucleus."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from synth.config import Model
from synth.engines.interface import CompletionRequest, LikelihoodRequest, Prompt, Sampling
from synth.engines.tokens import added_text
from tests.helpers.engine_here import put_back
from tests.helpers.engine_requests import logprobs


@pytest.mark.parametrize("width", [96, 576, 2048])  # few rows are up to 4 of them, up to 15 on a CPU with AVX-512
def test_products_do_not_depend_on_the_rows_beside(monkeypatch, width):
    from synth.engines.hf import make_rows_independent_of_batch

    weight, x = torch.randn(256, width), torch.randn(200, width)
    product = torch.nn.functional.linear
    assert any(not torch.equal(product(x[:n], weight), product(x, weight)[:n]) for n in range(1, 4)), "the cure has nothing to cure here"
    put_back(monkeypatch)
    make_rows_independent_of_batch(1)
    whole = torch.nn.functional.linear(x, weight)
    for n in (*range(1, 20), 33, 64, 127):
        assert torch.equal(torch.nn.functional.linear(x[50:50 + n], weight), whole[50:50 + n])
    assert torch.nn.functional.linear(x[:0], weight).shape == (0, 256) and torch.nn.functional.linear(x[0], weight).shape == (256,)
    assert torch.equal(torch.nn.functional.linear(x[:2].view(2, 1, width), weight)[:, 0], whole[:2])
    assert torch.equal(torch.nn.functional.linear(x.view(20, 10, width)[:, -1:], weight)[:, 0], whole[9::10])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "granite", "phi3", "gemma3", "mistral3 mistral"])
def test_families_in_batches_and_alone(family, tmp_path, monkeypatch):
    """Windows of 8 tokens, soft caps, scales: a wave gives what each row gives alone, and what growing it without a cache gives."""
    from synth.engines.hf import TransformersModel
    from synth.engines.protocol import LoadRequest
    from tests.helpers import tiny
    from tests.helpers.wrapped import WRAPPED, save_wrapped, wrapped_class

    put_back(monkeypatch)
    wrapped = family in WRAPPED
    save_wrapped(tmp_path, family) if wrapped else tiny.save_model(tmp_path, family)
    held = TransformersModel(LoadRequest("transformers", Model(path=str(tmp_path)), str(tmp_path), 1))

    def run(requests) -> dict:
        assert not any(held.add(request) for request in requests)
        found = {}
        while held.live:
            found |= {result.key: result for result in held.step()}
        return found

    prompts = [tuple(range(10 + k, 13 + k + k % 6)) for k in range(24)]
    requests = [CompletionRequest((k,), Prompt(ids), Sampling(k % 2, 0.9, 14, ()), k) for k, ids in enumerate(prompts)]
    whole = run(requests)
    assert len({result.tokens for result in whole.values()}) > 1 or {result.tokens for result in whole.values()} == {14}
    for request in requests[::5]:
        assert run([request]) == {request.key: whole[request.key]}
    own_class = wrapped_class(family) if wrapped else AutoModelForCausalLM
    plain, ids = own_class.from_pretrained(tmp_path, dtype=torch.float32).eval(), list(prompts[6])
    for _ in range(whole[6,].tokens):
        ids.append(int(logprobs(plain, ids)[-1].argmax()))
    end = len(ids) - (whole[6,].finish == "stop")
    assert whole[6,].text == added_text(held.tokenizer, prompts[6], ids[len(prompts[6]):end])
    scored = run([LikelihoodRequest((k,), Prompt(ids), (20, 21 + k)) for k, ids in enumerate(prompts)])
    assert run([LikelihoodRequest((7,), Prompt(prompts[7]), (20, 28))]) == {(7,): scored[7,]}


def test_the_nucleus_when_the_likeliest_are_not_enough(monkeypatch):
    from synth.engines import hf, nucleus

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 500, generator=generator)
    hows = [Sampling(1.0, 0.95, 1)] * 8

    def draws():
        randoms = [[np.random.Generator(np.random.Philox(key=100 * k + i)) for i in range(8)] for k in range(50)]
        return [hf.draw(logits, hows, some) for some in randoms]

    whole = draws()
    monkeypatch.setattr(nucleus, "LARGEST", 16)
    assert draws() == whole and len({tuple(some) for some in whole}) == 50
