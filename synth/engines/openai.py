"""Run a model behind an OpenAI-compatible server, with many requests in flight.

The server renders prompts that are messages. Prompts of token ids go to /completions with vLLM's additions to the protocol, so that a vLLM
server returns what the same vLLM returns in a worker process, seed for seed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ipaddress
import itertools
import math
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from urllib.parse import urlsplit

from openai import APIStatusError, AsyncOpenAI, OpenAIError

from synth.config import Model
from synth.engines.endpoint import Endpoint, Garbled, Unscored
from synth.engines.interface import Choice, ChoiceRequest, Completion, CompletionRequest, EngineError, EngineInfo, Failure

TIMEOUT = 600.0  # seconds of one try
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
        keys = [_key(model, url) for url in urls]
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

    def close(self) -> None:
        if self.thread.is_alive():
            self._wait(self._disconnect())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())  # its threads looked up host names
            self.loop.close()

    # ---------------------------------------------------------------- many requests

    def _ask(self, requests: Iterable, answer: Callable) -> Iterator:
        """Yield results as they arrive.

        Raises an error after the results so far; a caller that stops early leaves no request behind.
        """
        source, done = iter(requests), queue.SimpleQueue()
        running: dict[concurrent.futures.Future, Endpoint] = {}
        try:
            self._start(source, answer, running, done)
            while running:
                future = done.get()
                running.pop(future).queued -= 1
                if future.exception():
                    yield from self._finished(running)
                    raise future.exception()
                self._start(source, answer, running, done)
                yield future.result()
        finally:
            for future, endpoint in running.items():
                endpoint.queued -= 1
                future.cancel()

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
            if not future.cancelled() and not future.exception():
                yield future.result()

    def _wait(self, awaitable: Awaitable):
        async def run():
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result()

    async def _connect(self, urls: list[str], keys: list[str]) -> list[Endpoint]:
        return [Endpoint(self.model, url, AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=TIMEOUT))
                for url, key in zip(urls, keys, strict=True)]

    async def _disconnect(self) -> None:
        await asyncio.gather(*(endpoint.client.close() for endpoint in self.endpoints), return_exceptions=True)

    async def _describe_models(self) -> list[str]:
        return await asyncio.gather(*map(self._describe_model, self.endpoints))

    async def _describe_model(self, endpoint: Endpoint) -> str:
        try:
            return await endpoint.attempt(lambda: self._description(endpoint.client))
        except (Garbled, OpenAIError) as error:
            raise EngineError(f"{self.model.path}: {endpoint.url} does not list its models: {error}; "
                              "correct base_url, or look at the server") from None

    async def _description(self, client: AsyncOpenAI) -> str:
        """Return a server's description of the model, only its name where the server lists no models."""
        try:
            models = await client.models.list()
            found = next((one for one in models.data if one.id == self.model.path), None)
        except APIStatusError as error:
            if error.status_code in (404, 405):
                return self.model.path
            raise
        except (AttributeError, TypeError) as error:
            raise Garbled("an unreadable list of models") from error
        details = {name: getattr(found, name, None) for name in ("root", "max_model_len")} if found else {}
        return " ".join([self.model.path, *(f"{name}={value}" for name, value in details.items() if value is not None)])

    # ---------------------------------------------------------------- one request

    async def _complete(self, request: CompletionRequest, endpoint: Endpoint) -> Completion | Failure:
        sampling = request.sampling
        common = dict(temperature=sampling.temperature, top_p=sampling.top_p, seed=request.seed % 2**63)
        if sampling.stop_texts:
            common["stop"] = list(sampling.stop_texts[:4])  # the protocol allows four
        if request.prompt.messages is None:
            return await self._continue(request, endpoint, common)
        choice, usage = self._first(await endpoint.chat(request.prompt, sampling.max_tokens, **common))
        text = choice.message.content
        if text is None and choice.finish_reason != "length":  # at the limit, a model may have been reasoning still
            raise Garbled("an answer without content")
        return _make_completion(request, choice.finish_reason, text or "", usage, None)

    async def _continue(self, request: CompletionRequest, endpoint: Endpoint, common: dict) -> Completion | Failure:
        """Complete a prompt of token ids, with vLLM's options."""
        choice, usage = self._first(await endpoint.client.completions.create(
            model=self.model.path, prompt=list(request.prompt.token_ids or ()), max_tokens=request.sampling.max_tokens, logprobs=0,
            extra_body=VLLM_OPTIONS | {"stop_token_ids": list(request.sampling.stop_ids)}, **common))
        if not isinstance(choice.text, str):
            raise Garbled("an answer without text")
        logprobs = choice.logprobs and choice.logprobs.token_logprobs
        total = sum(logprobs) if logprobs and None not in logprobs else None
        return _make_completion(request, choice.finish_reason, choice.text, usage, total)

    async def _choose(self, request: ChoiceRequest, endpoint: Endpoint) -> Choice:
        try:
            if request.prompt.messages is not None:
                choice, usage = self._first(await endpoint.chat(request.prompt, 1, temperature=0.0, logprobs=True, top_logprobs=20))
                if not choice.logprobs:
                    raise Unscored
                logprobs = [(one.token, one.logprob) for one in choice.logprobs.content[0].top_logprobs]
            else:
                choice, usage = self._first(await endpoint.client.completions.create(
                    model=self.model.path, prompt=list(request.prompt.token_ids or ()), max_tokens=1, temperature=0.0, logprobs=20,
                    extra_body=VLLM_OPTIONS))
                if not choice.logprobs:
                    raise Unscored
                logprobs = list(choice.logprobs.top_logprobs[0].items())
            if not logprobs:
                raise Unscored
        except APIStatusError as error:
            if error.status_code < 500 and "logprob" in str(error):
                raise Unscored from error
            raise
        probabilities = tuple(sum(math.exp(logprob) for token, logprob in logprobs if token.strip() == text.strip())
                              for text in request.choices)
        return Choice(request.key, probabilities, usage[0])

    def _first(self, response) -> tuple:
        """Return a response's first choice and its prompt and completion tokens; add up their price."""
        choices = getattr(response, "choices", None)
        if not choices:
            raise Garbled("an answer without choices")
        usage = getattr(response, "usage", None)
        tokens = getattr(usage, "prompt_tokens", None) or 0, getattr(usage, "completion_tokens", None) or 0
        self.spent += sum(price * count for price, count in zip(self.model.price, tokens, strict=True)) / 1e6
        return choices[0], tokens


# ---------------------------------------------------------------- helpers


def _key(model: Model, url: str) -> str:
    """Return the API key; a server in the local network needs none.

    Raises EngineError where another one has none.
    """
    found = os.environ.get(model.api_key_env, "").strip()
    if not found and not _is_local(urlsplit(url).hostname or ""):
        raise EngineError(f"{model.path}: expected an API key for {url} in the environment variable {model.api_key_env}, got none; "
                          "export it")
    return found or "none"


def _is_local(host: str) -> bool:
    """Return whether a host is in the local network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith((".local", ".internal")) or "." not in host
    return address.is_private or address.is_loopback


def _make_completion(request: CompletionRequest, finish: str | None, text: str, usage: tuple[int, int],
                     logprob: float | None) -> Completion | Failure:
    if finish == "content_filter":
        return Failure(request.key, "withheld by the server's content filter")
    if finish not in FINISH_REASONS:
        return Failure(request.key, f"ended by {finish}")
    return Completion(request.key, text, usage[1], FINISH_REASONS[finish], logprob, usage[0])
