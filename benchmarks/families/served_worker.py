"""Score texts with vLLM: `python -m benchmarks.families.served_worker JOBS RESULTS`.

Each job is a model, with an adapter or without. A prompt is scored in a call of its own: on a CPU vLLM 0.32 cannot score several prompts
at once with an adapter. Its kernels for experts, once adapters are enabled, are Triton's, which a CPU lacks; torch computes them here. How
adapters are found, named and laid out stays vLLM's.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

CACHE = 50_000_000  # bytes
SCORING = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)


def main() -> None:
    TritonExperts.apply = experts_in_torch
    results = [score(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2]).write_text(json.dumps(results))


def score(job: dict) -> dict:
    """Return the log-probs of a job's prompts, with and without its adapter, or why it failed."""
    try:
        options = {}
        if job["adapter"]:
            options = dict(enable_lora=True, max_loras=1, max_lora_rank=8, enable_mixed_moe_lora_format=job["experts"])
        llm = LLM(model=job["model"], dtype=job["dtype"], load_format="safetensors", generation_config="vllm", seed=0, enforce_eager=True,
                  kv_cache_memory_bytes=CACHE, max_model_len=128, max_num_seqs=4, language_model_only=job["wrapped"], **options)
        found = {"off": logprobs(llm, job["prompts"], None)}
        if job["adapter"]:
            found["on"] = logprobs(llm, job["prompts"], LoRARequest("adapter", 1, job["adapter"], is_3d_lora_weight=job["experts"]))
        return found
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def logprobs(llm: LLM, prompts: list[list[int]], adapter: LoRARequest | None) -> list[list[float]]:
    """Return the log-probs of each prompt's tokens but the first."""
    outputs = [llm.generate([TokensPrompt(prompt_token_ids=ids)], SCORING, use_tqdm=False, lora_request=adapter)[0] for ids in prompts]
    return [[chosen[token].logprob for token, chosen in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(prompts, outputs, strict=True)]


def experts_in_torch(experts: TritonExperts, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor,
                     topk_ids: Tensor, **kwargs) -> None:
    """Compute gated experts of tokens [T,K], with the adapter of the one request that runs.

    w1 [E,2I,K] and w2 [E,K,I] are the experts' weights, topk_ids [T,k] and topk_weights [T,k] what the router chose.
    """
    adapter = experts._lora_context
    slot = -1 if adapter is None else int(adapter.punica_wrapper.token_lora_indices[0])
    output.zero_()
    for expert in range(len(w1)):
        tokens, place = (topk_ids == expert).nonzero(as_tuple=True)
        x = hidden_states[tokens]
        inner = x @ w1[expert].T
        if slot >= 0:
            inner += low_rank(x, adapter.w13_lora_a_stacked, adapter.w13_lora_b_stacked, slot, expert)
        gate, up = inner.chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        out = hidden @ w2[expert].T
        if slot >= 0:
            out += low_rank(hidden, adapter.w2_lora_a_stacked, adapter.w2_lora_b_stacked, slot, expert)
        output.index_add_(0, tokens, (out * topk_weights[tokens, place, None]).to(output.dtype))


def low_rank(x: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], slot: int, expert: int) -> Tensor:
    """Return what an adapter adds to an expert's projections of x, which lie side by side."""
    return torch.cat([x @ one[slot, expert].T @ other[slot, expert].T for one, other in zip(a, b, strict=True)], dim=-1)


if __name__ == "__main__":
    main()
