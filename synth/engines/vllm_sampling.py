"""Patch vLLM's sampling on a CPU: no sort, no compiling, log-probs of sampled tokens alone.

With a vocabulary of 49,152 tokens and a small model, they would take longer than the model.

These patch internals of vLLM 0.32, and have not been run on a GPU.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample import sampler as vllm_sampler
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.sample.sampler import Sampler

from synth.engines.nucleus import mask_outside


def find_nuclei_without_sorting() -> None:
    """Patch vLLM to mask the logits outside the nucleus as nucleus.py finds it; top-k stays vLLM's own."""
    filter_by_sorting = topk_topp_sampler.apply_top_k_top_p_pytorch

    def apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=False):
        if k is not None or p is None:
            return filter_by_sorting(logits, k, p, allow_cpu_sync)
        return mask_outside(logits, p.tolist())

    topk_topp_sampler.apply_top_k_top_p_pytorch = apply_top_k_top_p_pytorch


def compute_logprobs_of_samples_alone() -> None:
    """Patch vLLM to compute the log-probs of sampled tokens without those of the whole vocabulary.

    It does so where no others are requested. They are bitwise those that it computes itself.
    """
    forward = Sampler.forward

    def lean_forward(self, logits, sampling_metadata, predict_bonus_token=False, logprobs_mode_override=None):
        if sampling_metadata.max_num_logprobs != 0 or sampling_metadata.logprob_token_ids:
            return forward(self, logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        raw = logits.clone() if divides_in_place(logits, sampling_metadata) else logits
        highest, top_logprobs = top_values(logits)
        output = forward(self, logits, dataclasses.replace(sampling_metadata, max_num_logprobs=None), predict_bonus_token,
                         logprobs_mode_override)
        ids = output.sampled_token_ids
        logprobs = (raw.gather(1, ids.long()).float() - highest) + top_logprobs
        return dataclasses.replace(output, logprobs_tensors=LogprobsTensors(ids, logprobs, ids.new_zeros(len(ids))))

    Sampler.forward = lean_forward


def divides_in_place(logits: Tensor, metadata: SamplingMetadata) -> bool:
    """Return whether vLLM changes the logits of tokens that it may sample.

    It divides fp32 logits in place by the temperatures.
    """
    if logits.dtype != torch.float32 or metadata.all_greedy:
        return False
    return bool(((metadata.temperature != 1) & (metadata.temperature > 0)).any())


def top_values(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest logit of each row [n, V] and its log-prob, both [n, 1].

    Few rows are computed at a time, which stay in the CPU's cache.
    """
    blocks = logits.split(torch.get_num_threads())
    return (logits.amax(-1, keepdim=True).float(),
            torch.cat([block.log_softmax(-1, dtype=torch.float32).amax(-1, keepdim=True) for block in blocks]))


def keep_only_logprob_sums() -> None:
    """Patch vLLM to sum the log-probs of sampled tokens where no other tokens' are requested.

    It then computes no ranks and keeps no list of them.
    """
    gather, update, cut = Sampler.gather_logprobs, LogprobsProcessor._update_sample_logprobs, LogprobsLists.slice_request

    def gather_logprobs(logprobs, num_logprobs, token_ids):
        if num_logprobs:
            return gather(logprobs, num_logprobs, token_ids)
        return LogprobsTensors(token_ids[:, None].int(), logprobs.gather(-1, token_ids[:, None]), token_ids.new_zeros(len(token_ids)))

    def slice_request(self, req_idx, num_positions):
        if self.logprobs.shape[1] > 1 or self.cu_num_generated_tokens is not None:
            return cut(self, req_idx, num_positions)
        return LogprobsLists(None, self.logprobs[req_idx:req_idx + num_positions], None)

    def _update_sample_logprobs(self, logprobs_lists):
        if self.num_logprobs:
            update(self, logprobs_lists)
        else:
            for row in logprobs_lists.logprobs:
                self.cumulative_logprob += row.item(0)

    Sampler.gather_logprobs = staticmethod(gather_logprobs)
    LogprobsLists.slice_request = slice_request
    LogprobsProcessor._update_sample_logprobs = _update_sample_logprobs


def rank_without_compiling() -> None:
    """Patch vLLM to rank sampled tokens with plain torch.

    It compiles these two operations at the first choice that a judge makes, for seconds.
    """

    def batched_count_greater_than(logprobs, values):
        return (logprobs >= values).sum(-1)

    vllm_sampler.batched_count_greater_than = batched_count_greater_than
