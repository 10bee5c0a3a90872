"""transformers in this process, which a worker is: for small models, and for what vLLM cannot be installed for.

On one CPU thread in fp32 a request gives the same bits in any batch, because no batch is ever padded. Completions grow in a wave: all its
rows have the same length, one token is added to each, and then requests whose prompts have just that length join. What scores prompts runs
in batches of equal length. Torch is made to compute each row as it would among others, and random numbers come from a request's own seed.

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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
from synth.engines.protocol import Opening, Ready
from synth.engines.tokens import LONGEST, Spellings, ends, scored, unfit, written

DEPTH = 4_096  # requests at hand: the more, the fuller the waves
ROWS = 256  # of a wave
CACHED = 131_072  # tokens that the rows of a wave may come to, which bounds its memory
PASS = 8_192  # tokens of a forward pass over prompts
SCORES = 2**26  # numbers (rows times vocabulary) that a pass may compute log-probs of
LIKELY = 1_024  # tokens among which the nucleus is looked for before all are sorted


class Row:
    """A completion in progress."""

    def __init__(self, request: CompletionRequest, room: int):
        self.request, self.ids, self.logprob = request, [], 0.0
        self.most = min(request.sampling.max_tokens, room)
        self.random = np.random.Generator(np.random.Philox(key=request.seed % 2**64))
        self.done: Completion | None = None

    @property
    def last(self) -> int:
        return self.ids[-1]


class Transformers:
    """A model held by transformers. See worker.Held."""

    def __init__(self, opening: Opening):
        model, folder, trust = opening.model, opening.folder, opening.model.trust_remote_code
        self.path, self.device = model.path, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config, threads = AutoConfig.from_pretrained(folder, trust_remote_code=trust), torch.get_num_threads()
        if self.device.type == "cpu":
            rows_do_not_depend_on_the_batch(threads)
        self.model = _load(opening, config, self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        own = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST
        if model.max_model_len and model.max_model_len > own:
            raise EngineError(f"{model.path}: max_model_len: expected at most {own:,}, the model's own context, "
                              f"found {model.max_model_len:,}")
        self.limit, self.vocabulary = model.max_model_len or min(own, LONGEST), config.get_text_config().vocab_size
        self.ends, self.spellings = {*ends(folder, self.tokenizer)}, Spellings(self.tokenizer, self.vocabulary, model.path)
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        dtype = str(self.model.dtype).removeprefix("torch.")
        self.ready = Ready(f"transformers {version('transformers')} ({self.device.type}, {dtype})",
                           self.device.type == "cpu" and self.model.dtype == torch.float32 and threads == 1, DEPTH)
        self.abort()

    @property
    def live(self) -> int:
        return len(self.rows) + sum(map(len, self.prompts.values())) + sum(map(len, self.scored.values()))

    def abort(self) -> None:
        self.rows, self.cache, self.length = [], None, 0
        self.prompts: dict[int, deque] = defaultdict(deque)  # completions to begin, by the length of their prompts
        self.scored: dict[int, list] = defaultdict(list)  # everything else, by length

    def add(self, request) -> Failure | None:
        if type(request) is LikelihoodRequest:
            ids, wrong = request.continuation, scored(request.prompt.token_ids, request.continuation, self.limit, self.vocabulary)
            length = len(ids) + len(request.prompt.token_ids or ())
        else:
            ids = request.token_ids if type(request) is EmbeddingRequest else request.prompt.token_ids
            wrong, length = unfit(ids, self.limit, self.vocabulary), len(ids or ())
        if type(request) is ChoiceRequest:
            self.spellings(request.choices)
        if wrong:
            return Failure(request.key, wrong)
        (self.prompts if type(request) is CompletionRequest else self.scored)[length].append(request)
        return None

    @torch.inference_mode()
    def step(self) -> list:
        return self._score() if any(self.scored.values()) else self._grow()

    # ---------------------------------------------------------------- scoring

    def _score(self) -> list:
        """One pass over requests of equal length: choices, likelihoods, embeddings."""
        length = next(length for length, requests in self.scored.items() if requests)
        waiting, first = self.scored[length], self.scored[length][0]
        keep = max((len(request.continuation) for request in waiting if type(request) is LikelihoodRequest), default=0) + 1
        most = max(1, min(PASS // length, SCORES // (keep * self.vocabulary)))
        batch = [request for request in waiting if type(request) is type(first)][:most]
        chosen = {id(request) for request in batch}
        self.scored[length] = [request for request in waiting if id(request) not in chosen]
        if type(first) is EmbeddingRequest:
            return self._embeddings(batch)
        logits = self._logits(_tensor([_ids(request) for request in batch], self.device), keep)[0]
        answer = self._choice if type(first) is ChoiceRequest else self._likelihood
        return [answer(request, row) for request, row in zip(batch, torch.log_softmax(logits.float(), -1).cpu(), strict=True)]

    def _choice(self, request: ChoiceRequest, logprobs: Tensor) -> Choice:
        last = logprobs[-1]
        chances = tuple(sum(math.exp(float(last[i])) for i in spelling) for spelling in self.spellings(request.choices))
        return Choice(request.key, chances, len(request.prompt.token_ids))

    def _likelihood(self, request: LikelihoodRequest, logprobs: Tensor) -> Likelihood:
        """logprobs [keep, V]: the last row is what follows the continuation, the one before it predicts its last token."""
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

    def _grow(self) -> list[Completion]:
        """One more token for every row of the wave; rows whose prompts are as long as the others are by now join it."""
        logits = []
        if self.rows:
            out = self.model(input_ids=_tensor([[row.last] for row in self.rows], self.device), past_key_values=self.cache, use_cache=True)
            logits.append(out.logits[:, -1])
            self.length += 1
        else:
            self.length, self.cache = min(length for length, waiting in self.prompts.items() if waiting), None
        if joining := self._joining():
            logits.append(self._join(joining))
        self._sample(torch.cat(logits).float())
        done = [row.done for row in self.rows if row.done]
        if done:
            going = [i for i, row in enumerate(self.rows) if not row.done]
            self.rows = [self.rows[i] for i in going]
            self.cache.reorder_cache(torch.tensor(going, dtype=torch.long, device=self.device))
        return done

    def _joining(self) -> list[Row]:
        """New rows for the wave, as many as there is room for; those that have the same prompt stand together."""
        waiting, joining = self.prompts[self.length], []
        held = sum(self.length + row.most - len(row.ids) for row in self.rows)
        while waiting and len(self.rows) + len(joining) < ROWS and (not self.rows or _extensible(self.cache)):
            row = Row(waiting[0], self.limit - self.length)
            held += self.length + row.most
            if held > CACHED and (self.rows or joining):
                break
            joining.append(row)
            waiting.popleft()
        return sorted(joining, key=lambda row: row.request.prompt.token_ids)

    def _join(self, joining: list[Row]) -> Tensor:
        """Run the new rows' prompts, each different one once, and put them under the others. Their next tokens' logits [n, V]."""
        prompts = [row.request.prompt.token_ids for row in joining]
        different = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(different)}
        which = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        logits, caches, most = [], [], max(1, PASS // self.length)
        for start in range(0, len(different), most):
            out, cache = self._logits(_tensor(different[start:start + most], self.device), 1, use_cache=True)
            logits.append(out[:, -1])
            caches.append(cache)
        cache = caches[0]
        for other in caches[1:]:
            _append(cache, other)
        if len(different) < len(prompts):
            cache.reorder_cache(which)
        if self.rows:
            _append(self.cache, cache)
        else:
            self.cache = cache
        self.rows += joining
        return torch.cat(logits)[which]

    def _logits(self, ids: Tensor, keep: int, use_cache: bool = False) -> tuple[Tensor, Cache | None]:
        """Logits of the last `keep` tokens [n, keep, V] of rows of equal length [n, T], and the cache."""
        out = self.model(input_ids=ids, use_cache=use_cache, **({"logits_to_keep": keep} if self.keeps else {}))
        return out.logits[:, -keep:], out.past_key_values if use_cache else None

    def _sample(self, logits: Tensor) -> None:
        """The next token of each row; a row that ends with it gets its result. logits [n, V]."""
        tokens = draw(logits, [row.request.sampling for row in self.rows], [row.random for row in self.rows])
        found = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
        for row, token, logprob in zip(self.rows, tokens, found, strict=True):
            row.ids.append(token)
            row.logprob += logprob
            row.done = self._ended(row)

    def _ended(self, row: Row) -> Completion | None:
        request, how = row.request, row.request.sampling
        stopped = row.last in self.ends or row.last in how.stop_ids
        text = None
        if how.stop_texts and not stopped:
            text = self._before_stop(row)
            stopped = text is not None
        if not stopped and len(row.ids) < row.most:
            return None
        if text is None:
            whole = row.last not in self.ends and row.last not in how.stop_ids
            text = written(self.tokenizer, request.prompt.token_ids, row.ids if whole else row.ids[:-1])
        return Completion(request.key, text, len(row.ids), "stop" if stopped else "length", row.logprob, len(request.prompt.token_ids))

    def _before_stop(self, row: Row) -> str | None:
        """The text before the first stop text, if there is one; only the end is looked at until it holds one."""
        stops = row.request.sampling.stop_texts
        tail = self.tokenizer.decode(row.ids[-max(len(stop.encode()) for stop in stops) - 8:], skip_special_tokens=False)
        if not any(stop in tail for stop in stops):
            return None
        text = written(self.tokenizer, row.request.prompt.token_ids, row.ids)
        places = [text.index(stop) for stop in stops if stop in text]
        return text[:min(places)] if places else None


# ---------------------------------------------------------------- drawing


def draw(logits: Tensor, how: list[Sampling], randoms: list[np.random.Generator]) -> list[int]:
    """A token for each row of logits [n, V]: the likeliest at temperature 0, else by the inverse of the nucleus's distribution function."""
    tokens = logits.argmax(-1).tolist()
    for top_p in {one.top_p for one in how}:
        rows = [i for i, one in enumerate(how) if one.top_p == top_p and one.temperature > 0]
        if not rows:
            continue
        warmth = torch.tensor([how[i].temperature for i in rows], device=logits.device)
        chances = torch.softmax(logits[rows] / warmth[:, None], -1)
        points = [randoms[i].random() for i in rows]
        drawn = _inverse(chances, points) if top_p >= 1 else _nucleus(chances, top_p, points)
        for i, token in zip(rows, drawn, strict=True):
            tokens[i] = token
    return tokens


def _nucleus(chances: Tensor, top_p: float, points: list[float]) -> list[int]:
    """Draw among the likeliest tokens that together reach top_p. What the first LIKELY cannot decide is sorted whole."""
    likely, ids = chances.topk(min(LIKELY, chances.shape[1]), -1)
    drawn = []
    for i, point in enumerate(points):
        some, names = likely[i], ids[i]
        if float(some.double().cumsum(0)[-1]) < top_p and len(some) < chances.shape[1]:
            some, names = chances[i].sort(descending=True, stable=True)
        reach = some.double().cumsum(0)
        end = min(int(torch.searchsorted(reach, top_p)), len(reach) - 1)  # the token that reaches top_p belongs to the nucleus
        place = int(torch.searchsorted(reach[:end + 1], point * float(reach[end]), right=True))
        drawn.append(int(names[min(place, end)]))
    return drawn


def _inverse(chances: Tensor, points: list[float]) -> list[int]:
    reach = chances.double().cumsum(-1)  # [n, V]
    wanted = torch.tensor(points, dtype=torch.float64, device=reach.device)[:, None] * reach[:, -1:]
    places = torch.searchsorted(reach, wanted, right=True)[:, 0]
    return places.clamp_max(reach.shape[1] - 1).tolist()


# ---------------------------------------------------------------- loading, rows, caches


def _load(opening: Opening, config, device: torch.device) -> PreTrainedModel:
    """The model with weights, all of them from its files. EngineError where some are missing."""
    dtype = opening.model.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    elif dtype == "auto" and config.get_text_config().dtype in (None, torch.float32):
        dtype = "bfloat16"
    transformers.utils.logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(opening.folder, dtype=dtype, use_safetensors=True, output_loading_info=True,
                                                       trust_remote_code=opening.model.trust_remote_code)
    if missing := sorted([*info["missing_keys"], *info["mismatched_keys"]], key=str):
        raise EngineError(f"{opening.model.path}: expected weights for all of {type(model).__name__}, found none that fit for "
                          f"{len(missing)}, such as {missing[0]}; fetch or save the model again")
    return model.to(device).eval().requires_grad_(False)


def rows_do_not_depend_on_the_batch(threads: int) -> None:
    """Make torch on a CPU compute every row as it would among others. To be called before a model is built, which may keep the functions.

    A product sums few rows in another order than many, shares rows out among threads, and goes another way for rows that do not lie side by
    side: it always gets enough rows, in one block. Functions go through memory 64 numbers at a time, and compute what is left at the end in
    another way: nothing is left. (Where threads share the numbers out, there is an end for each of them: only one thread is exact.)
    """
    product, least = torch.nn.functional.linear, 4 if threads == 1 else 16 * threads

    def linear(x, weight, bias=None):
        rows = x.numel() // max(1, x.shape[-1])
        block = x.reshape(rows, x.shape[-1]).contiguous()
        if 0 < rows < least:
            block = torch.cat([block, x.new_zeros(least - rows, x.shape[-1])])
        return product(block, weight, bias)[:rows].reshape(*x.shape[:-1], weight.shape[0])

    torch.nn.functional.linear = linear
    for module, name in ((torch.nn.functional, "silu"), (torch.nn.functional, "gelu"), (torch, "tanh"), (torch, "sigmoid")):
        setattr(module, name, _without_rest(getattr(module, name)))


def _without_rest(function):
    def padded(x, **options):
        whole = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % 64))
        return function(whole, **options)[:x.numel()].reshape(x.shape)

    return padded


def _extensible(cache: Cache) -> bool:
    """Rows can join a cache of keys and values; other kinds of state begin together and end together."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _append(cache: Cache, more: Cache) -> None:
    """Put the rows of a cache of the same length under those of another."""
    for layer, other in zip(cache.layers, more.layers, strict=True):
        layer.keys, layer.values = torch.cat([layer.keys, other.keys]), torch.cat([layer.values, other.values])


def _ids(request: ChoiceRequest | LikelihoodRequest) -> tuple[int, ...]:
    return (*request.prompt.token_ids, *(request.continuation if type(request) is LikelihoodRequest else ()))


def _tensor(rows: list, device: torch.device) -> Tensor:
    return torch.tensor([list(row) for row in rows], device=device)
