"""Send requests to one OpenAI-compatible server, with rate limits and retries."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError

from synth.config import Model
from synth.engines.answers import Garbled
from synth.engines.dialect import Dialect, is_about_length
from synth.engines.interface import EngineError, Failure, Key
from trainer.errors import one_line

TRIES = 6  # of one request
PAUSE = 0.5  # seconds before the second try, doubled before each later one
MAX_PAUSE = 60.0
MAX_FAILURES = 20  # in a row, after which the fault is the server's rather than the requests'
RETRIED = (408, 409, 425, 429)  # status codes, and all from 500 up
MOST_CHANGES = 12  # of one request that a server refuses
TIMEOUT = 600.0  # seconds of one try, from its first byte to its last


class Unscored(Exception):
    """A server that returns no scores at an answer's first token; its text says why, and the remedy."""


class Unanswered(NamedTuple):
    """A request that the server failed: not the request's fault, so it is asked again by the next call."""

    key: Key
    reason: str


class Endpoint:
    """One server, with its queue, its rate limit and its failures."""

    def __init__(self, model: Model, url: str, client: AsyncOpenAI):
        self.model, self.url, self.client, self.queued = model, url, client, 0
        self.room, self.next = asyncio.Semaphore(model.concurrency), 0.0
        self.in_flight, self.since, self.busy_seconds = 0, 0.0, 0.0
        self.failed, self.has_answered = 0, False
        self.dialect = Dialect(model.max_model_len)

    def busy(self) -> float:
        """Return the seconds in which a request was in flight."""
        return self.busy_seconds + (time.monotonic() - self.since if self.in_flight else 0.0)

    async def ask(self, create: Callable[..., Awaitable], **body: Any) -> bytes:
        """Send a request in the form that this server takes, and return its answer.

        Raises APIStatusError where the server refuses it in every form.
        """
        body, changes = self.dialect.spell(body), []
        while True:
            try:
                answer = await self.send(partial(create, model=self.model.path, **body))
            except APIStatusError as error:
                change = self.dialect.change(error, body) if len(changes) < MOST_CHANGES else None
                if change is None:
                    raise
                body = change.apply(body)
                changes.append(change)
                continue
            self.dialect.learn(changes)
            return answer.content

    async def send(self, call: Callable[[], Awaitable]):
        """Send one request, when the rate limit allows it, and return what comes within TIMEOUT."""
        await self._wait_for_rate_limit()
        self._begin()
        try:
            async with asyncio.timeout(TIMEOUT):
                return await call()
        finally:
            self._end()

    async def serve(self, request, answer: Callable):
        """Return the result of a request, a Failure by its own fault, or Unanswered by the server's.

        Raises EngineError where the server has failed for good.
        """
        async with self.room:
            try:
                result = await self.attempt(lambda: answer(request, self))
                self.failed, self.has_answered = 0, True
                return result
            except APIStatusError as error:
                result, again = Failure(request.key, f"refused by the server: {_server_message(error)}"), self.has_answered
                remedy = ("lower respond.max_tokens or judge.max_tokens, or set the model's max_model_len, then go on"
                          if is_about_length(error) else "look at the server, then go on")
            except (Garbled, OpenAIError) as error:
                reason = f"no usable answer in {TRIES} tries: {one_line(str(error))}"
                result, again, remedy = self._unanswered(request.key, reason), False, "look at the server, then go on"
            except Unscored as error:
                raise EngineError(f"{self.model.path}: {self.url} {error}") from None
        self.failed += 1
        if self.failed >= MAX_FAILURES and not again:
            raise EngineError(f"{self.model.path}: {self.url} failed {self.failed} requests in a row: {result.reason}; {remedy}")
        return result

    def _unanswered(self, key: Key, reason: str) -> Unanswered | Failure:
        return Failure(key, reason) if self.model.on_server_error == "record" else Unanswered(key, reason)

    async def attempt(self, call: Callable[[], Awaitable]):
        """Call, and retry after 429, 5xx, timeouts, lost connections and garbled answers.

        Pauses grow, or are those that the server asks for.

        Raises EngineError where no server answers or it refuses us, and the last error after TRIES tries.
        """
        for left in reversed(range(TRIES)):
            try:
                return await call()
            except Exception as error:
                found, pause = self._fault(error, left), _requested_pause(error)
            if not left:
                raise found
            await asyncio.sleep(_backoff_pause(TRIES - 1 - left) if pause is None else min(pause, MAX_PAUSE))

    def _fault(self, error: Exception, left: int) -> Garbled:
        """Return the fault of one try, after which `left` others may follow.

        Raises what no try can mend.
        """
        if isinstance(error, APIStatusError):
            self._refused(error)
            if 400 <= error.status_code < 500 and error.status_code not in RETRIED:
                raise error
            if not left and error.status_code in (429, 503):
                raise EngineError(f"{self.model.path}: {self.url} still answered {error.status_code} after {TRIES} tries: "
                                  f"{_server_message(error)}; lower concurrency or requests_per_minute, then go on") from error
            return Garbled(f"status {error.status_code}: {_server_message(error)}")
        if isinstance(error, (APITimeoutError, TimeoutError)):
            return Garbled("timed out")
        if isinstance(error, APIConnectionError):
            if isinstance(error.__cause__, (Garbled, EngineError)):  # of what came
                return self._fault(error.__cause__, left)
            if not left and "Connect" in type(error.__cause__).__name__:
                raise EngineError(f"{self.model.path}: no server answers at {self.url} ({one_line(str(error.__cause__))}); "
                                  "start it, or correct base_url") from error
            return Garbled("the connection broke off")
        if isinstance(error, Garbled):
            return error
        if isinstance(error, OpenAIError):  # a response that the client cannot read
            return Garbled(f"an unreadable answer ({type(error).__name__})")
        raise error

    def _refused(self, error: APIStatusError) -> None:
        """Raise EngineError where a status means that the server will answer no request of ours."""
        if error.status_code in (401, 403):
            raise EngineError(f"{self.model.path}: {self.url} refuses the key in {self.model.api_key_env} ({error.status_code}): "
                              f"{_server_message(error)}; set another one") from error
        if error.status_code == 404:
            raise EngineError(f"{self.model.path}: {self.url} does not know this model or path (404): {_server_message(error)}; "
                              "correct path or base_url") from error
        if error.code == "insufficient_quota" or error.status_code == 402:
            raise EngineError(f"{self.model.path}: {self.url}: the account's quota is used up: {_server_message(error)}") from error

    async def _wait_for_rate_limit(self) -> None:
        """Wait until `requests_per_minute` allows the next request."""
        if self.model.requests_per_minute:
            start = max(self.next, time.monotonic())
            self.next = start + 60 / self.model.requests_per_minute
            await asyncio.sleep(start - time.monotonic())

    def _begin(self) -> None:
        self.in_flight += 1
        if self.in_flight == 1:
            self.since = time.monotonic()

    def _end(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self.busy_seconds += time.monotonic() - self.since


# ---------------------------------------------------------------- helpers


def _backoff_pause(tries: int) -> float:
    """Return the seconds before the next try.

    They double each time, and are random, so that not all requests come back at once.
    """
    return min(PAUSE * 2**tries, MAX_PAUSE) * random.uniform(0.5, 1.0)


def _requested_pause(error: Exception) -> float | None:
    """Return the seconds of a Retry-After header, given in seconds or as a date; None without one."""
    text = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
    try:
        return max(0.0, float(text))
    except ValueError:
        try:
            date = email.utils.parsedate_tz(text)
            return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
        except (ValueError, OverflowError, TypeError):  # a date that no clock shows
            return None


def _server_message(error: APIStatusError) -> str:
    """Return the server's own message."""
    body = error.body if isinstance(error.body, dict) else {}
    message = body.get("message")
    return one_line(message if isinstance(message, str) and message else error.message)
