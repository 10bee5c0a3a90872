"""Run a model behind an OpenAI-compatible server, with many requests in flight.

The server renders prompts that are messages. Prompts of token ids go to /completions with vLLM's additions to the protocol, so that a vLLM
server returns what the same vLLM returns in a worker process, seed for seed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import json
import math
import queue
import re
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator

from openai import APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from synth.config import Model
from synth.engines import endpoint as endpoints
from synth.engines.answers import Garbled, Reply, has_lone_surrogate, read_chat, read_completion, read_models
from synth.engines.endpoint import Endpoint, Unanswered, Unscored
from synth.engines.guard import guard
from synth.engines.interface import Choice, ChoiceRequest, Completion, CompletionRequest, EngineError, EngineInfo, Failure
from synth.engines.keys import api_key
from trainer.errors import one_line

LOGPROBS = 20  # the most that the protocol allows
THOUGHT = re.compile(r"\s*(?:<\W?(?:[\w:]+[:_])?(?:think|thinking|thought|reasoning|start_thinking)\W?>|\[think\]|◁think▷|<\|channel\|>|"
                     r"<\|start_thinking\|>)\s*", re.IGNORECASE)  # the first token of a model that thinks
NO_LOGPROBS = "returns no log-probabilities of the choices; use judge.scoring generated"
FINISH_REASONS = {"stop": "stop", "eos": "stop", "end_turn": "stop", "length": "length"}
VLLM_OPTIONS = {"skip_special_tokens": False, "spaces_between_special_tokens": False}  # of vLLM's server


class OpenAIEngine:
    """The Engine of models that run elsewhere.

    Raises EngineError, of one line, where a server is down, refuses the key or does not know the model.
    """

    def __init__(self, model: Model):
        urls = [model.base_url] if isinstance(model.base_url, str) else list(model.base_url or ())
        if not urls:
            raise EngineError(f"{model.path}: base_url: expected the server's URL, with engine openai, got none")
        keys = [api_key(model, url) for url in urls]
        self.model, self.spent, self.endpoints = model, 0.0, []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        try:
            self.endpoints = self._wait(self._connect(urls, keys))
            served = sorted(set(self._wait(self._describe_models())))
        except BaseException:
            self.close()
            raise
        self.info = EngineInfo("openai-compatible server", model.path, "; ".join(served), False)
        self.has_scored = False

    def complete(self, requests: Iterable[CompletionRequest]) -> Iterator[Completion | Failure]:
        return self._ask(requests, self._complete)

    def choose(self, requests: Iterable[ChoiceRequest]) -> Iterator[Choice | Failure]:
        return self._ask(requests, self._choose)

    def likelihood(self, requests: Iterable) -> Iterator:
        raise EngineError(f"{self.model.path}: engine openai computes no likelihoods; use engine vllm or transformers")

    def embed(self, requests: Iterable) -> Iterator:
        raise EngineError(f"{self.model.path}: engine openai computes no embeddings; use engine transformers")

    def busy(self) -> float:
        """Return the seconds in which a server had a request in flight, the mean over servers."""
        return sum(endpoint.busy() for endpoint in self.endpoints) / len(self.endpoints)

    def cost(self) -> float:
        return self.spent

    def notes(self) -> list[str]:
        return list(dict.fromkeys(note for endpoint in self.endpoints for note in endpoint.dialect.notes))

    def alive(self) -> bool:
        return self.thread.is_alive()

    def close(self) -> None:
        if self.thread.is_alive():
            self._wait(self._disconnect())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())  # its threads looked up host names
            self.loop.close()

    # ---------------------------------------------------------------- many requests

    def _ask(self, requests: Iterable, answer: Callable) -> Iterator:
        """Yield results as they arrive, but those of requests that a server failed.

        Refusals of a server that has answered nothing yet are held back: it may refuse all. Raises an error after the results so far; a
        caller that stops early leaves no request behind. Raises EngineError at the end where requests are unanswered.
        """
        source, done, unanswered = iter(requests), queue.SimpleQueue(), []
        running: dict[concurrent.futures.Future, Endpoint] = {}
        refused: dict[Endpoint, list[Failure]] = defaultdict(list)
        try:
            self._start(source, answer, running, done)
            while running:
                future = done.get()
                endpoint = running.pop(future)
                endpoint.queued -= 1
                if future.exception():
                    yield from self._finished(running)
                    raise future.exception()
                self._start(source, answer, running, done)
                result = future.result()
                if isinstance(result, Unanswered):
                    unanswered.append(result)
                    continue
                refused[endpoint].append(result)
                if endpoint.has_answered:
                    yield from refused.pop(endpoint)
            yield from itertools.chain.from_iterable(refused.values())
        finally:
            for future, endpoint in running.items():
                endpoint.queued -= 1
                future.cancel()
        if unanswered:
            raise EngineError(f"{self.model.path}: {len(unanswered):,} of the requests are unanswered: {unanswered[-1].reason}; "
                              "all others are in the pool: run the same command again to ask these")

    def _start(self, source: Iterator, answer: Callable, running: dict, done: queue.SimpleQueue) -> None:
        """Fill all servers' queues to twice the concurrency, the shortest first, so that no server waits."""
        while True:
            endpoint = min(self.endpoints, key=lambda endpoint: endpoint.queued)
            if endpoint.queued >= 2 * self.model.concurrency or not (one := list(itertools.islice(source, 1))):
                return
            endpoint.queued += 1
            future = asyncio.run_coroutine_threadsafe(endpoint.serve(one[0], answer), self.loop)
            running[future] = endpoint
            future.add_done_callback(done.put)

    def _finished(self, running: dict) -> Iterator:
        for future in [future for future in running if future.done()]:
            running.pop(future).queued -= 1
            if not future.cancelled() and not future.exception() and not isinstance(future.result(), (Unanswered, Failure)):
                yield future.result()

    def _wait(self, awaitable: Awaitable):
        async def run():
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result()

    async def _connect(self, urls: list[str], keys: list[str]) -> list[Endpoint]:
        return [Endpoint(self.model, url, AsyncOpenAI(
                    base_url=url, api_key=key, max_retries=0, timeout=endpoints.TIMEOUT, default_headers={"Accept-Encoding": "identity"},
                    http_client=DefaultAsyncHttpxClient(event_hooks={"response": [guard]})))
                for url, key in zip(urls, keys, strict=True)]

    async def _disconnect(self) -> None:
        await asyncio.gather(*(endpoint.client.close() for endpoint in self.endpoints), return_exceptions=True)

    async def _describe_models(self) -> list[str]:
        return await asyncio.gather(*map(self._describe_model, self.endpoints))

    async def _describe_model(self, endpoint: Endpoint) -> str:
        try:
            return await endpoint.attempt(lambda: self._description(endpoint))
        except (Garbled, OpenAIError) as error:
            raise EngineError(f"{self.model.path}: {endpoint.url} does not list its models: {one_line(str(error))}; "
                              "correct base_url, or look at the server") from None

    async def _description(self, endpoint: Endpoint) -> str:
        """Return a server's description of the model, only its name where the server lists no models."""
        try:
            answer = await endpoint.send(endpoint.client.models.with_raw_response.list)
        except APIStatusError as error:
            if error.status_code in (404, 405):
                return self.model.path
            raise
        details = read_models(answer.content, self.model.path)
        lengths = [length for length in (self.model.max_model_len, details.get("max_model_len")) if length]
        endpoint.dialect.context = min(lengths, default=None)
        return " ".join([self.model.path, *(f"{name}={value}" for name, value in details.items())])

    # ---------------------------------------------------------------- one request

    async def _complete(self, request: CompletionRequest, endpoint: Endpoint) -> Completion | Failure:
        sampling = request.sampling
        body = dict(max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, seed=request.seed % 2**63)
        if sampling.stop_texts:
            body["stop"] = list(sampling.stop_texts[:4])  # the protocol allows four
        if request.prompt.messages is None:  # token ids, with vLLM's options
            reply = read_completion(await endpoint.ask(
                endpoint.client.completions.with_raw_response.create, prompt=list(request.prompt.token_ids or ()), logprobs=0,
                extra_body=VLLM_OPTIONS | {"stop_token_ids": list(sampling.stop_ids)}, **body), sampling.max_tokens)
        else:
            reply = read_chat(await endpoint.ask(endpoint.client.chat.completions.with_raw_response.create,
                                                 messages=list(request.prompt.messages), **body), sampling.max_tokens)
        self._account(reply, endpoint)
        return _make_completion(request, reply)

    async def _choose(self, request: ChoiceRequest, endpoint: Endpoint) -> Choice:
        try:
            if request.prompt.messages is not None:
                count = "top_logprobs"
                reply = read_chat(await endpoint.ask(
                    endpoint.client.chat.completions.with_raw_response.create, messages=list(request.prompt.messages), max_tokens=1,
                    temperature=0.0, logprobs=True, top_logprobs=LOGPROBS), 1)
            else:
                count = "logprobs"
                reply = read_completion(await endpoint.ask(
                    endpoint.client.completions.with_raw_response.create, prompt=list(request.prompt.token_ids or ()), max_tokens=1,
                    temperature=0.0, logprobs=LOGPROBS, extra_body=VLLM_OPTIONS), 1)
        except APIStatusError as error:
            if error.status_code < 500 and "logprob" in str(error):
                raise Unscored(NO_LOGPROBS) from error
            raise
        self._account(reply, endpoint)
        self._check_scored(reply, endpoint.dialect.most.get(count, LOGPROBS), len(request.choices))
        probabilities = tuple(sum(math.exp(logprob) for token, logprob in reply.first if token.strip() == text.strip())
                              for text in request.choices)
        self.has_scored |= sum(probabilities) > 0
        return Choice(request.key, probabilities, reply.prompt_tokens)

    def _check_scored(self, reply: Reply, given: int, wanted: int) -> None:
        """Raise Unscored where a judge's first token cannot be a score."""
        likeliest = max(reply.first, key=lambda pair: pair[1], default=("", 0.0))[0]
        if not self.has_scored and (THOUGHT.fullmatch(likeliest) or not reply.first and reply.elsewhere):
            begin = json.dumps(likeliest, ensure_ascii=False) if likeliest else f"its {reply.elsewhere}"
            raise Unscored(f"thinks before it answers: it begins with {begin}, where the score is expected; turn its thinking off at the "
                           "server, or use judge.scoring generated with room for the thoughts in judge.max_tokens")
        if not reply.first:
            raise Unscored(NO_LOGPROBS)
        if given < wanted:
            raise Unscored(f"returns at most {given} log-probabilities, fewer than the {wanted} choices; use judge.scoring generated")

    def _account(self, reply: Reply, endpoint: Endpoint) -> None:
        """Add up the price of an answer, and note what is odd in it."""
        tokens = reply.prompt_tokens, reply.tokens
        self.spent += sum(price * count for price, count in zip(self.model.price, tokens, strict=True)) / 1e6
        if reply.elsewhere:
            endpoint.dialect.notes[f"answers without content, whose text is in {reply.elsewhere}, are recorded as empty: turn off the "
                                   "model's thinking or the server's parser of it, or raise max_tokens"] = None
        if not reply.counted:
            endpoint.dialect.notes["token counts that are none are taken as 0"] = None


# ---------------------------------------------------------------- helpers


def _make_completion(request: CompletionRequest, reply: Reply) -> Completion | Failure:
    if reply.finish == "content_filter":
        return Failure(request.key, "withheld by the server's content filter")
    if reply.finish not in FINISH_REASONS:
        return Failure(request.key, f"ended by {one_line(str(reply.finish))}")
    if has_lone_surrogate(reply.text):
        return Failure(request.key, "no Unicode text: half of a surrogate pair")
    return Completion(request.key, reply.text, reply.tokens, FINISH_REASONS[reply.finish], reply.logprob, reply.prompt_tokens)
