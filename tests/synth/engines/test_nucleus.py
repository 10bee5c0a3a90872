"""The nucleus of a row, against a full sort and against vLLM's own filter; log-probs of samples against vLLM's own."""

import numpy as np
import pytest
import torch

from synth.engines import nucleus as searched
from synth.engines.nucleus import mask_outside, nucleus

PS = (1e-6, 0.05, 0.5, 0.9, 0.98, 0.999, 1 - 1e-7)


def rows(kind: str, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Six rows of logits, from peaked to nearly flat, their values equal in part or all different."""
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[8], [4], [2], [1], [0.3], [0.05]])
    return {"different": logits, "ties": (logits * 4).round() / 4, "bf16": logits.bfloat16().float(), "equal": logits * 0,
            "masked": logits.masked_fill(logits < logits.median(-1, keepdim=True).values, -torch.inf)}[kind]


def by_full_sort(logits: np.ndarray, top_p: float) -> list[int]:
    """Keep the likeliest, of equal ones those with the higher id, until top_p is reached."""
    order = np.lexsort((np.arange(len(logits)), logits))[::-1]
    weights = np.exp(logits - logits.max())
    before = np.concatenate([[0.0], np.cumsum(weights[order], dtype=np.float64)[:-1]])
    return sorted(order[before < top_p * float(weights.sum())].tolist())


@pytest.mark.parametrize("vocabulary", [1, 7, 300, 1_531])
@pytest.mark.parametrize("kind", ["different", "ties", "bf16", "equal", "masked"])
@pytest.mark.parametrize("largest", [1, 40, 4_096])
def test_the_nucleus_is_that_of_a_full_sort(kind, vocabulary, largest, monkeypatch):
    monkeypatch.setattr(searched, "LARGEST", largest)
    for logits in rows(kind, vocabulary).numpy():
        for top_p in PS:
            assert nucleus(logits, top_p).tolist() == by_full_sort(logits, top_p)


def test_rows_are_masked_alone_in_any_number_of_threads():
    logits, ps = rows("ties", 500), [0.5, 1.0, 0.9, 0.98, 1.0, 0.3]
    whole = mask_outside(logits.clone(), ps)
    for i, p in enumerate(ps):
        kept = by_full_sort(logits[i].numpy(), p) if p < 1 else range(500)
        assert whole[i].isfinite().nonzero()[:, 0].tolist() == list(kept) and torch.equal(whole[i, list(kept)], logits[i, list(kept)])
    torch.set_num_threads(2)
    assert torch.equal(mask_outside(torch.cat([logits, logits], 1)[:, :500], ps), whole)  # rows of a wider tensor


@pytest.fixture(scope="module")
def vllm():
    """vLLM's filter and sampler as they come, and as they are patched."""
    pytest.importorskip("vllm")
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.sample.sampler import Sampler

    from synth.engines import vllm_sampling

    filter, forward, gather = topk_topp_sampler.apply_top_k_top_p_pytorch, Sampler.forward, Sampler.gather_logprobs
    def gather_alone(logprobs, num_logprobs, token_ids):
        """Its own one compiles, for ranks that nobody asks for."""
        return LogprobsTensors(token_ids[:, None], logprobs.gather(-1, token_ids[:, None]), token_ids)

    Sampler.gather_logprobs = staticmethod(gather_alone)
    vllm_sampling.find_nuclei_without_sorting()
    vllm_sampling.compute_logprobs_of_samples_alone()
    yield (filter, topk_topp_sampler.apply_top_k_top_p_pytorch), (forward, Sampler.forward)
    topk_topp_sampler.apply_top_k_top_p_pytorch, Sampler.forward = filter, forward
    Sampler.gather_logprobs = staticmethod(gather)


@pytest.mark.slow(8)
@pytest.mark.parametrize("kind", ["different", "ties", "bf16"])
@pytest.mark.parametrize("k", [None, 20])
def test_vllm_keeps_as_many_tokens_of_each_logit_as_its_own_filter(vllm, kind, k):
    """Of equal ones it takes others: its sort is not stable. Beyond a p of 0.99 its sums in fp32 may round the border by one."""
    own, patched = vllm[0]
    for seed in range(8):
        logits = rows(kind, 5_000, seed)
        for p in PS[:-1]:
            ps, ks = torch.full((6,), p), None if k is None else torch.full((6,), k, dtype=torch.int32)
            expected, found = own(logits.clone(), ks, ps), patched(logits.clone(), ks, ps)
            more = found.isfinite().sum(-1) - expected.isfinite().sum(-1)
            assert more.abs().max() <= (p > 0.99) and (more.any() or torch.equal(expected.sort().values, found.sort().values))


@pytest.mark.slow
@pytest.mark.parametrize("temperatures", [[1.0] * 6, [0.7, 1.3, 0.0, 1.0, 2.0, 0.0], [0.0] * 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_and_their_logprobs_are_vllms_own_bit_for_bit(vllm, temperatures, dtype):
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    own, patched = vllm[1]
    sampler, logits = Sampler(), rows("different", 2_000).to(dtype)
    drawn = [t > 0 for t in temperatures]

    def sample(forward):
        metadata = SamplingMetadata(
            temperature=None if not any(drawn) else torch.tensor(temperatures), all_greedy=not any(drawn), all_random=all(drawn),
            top_p=torch.where(torch.tensor(drawn), 0.9, 1.0), top_k=None,
            generators={i: torch.Generator().manual_seed(i) for i in range(6)}, max_num_logprobs=0, no_penalties=True,
            prompt_token_ids=None, frequency_penalties=None, presence_penalties=None, repetition_penalties=None, output_token_ids=[],
            allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=LogitsProcessors())
        out = forward(sampler, logits.clone(), metadata)
        return out.sampled_token_ids, out.logprobs_tensors.logprobs[:, :1]

    for expected, found in zip(sample(own), sample(patched), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.slow
def test_choices_are_ranked_without_a_compiler(vllm, monkeypatch):
    """Compare log-probs and ranks with those of vLLM's own function, which would compile."""
    from vllm.v1.sample import sampler

    from synth.engines import vllm_sampling

    compiled = []
    monkeypatch.setattr(sampler, "batched_count_greater_than", lambda *given: compiled.append(given) or torch.zeros(6))
    vllm_sampling.rank_without_compiling()
    logprobs = rows("different", 2_000).log_softmax(-1)
    found = sampler.Sampler().gather_specific_token_logprobs(logprobs, {0: [3, 4], 5: [7]}, logprobs.argsort(descending=True)[:, 2])
    assert not compiled and found.selected_token_ranks.tolist() == [3] * 6
    assert torch.equal(found.logprobs[0, 1:], logprobs[0, [3, 4]]) and found.logprobs[5, 1] == logprobs[5, 7]
