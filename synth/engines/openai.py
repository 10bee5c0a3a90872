"""Any server that speaks OpenAI's protocol, asked from this process: many requests in flight, each tried again until the server is well.

A prompt that is a chat is rendered by the server. A prompt of token ids goes to /completions with what vLLM's server adds to the protocol,
so that such a server gives, seed for seed, what the same vLLM gives in process.
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
ENDED = {"stop": "stop", "eos": "stop", "end_turn": "stop", "length": "length"}
DIALECT = {"skip_special_tokens": False, "spaces_between_special_tokens": False}  # of vLLM's server


class Server:
    """The Engine of models that run elsewhere. EngineError, of one line, where a server is down, refuses us or does not know the model."""

    def __init__(self, model: Model):
        urls = [model.base_url] if isinstance(model.base_url, str) else list(model.base_url or ())
        if not urls:
            raise EngineError(f"{model.path}: expected the server's base URL beside engine openai, found none; set url")
        keys = [_key(model, url) for url in urls]
        self.model, self.spent, self.endpoints = model, 0.0, []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        try:
            self.endpoints = self._wait(self._connect(urls, keys))
            served = sorted(set(self._wait(self._served())))
        except BaseException:
            self.close()
            raise
        self.info = EngineInfo("openai-compatible server", model.path, "; ".join(served), False)

    def complete(self, requests: Iterable[CompletionRequest]) -> Iterator[Completion | Failure]:
        return self._ask(requests, self._complete)

    def choose(self, requests: Iterable[ChoiceRequest]) -> Iterator[Choice | Failure]:
        return self._ask(requests, self._choose)

    def likelihood(self, requests: Iterable) -> Iterator:
        raise EngineError(f"{self.model.path}: a server does not tell how likely given tokens are; use engine vllm or transformers")

    def embed(self, requests: Iterable) -> Iterator:
        raise EngineError(f"{self.model.path}: engine openai gives no embeddings; use engine transformers")

    def busy(self) -> float:
        """Seconds in which a server had a request of ours, as a mean over servers."""
        return sum(endpoint.busy() for endpoint in self.endpoints) / len(self.endpoints)

    def cost(self) -> float:
        return self.spent

    def close(self) -> None:
        if self.thread.is_alive():
            self._wait(self._disconnect())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())  # which looked up hosts
            self.loop.close()

    # ---------------------------------------------------------------- many requests

    def _ask(self, requests: Iterable, answer: Callable) -> Iterator:
        """Results as they come. An error ends it, after what had come by then; whoever stops early leaves no request behind."""
        source, done = iter(requests), queue.SimpleQueue()
        running: dict[concurrent.futures.Future, Endpoint] = {}
        try:
            self._start(source, answer, running, done)
            while running:
                future = done.get()
                running.pop(future).held -= 1
                if future.exception():
                    yield from self._finished(running)
                    raise future.exception()
                self._start(source, answer, running, done)
                yield future.result()
        finally:
            for future, endpoint in running.items():
                endpoint.held -= 1
                future.cancel()

    def _start(self, source: Iterator, answer: Callable, running: dict, done: queue.SimpleQueue) -> None:
        """Fill up every server's queue, the shortest first: twice what it may have in flight, so that it never waits for us."""
        while True:
            endpoint = min(self.endpoints, key=lambda endpoint: endpoint.held)
            if endpoint.held >= 2 * self.model.concurrency or not (one := list(itertools.islice(source, 1))):
                return
            endpoint.held += 1
            future = asyncio.run_coroutine_threadsafe(endpoint.serve(one[0], answer), self.loop)
            running[future] = endpoint
            future.add_done_callback(done.put)

    def _finished(self, running: dict) -> Iterator:
        for future in [future for future in running if future.done()]:
            running.pop(future).held -= 1
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

    async def _served(self) -> list[str]:
        return await asyncio.gather(*map(self._told, self.endpoints))

    async def _told(self, endpoint: Endpoint) -> str:
        try:
            return await endpoint.attempt(lambda: self._description(endpoint.client))
        except (Garbled, OpenAIError) as error:
            raise EngineError(f"{self.model.path}: {endpoint.url} does not list its models: {error}; "
                              "correct base_url, or look at the server") from None

    async def _description(self, client: AsyncOpenAI) -> str:
        """What a server says that it serves under the model's name; just that name where it does not list models."""
        try:
            listed = await client.models.list()
            found = next((one for one in listed.data if one.id == self.model.path), None)
        except APIStatusError as error:
            if error.status_code in (404, 405):
                return self.model.path
            raise
        except (AttributeError, TypeError) as error:
            raise Garbled("an unreadable list of models") from error
        told = {name: getattr(found, name, None) for name in ("root", "max_model_len")} if found else {}
        return " ".join([self.model.path, *(f"{name}={value}" for name, value in told.items() if value is not None)])

    # ---------------------------------------------------------------- one request

    async def _complete(self, request: CompletionRequest, endpoint: Endpoint) -> Completion | Failure:
        how = request.sampling
        common = dict(temperature=how.temperature, top_p=how.top_p, seed=request.seed % 2**63)
        if how.stop_texts:
            common["stop"] = list(how.stop_texts[:4])  # the protocol allows four
        if request.prompt.messages is None:
            return await self._continue(request, endpoint, common)
        said, usage = self._first(await endpoint.chat(request.prompt, how.max_tokens, **common))
        text = said.message.content
        if text is None and said.finish_reason != "length":  # at that limit a model may still have been reasoning
            raise Garbled("an answer without content")
        return _ended(request, said.finish_reason, text or "", usage, None)

    async def _continue(self, request: CompletionRequest, endpoint: Endpoint, common: dict) -> Completion | Failure:
        """Complete token ids, as vLLM's server does."""
        said, usage = self._first(await endpoint.client.completions.create(
            model=self.model.path, prompt=list(request.prompt.token_ids or ()), max_tokens=request.sampling.max_tokens, logprobs=0,
            extra_body=DIALECT | {"stop_token_ids": list(request.sampling.stop_ids)}, **common))
        if not isinstance(said.text, str):
            raise Garbled("an answer without text")
        told = said.logprobs and said.logprobs.token_logprobs
        return _ended(request, said.finish_reason, said.text, usage, sum(told) if told and None not in told else None)

    async def _choose(self, request: ChoiceRequest, endpoint: Endpoint) -> Choice:
        try:
            if request.prompt.messages is not None:
                said, usage = self._first(await endpoint.chat(request.prompt, 1, temperature=0.0, logprobs=True, top_logprobs=20))
                if not said.logprobs:
                    raise Unscored
                told = [(one.token, one.logprob) for one in said.logprobs.content[0].top_logprobs]
            else:
                said, usage = self._first(await endpoint.client.completions.create(
                    model=self.model.path, prompt=list(request.prompt.token_ids or ()), max_tokens=1, temperature=0.0, logprobs=20,
                    extra_body=DIALECT))
                if not said.logprobs:
                    raise Unscored
                told = list(said.logprobs.top_logprobs[0].items())
            if not told:
                raise Unscored
        except APIStatusError as error:
            if error.status_code < 500 and "logprob" in str(error):
                raise Unscored from error
            raise
        chances = tuple(sum(math.exp(logprob) for token, logprob in told if token.strip() == choice.strip()) for choice in request.choices)
        return Choice(request.key, chances, usage[0])

    def _first(self, response) -> tuple:
        """The first choice of a response, and its tokens of prompt and completion, which are booked."""
        choices = getattr(response, "choices", None)
        if not choices:
            raise Garbled("an answer without choices")
        usage = getattr(response, "usage", None)
        tokens = getattr(usage, "prompt_tokens", None) or 0, getattr(usage, "completion_tokens", None) or 0
        self.spent += sum(price * count for price, count in zip(self.model.price, tokens, strict=True)) / 1e6
        return choices[0], tokens


# ---------------------------------------------------------------- small things


def _key(model: Model, url: str) -> str:
    """The API key; a server in our own network needs none."""
    found = os.environ.get(model.api_key_env, "").strip()
    if not found and not _near(urlsplit(url).hostname or ""):
        raise EngineError(f"{model.path}: expected an API key for {url} in the environment variable {model.api_key_env}, found none; "
                          "export it")
    return found or "none"


def _near(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith((".local", ".internal")) or "." not in host
    return address.is_private or address.is_loopback


def _ended(request: CompletionRequest, finish: str | None, text: str, usage: tuple[int, int],
           logprob: float | None) -> Completion | Failure:
    if finish == "content_filter":
        return Failure(request.key, "withheld by the server's content filter")
    if finish not in ENDED:
        return Failure(request.key, f"ended by {finish}")
    return Completion(request.key, text, usage[1], ENDED[finish], logprob, usage[0])
