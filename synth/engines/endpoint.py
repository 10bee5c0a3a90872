"""Send requests to one OpenAI-compatible server, with rate limits and retries."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Awaitable, Callable

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError

from synth.config import Model
from synth.engines.interface import EngineError, Failure, Prompt
from trainer.errors import one_line

TRIES = 6  # of one request
PAUSE = 0.5  # seconds before the second try, doubled before each later one
MAX_PAUSE = 60.0
MAX_FAILURES = 20  # in a row, after which the fault is the server's rather than the requests'
RETRIED = (408, 409, 425, 429)  # status codes, and all from 500 up


class Garbled(Exception):
    """An answer that does not follow the protocol, which is retried."""


class Unscored(Exception):
    """The server returns no log-probabilities."""


class Endpoint:
    """One server, with its queue, its rate limit and its failures."""

    def __init__(self, model: Model, url: str, client: AsyncOpenAI):
        self.model, self.url, self.client, self.queued = model, url, client, 0
        self.room, self.next = asyncio.Semaphore(model.concurrency), 0.0
        self.in_flight, self.since, self.busy_seconds = 0, 0.0, 0.0
        self.failed, self.has_answered = 0, False
        self.limit = "max_tokens"  # this server's name of the option

    def busy(self) -> float:
        """Return the seconds in which a request was in flight."""
        return self.busy_seconds + (time.monotonic() - self.since if self.in_flight else 0.0)

    async def chat(self, prompt: Prompt, most: int, **options):
        """Request a chat completion.

        Servers of reasoning models have another name for max_tokens, which their first error names.
        """
        ask = self.client.chat.completions.create
        try:
            return await ask(model=self.model.path, messages=list(prompt.messages), **{self.limit: most}, **options)
        except APIStatusError as error:
            if error.status_code != 400 or "max_completion_tokens" not in str(error) or self.limit == "max_completion_tokens":
                raise
            self.limit = "max_completion_tokens"
            return await ask(model=self.model.path, messages=list(prompt.messages), **{self.limit: most}, **options)

    async def serve(self, request, answer: Callable):
        """Return the result of a request, or a Failure with the reason.

        Raises EngineError where the server has failed for good.
        """
        async with self.room:
            try:
                result = await self.attempt(lambda: answer(request, self))
                self.failed, self.has_answered = 0, True
                return result
            except APIStatusError as error:  # this request is refused
                reason, again = f"refused by the server: {_server_message(error)}", self.has_answered
            except (Garbled, OpenAIError) as error:
                reason, again = f"no usable answer in {TRIES} tries: {one_line(str(error))}", False
            except Unscored:
                raise EngineError(f"{self.model.path}: {self.url} returns no log-probabilities of the choices; "
                                  "use judge.scoring generated") from None
        self.failed += 1
        if self.failed >= MAX_FAILURES and not again:
            raise EngineError(f"{self.model.path}: {self.url} failed {self.failed} requests in a row: {reason}; "
                              "look at the server, then go on")
        return Failure(request.key, reason)

    async def attempt(self, call: Callable[[], Awaitable]):
        """Call, and retry after 429, 5xx, timeouts, lost connections and garbled answers.

        Pauses grow, or are those that the server asks for.

        Raises EngineError where no server answers or it refuses us, and the last error after TRIES tries.
        """
        for left in reversed(range(TRIES)):
            await self._wait_for_rate_limit()
            self._begin()
            try:
                return await call()
            except APIStatusError as error:
                self._refused(error)
                if error.status_code not in RETRIED and error.status_code < 500:
                    raise
                if not left and error.status_code in (429, 503):
                    raise EngineError(f"{self.model.path}: {self.url} still answered {error.status_code} after {TRIES} tries: "
                                      f"{_server_message(error)}; lower concurrency or requests_per_minute, then go on") from error
                found: Exception = Garbled(f"status {error.status_code}: {_server_message(error)}")
                pause = _requested_pause(error)
            except APIConnectionError as error:
                if not left and not isinstance(error, APITimeoutError) and "Connect" in type(error.__cause__).__name__:
                    raise EngineError(f"{self.model.path}: no server answers at {self.url} ({one_line(str(error.__cause__))}); "
                                      "start it, or correct base_url") from error
                found, pause = Garbled("timed out" if isinstance(error, APITimeoutError) else "the connection broke off"), None
            except Garbled as error:
                found, pause = error, None
            except (ValueError, TypeError, AttributeError, LookupError) as error:  # JSON cut off, or of another shape
                found, pause = Garbled(f"an unreadable answer ({type(error).__name__})"), None
            finally:
                self._end()
            if not left:
                raise found
            await asyncio.sleep(_backoff_pause(TRIES - 1 - left) if pause is None else min(pause, MAX_PAUSE))

    def _refused(self, error: APIStatusError) -> None:
        """Raise EngineError where a status means that the server will answer no request of ours."""
        if error.status_code in (401, 403):
            raise EngineError(f"{self.model.path}: {self.url} refuses the key in {self.model.api_key_env} ({error.status_code}): "
                              f"{_server_message(error)}; set another one") from error
        if error.status_code == 404:
            raise EngineError(f"{self.model.path}: {self.url} does not know this model or path (404): {_server_message(error)}; "
                              "correct path or base_url") from error
        if error.code == "insufficient_quota":
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


def _requested_pause(error: APIStatusError) -> float | None:
    """Return the seconds of a Retry-After header, given in seconds or as a date; None without one."""
    text = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        date = email.utils.parsedate_tz(text)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _server_message(error: APIStatusError) -> str:
    """Return the server's own message."""
    body = error.body if isinstance(error.body, dict) else {}
    return one_line(str(body.get("message") or error.message))
