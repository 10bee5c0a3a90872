"""Run a model with transformers inside a worker process.

It serves small models, embeddings, and machines without vLLM.

On one CPU thread in fp32, a request gives bit-identical results in any batch, since no batch is padded: completions run in a batch whose
rows all have the same length; at every step each row gets one token, and requests whose prompts have just that length join. Requests that
only score a text run in batches of equal length. Torch is patched to compute a row as it would among others, and random numbers come from
each request's own seed.

Shapes: n rows, T tokens, V vocabulary, W width.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict, deque
from importlib.metadata import version

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from synth.engines.adapters import apply_adapter, note_on
from synth.engines.interface import (
    Choice,
    ChoiceRequest,
    Completion,
    CompletionRequest,
    Embedding,
    EmbeddingRequest,
    EngineError,
    Failure,
    Likelihood,
    LikelihoodRequest,
    Sampling,
)
from synth.engines.nucleus import each_row, nucleus
from synth.engines.precision import cpu_dtype, notes_on_dtype
from synth.engines.protocol import LoadRequest, Ready
from synth.engines.tokens import MAX_CONTEXT, Spellings, added_text, eos_ids, why_unfit, why_unscorable
from trainer.model.locate import require_buildable
from trainer.model.text_part import auto_class, keep_text_part
from trainer.runtime.device import choose_device

QUEUE_DEPTH = 4_096  # requests to queue: the more, the more rows of equal length
MAX_ROWS = 256  # of the batch of completions
MAX_CACHED_TOKENS = 131_072  # of that batch when all its rows are complete, which bounds the memory of its cache
MAX_PASS_TOKENS = 8_192  # of a forward pass over prompts
MAX_LOGPROBS = 2**26  # numbers (rows times vocabulary) of a pass


class Row:
    """A completion in progress."""

    def __init__(self, request: CompletionRequest, room: int):
        self.request, self.ids, self.logprob = request, [], 0.0
        self.max_tokens = min(request.sampling.max_tokens, room)
        self.random = np.random.Generator(np.random.Philox(key=request.seed % 2**64))
        self.done: Completion | None = None

    @property
    def last(self) -> int:
        """Return the last token id."""
        return self.ids[-1]


class TransformersModel:
    """A LoadedModel (see protocol.py) that transformers runs."""

    def __init__(self, load: LoadRequest):
        model, threads = load.model, torch.get_num_threads()
        self.device = choose_device("auto")
        config = AutoConfig.from_pretrained(load.folder, trust_remote_code=model.trust_remote_code)
        require_buildable(model.path, load.folder, config)
        if self.device.type == "cpu":
            make_rows_independent_of_batch(threads)
        self.model = _load(load, config, self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(load.tokenizer, trust_remote_code=model.trust_remote_code)
        self.vocabulary = self.model.config.get_text_config().vocab_size
        own = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_CONTEXT
        if model.max_model_len and model.max_model_len > own:
            raise EngineError(f"{model.path}: max_model_len: expected at most {own:,}, the model's own context, "
                              f"got {model.max_model_len:,}")
        self.limit = model.max_model_len or min(own, MAX_CONTEXT)
        self.ends = {*eos_ids(load.folder, self.tokenizer)}
        self.spellings = Spellings(self.tokenizer, self.vocabulary, model.path)
        self.has_logits_to_keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        dtype = str(self.model.dtype).removeprefix("torch.")
        deterministic = self.device.type == "cpu" and self.model.dtype == torch.float32 and threads == 1
        self.ready = Ready(f"transformers {version('transformers')} ({self.device.type}, {dtype})", deterministic, QUEUE_DEPTH,
                           (notes_on_dtype(model, dtype) if self.device.type == "cpu" else ()) + note_on(load))
        self.abort()

    @property
    def live(self) -> int:
        return len(self.rows) + sum(map(len, self.prompts.values())) + sum(map(len, self.to_score.values()))

    def abort(self) -> None:
        self.rows, self.cache, self.length = [], None, 0
        self.prompts: dict[int, deque] = defaultdict(deque)  # completions to start, by length of their prompts
        self.to_score: dict[int, list] = defaultdict(list)  # all other requests, by length

    def add(self, request) -> Failure | None:
        if type(request) is LikelihoodRequest:
            ids, reason = request.continuation, why_unscorable(request.prompt.token_ids, request.continuation, self.limit, self.vocabulary)
            length = len(ids) + len(request.prompt.token_ids or ())
        else:
            ids = request.token_ids if type(request) is EmbeddingRequest else request.prompt.token_ids
            reason, length = why_unfit(ids, self.limit, self.vocabulary), len(ids or ())
        if type(request) is ChoiceRequest:
            self.spellings(request.choices)
        if reason:
            return Failure(request.key, reason)
        (self.prompts if type(request) is CompletionRequest else self.to_score)[length].append(request)
        return None

    @torch.inference_mode()
    def step(self) -> list:
        return self._score() if any(self.to_score.values()) else self._decode_step()

    # ---------------------------------------------------------------- scoring

    def _score(self) -> list:
        """Run one forward pass over requests of one kind and length: choices, likelihoods or embeddings."""
        length = next(length for length, requests in self.to_score.items() if requests)
        waiting, first = self.to_score[length], self.to_score[length][0]
        keep = max((len(request.continuation) for request in waiting if type(request) is LikelihoodRequest), default=0) + 1
        most = max(1, min(MAX_PASS_TOKENS // length, MAX_LOGPROBS // (keep * self.vocabulary)))
        batch = [request for request in waiting if type(request) is type(first)][:most]
        chosen = {id(request) for request in batch}
        self.to_score[length] = [request for request in waiting if id(request) not in chosen]
        if type(first) is EmbeddingRequest:
            return self._embeddings(batch)
        logits = self._logits(_tensor([_ids(request) for request in batch], self.device), keep)[0]
        make_result = self._choice if type(first) is ChoiceRequest else self._likelihood
        return [make_result(request, row) for request, row in zip(batch, torch.log_softmax(logits.float(), -1).cpu(), strict=True)]

    def _choice(self, request: ChoiceRequest, logprobs: Tensor) -> Choice:
        last = logprobs[-1]
        probabilities = tuple(sum(math.exp(float(last[i])) for i in spelling) for spelling in self.spellings(request.choices))
        return Choice(request.key, probabilities, len(request.prompt.token_ids))

    def _likelihood(self, request: LikelihoodRequest, logprobs: Tensor) -> Likelihood:
        """Sum the log-probs of the continuation; the last row of `logprobs` [keep, V] predicts what follows."""
        count = len(request.continuation)
        found = logprobs[-count - 1:-1].gather(1, torch.tensor(request.continuation)[:, None])[:, 0]
        return Likelihood(request.key, math.fsum(found.tolist()), count)

    def _embeddings(self, batch: list[EmbeddingRequest]) -> list[Embedding]:
        hidden = self.model.base_model(input_ids=_tensor([request.token_ids for request in batch], self.device), use_cache=False)[0]
        found = []
        for request, states in zip(batch, hidden.cpu().double(), strict=True):  # states [T, W]
            mean = states.mean(0)
            found.append(Embedding(request.key, tuple((mean / mean.norm().clamp_min(1e-30)).tolist())))
        return found

    # ---------------------------------------------------------------- completions

    def _decode_step(self) -> list[Completion]:
        """Add a token to every row of the batch, and return the completions that end with it.

        Requests whose prompts have the current length join the batch first.
        """
        logits = []
        if self.rows:
            out = self.model(input_ids=_tensor([[row.last] for row in self.rows], self.device), past_key_values=self.cache, use_cache=True)
            logits.append(out.logits[:, -1])
            self.length += 1
        else:
            self.length, self.cache = min(length for length, waiting in self.prompts.items() if waiting), None
        if joining := self._select_joining():
            logits.append(self._prefill(joining))
        self._sample(torch.cat(logits).float())
        done = [row.done for row in self.rows if row.done]
        if done:
            unfinished = [i for i, row in enumerate(self.rows) if not row.done]
            self.rows = [self.rows[i] for i in unfinished]
            self.cache.reorder_cache(torch.tensor(unfinished, dtype=torch.long, device=self.device))
        return done

    def _select_joining(self) -> list[Row]:
        """Return new rows for the batch, as many as there is room for; equal prompts are next to each other."""
        waiting, joining = self.prompts[self.length], []
        cached = sum(self.length + row.max_tokens - len(row.ids) for row in self.rows)
        while waiting and len(self.rows) + len(joining) < MAX_ROWS and (not self.rows or _extensible(self.cache)):
            row = Row(waiting[0], self.limit - self.length)
            cached += self.length + row.max_tokens
            if cached > MAX_CACHED_TOKENS and (self.rows or joining):
                break
            joining.append(row)
            waiting.popleft()
        return sorted(joining, key=lambda row: row.request.prompt.token_ids)

    def _prefill(self, joining: list[Row]) -> Tensor:
        """Run the prompts of new rows, equal ones once, and append the rows to the batch.

        Returns their next tokens' logits [n, V].
        """
        prompts = [row.request.prompt.token_ids for row in joining]
        different = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(different)}
        index = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        logits, caches, most = [], [], max(1, MAX_PASS_TOKENS // self.length)
        for start in range(0, len(different), most):
            out, cache = self._logits(_tensor(different[start:start + most], self.device), 1, use_cache=True)
            logits.append(out[:, -1])
            caches.append(cache)
        cache = caches[0]
        for other in caches[1:]:
            _append(cache, other)
        if len(different) < len(prompts):
            cache.reorder_cache(index)
        if self.rows:
            _append(self.cache, cache)
        else:
            self.cache = cache
        self.rows += joining
        return torch.cat(logits)[index]

    def _logits(self, ids: Tensor, keep: int, use_cache: bool = False) -> tuple[Tensor, Cache | None]:
        """Return logits [n, keep, V] of the last `keep` tokens of rows of equal length [n, T], and the cache."""
        out = self.model(input_ids=ids, use_cache=use_cache, **({"logits_to_keep": keep} if self.has_logits_to_keep else {}))
        return out.logits[:, -keep:], out.past_key_values if use_cache else None

    def _sample(self, logits: Tensor) -> None:
        """Sample the next token of each row from logits [n, V]; a row that ends with it gets its result."""
        tokens = draw(logits, [row.request.sampling for row in self.rows], [row.random for row in self.rows])
        found = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
        for row, token, logprob in zip(self.rows, tokens, found, strict=True):
            row.ids.append(token)
            row.logprob += logprob
            row.done = self._result_if_ended(row)

    def _result_if_ended(self, row: Row) -> Completion | None:
        request, sampling = row.request, row.request.sampling
        stopped = row.last in self.ends or row.last in sampling.stop_ids
        text = None
        if sampling.stop_texts and not stopped:
            text = self._before_stop(row)
            stopped = text is not None
        if not stopped and len(row.ids) < row.max_tokens:
            return None
        if text is None:
            whole = row.last not in self.ends and row.last not in sampling.stop_ids
            text = added_text(self.tokenizer, request.prompt.token_ids, row.ids if whole else row.ids[:-1])
        return Completion(request.key, text, len(row.ids), "stop" if stopped else "length", row.logprob, len(request.prompt.token_ids))

    def _before_stop(self, row: Row) -> str | None:
        """Return the text before the first stop text, None where there is none yet.

        Only the end is decoded to find one.
        """
        stops = row.request.sampling.stop_texts
        tail = self.tokenizer.decode(row.ids[-max(len(stop.encode()) for stop in stops) - 8:], skip_special_tokens=False)
        if not any(stop in tail for stop in stops):
            return None
        text = added_text(self.tokenizer, row.request.prompt.token_ids, row.ids)
        places = [text.index(stop) for stop in stops if stop in text]
        return text[:min(places)] if places else None


# ---------------------------------------------------------------- sampling


def draw(logits: Tensor, sampling: list[Sampling], randoms: list[np.random.Generator]) -> list[int]:
    """Sample a token for each row of logits [n, V].

    Temperature 0 takes the argmax, others invert the distribution function of the nucleus.
    """
    tokens = logits.argmax(-1).tolist()
    for whole in (False, True):
        rows = [i for i, one in enumerate(sampling) if (one.top_p >= 1) == whole and one.temperature > 0]
        if not rows:
            continue
        scaled = logits[rows] / torch.tensor([sampling[i].temperature for i in rows], device=logits.device)[:, None]
        points = [randoms[i].random() for i in rows]
        if whole:
            drawn = _inverse(torch.softmax(scaled, -1), points)
        else:
            drawn = each_row(_from_nucleus, list(zip(scaled.cpu().numpy(), [sampling[i].top_p for i in rows], points, strict=True)))
        for i, token in zip(rows, drawn, strict=True):
            tokens[i] = token
    return tokens


def _from_nucleus(logits: np.ndarray, top_p: float, point: float) -> int:
    """Sample from the nucleus of a row [V]."""
    ids = nucleus(logits, top_p)
    reach = np.cumsum(np.exp(logits[ids] - logits[ids].max()), dtype=np.float64)
    return int(ids[min(int(np.searchsorted(reach, point * reach[-1], side="right")), len(ids) - 1)])


def _inverse(probabilities: Tensor, points: list[float]) -> list[int]:
    """Sample from whole rows [n, V]."""
    reach = probabilities.double().cumsum(-1)  # [n, V]
    wanted = torch.tensor(points, dtype=torch.float64, device=reach.device)[:, None] * reach[:, -1:]
    places = torch.searchsorted(reach, wanted, right=True)[:, 0]
    return places.clamp_max(reach.shape[1] - 1).tolist()


# ---------------------------------------------------------------- loading, rows, caches


def _load(load: LoadRequest, config, device: torch.device) -> PreTrainedModel:
    """Load the model's text part. Raises EngineError where weights are missing from its files."""
    dtype, stored = load.model.dtype, config.get_text_config().dtype
    if device.type == "cpu":
        dtype = cpu_dtype(load.model, stored)
    elif dtype == "auto" and stored in (None, torch.float32):
        dtype = "bfloat16"
    transformers.utils.logging.disable_progress_bar()
    model, info = auto_class(config).from_pretrained(load.folder, dtype=dtype, use_safetensors=True, output_loading_info=True,
                                                     trust_remote_code=load.model.trust_remote_code)
    keep_text_part(model)
    if missing := sorted([*model.state_dict().keys() & info["missing_keys"], *info["mismatched_keys"]], key=str):
        raise EngineError(f"{load.model.path}: expected weights for all of {type(model).__name__}, got none that fit for "
                          f"{len(missing)}, such as {missing[0]}; fetch or save the model again")
    model = model if load.adapter is None else apply_adapter(model, load).get_base_model()
    return model.to(device).eval().requires_grad_(False)


def make_rows_independent_of_batch(threads: int) -> None:
    """Patch torch on a CPU to compute a row as it would among others.

    Call it before a model is built, which may keep the functions.

    A matmul sums few rows in another order than many, divides rows among threads, and has another kernel for strided rows: so it always
    gets enough rows, and contiguous ones. Elementwise functions compute 64 numbers at a time, and a remainder in another way: so inputs
    are padded to multiples of 64. (With several threads each has a remainder of its own: only one thread is exact.)
    """
    matmul, least = torch.nn.functional.linear, 16 * threads

    def linear(x, weight, bias=None):
        rows = x.numel() // max(1, x.shape[-1])
        block = x.reshape(rows, x.shape[-1]).contiguous()
        if 0 < rows < least:
            block = torch.cat([block, x.new_zeros(least - rows, x.shape[-1])])
        return matmul(block, weight, bias)[:rows].reshape(*x.shape[:-1], weight.shape[0])

    torch.nn.functional.linear = linear
    for module, name in ((torch.nn.functional, "silu"), (torch.nn.functional, "gelu"), (torch, "tanh"), (torch, "sigmoid")):
        setattr(module, name, _padded_to_64(getattr(module, name)))


def _padded_to_64(function):
    def padded(x, **options):
        whole = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % 64))
        return function(whole, **options)[:x.numel()].reshape(x.shape)

    return padded


def _extensible(cache: Cache) -> bool:
    """Return whether rows can join the cache: one of keys and values.

    Rows with other kinds of state start and end together.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _append(cache: Cache, more: Cache) -> None:
    """Append the rows of `more`, a cache of the same length, to `cache`."""
    for layer, other in zip(cache.layers, more.layers, strict=True):
        layer.keys, layer.values = torch.cat([layer.keys, other.keys]), torch.cat([layer.values, other.values])


def _ids(request: ChoiceRequest | LikelihoodRequest) -> tuple[int, ...]:
    return (*request.prompt.token_ids, *(request.continuation if type(request) is LikelihoodRequest else ()))


def _tensor(rows: list, device: torch.device) -> Tensor:
    return torch.tensor([list(row) for row in rows], device=device)
