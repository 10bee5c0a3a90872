"""One server that speaks OpenAI's protocol: how fast it is asked, what is tried again, and which errors end the work."""

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
LONGEST_PAUSE = 60.0
IN_A_ROW = 20  # failures after which a server is taken to be unfit rather than the requests
UNWELL = (408, 409, 425, 429)  # and 500 up: try again


class Garbled(Exception):
    """An answer that is not what the protocol says: tried again."""


class Unscored(Exception):
    """A server that does not tell log-probabilities."""


class Endpoint:
    """One server: how many requests it has, how fast they may come, and whether it answers."""

    def __init__(self, model: Model, url: str, client: AsyncOpenAI):
        self.model, self.url, self.client, self.held = model, url, client, 0
        self.room, self.next = asyncio.Semaphore(model.concurrency), 0.0
        self.at_work, self.since, self.worked = 0, 0.0, 0.0
        self.failed, self.answered = 0, False
        self.limit = "max_tokens"  # what this server calls it

    def busy(self) -> float:
        return self.worked + (time.monotonic() - self.since if self.at_work else 0.0)

    async def chat(self, prompt: Prompt, most: int, **options):
        """A chat completion. Servers of reasoning models call the limit of tokens by another name, which the first answer tells."""
        ask = self.client.chat.completions.create
        try:
            return await ask(model=self.model.path, messages=list(prompt.messages), **{self.limit: most}, **options)
        except APIStatusError as error:
            if error.status_code != 400 or "max_completion_tokens" not in str(error) or self.limit == "max_completion_tokens":
                raise
            self.limit = "max_completion_tokens"
            return await ask(model=self.model.path, messages=list(prompt.messages), **{self.limit: most}, **options)

    async def serve(self, request, answer: Callable):
        """The result of a request, or a Failure with the reason. EngineError where the server is at fault for good."""
        async with self.room:
            try:
                result = await self.attempt(lambda: answer(request, self))
                self.failed, self.answered = 0, True
                return result
            except APIStatusError as error:  # this request is refused
                reason, again = f"refused by the server: {_said(error)}", self.answered
            except (Garbled, OpenAIError) as error:
                reason, again = f"no usable answer in {TRIES} tries: {one_line(str(error))}", False
            except Unscored:
                raise EngineError(f"{self.model.path}: {self.url} returns no log-probabilities of the choices; "
                                  "use judge.scoring generated") from None
        self.failed += 1
        if self.failed >= IN_A_ROW and not again:
            raise EngineError(f"{self.model.path}: {self.url} failed {self.failed} requests in a row: {reason}; "
                              "look at the server, then go on")
        return Failure(request.key, reason)

    async def attempt(self, call: Callable[[], Awaitable]):
        """Call until it works: again after 429, 5xx, timeouts, lost connections and garbled answers, after a pause that grows or that the
        server names. EngineError where the server is not there, or does not let us in."""
        for left in reversed(range(TRIES)):
            await self._turn()
            self._begin()
            try:
                return await call()
            except APIStatusError as error:
                self._refused(error)
                if error.status_code not in UNWELL and error.status_code < 500:
                    raise
                if not left and error.status_code in (429, 503):
                    raise EngineError(f"{self.model.path}: {self.url} still answered {error.status_code} after {TRIES} tries: "
                                      f"{_said(error)}; ask for less at once (concurrency, requests_per_minute), then go on") from error
                found: Exception = Garbled(f"status {error.status_code}: {_said(error)}")
                pause = _wanted_pause(error)
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
            await asyncio.sleep(_grown_pause(TRIES - 1 - left) if pause is None else min(pause, LONGEST_PAUSE))

    def _refused(self, error: APIStatusError) -> None:
        """EngineError where a status says that no request of ours will be answered."""
        if error.status_code in (401, 403):
            raise EngineError(f"{self.model.path}: {self.url} refuses the key in {self.model.api_key_env} ({error.status_code}): "
                              f"{_said(error)}; set another one") from error
        if error.status_code == 404:
            raise EngineError(f"{self.model.path}: {self.url} does not know this model or path (404): {_said(error)}; "
                              "correct path or base_url") from error
        if error.code == "insufficient_quota":
            raise EngineError(f"{self.model.path}: {self.url}: the account's quota is used up: {_said(error)}") from error

    async def _turn(self) -> None:
        """Wait until one more request of this minute is allowed."""
        if self.model.requests_per_minute:
            start = max(self.next, time.monotonic())
            self.next = start + 60 / self.model.requests_per_minute
            await asyncio.sleep(start - time.monotonic())

    def _begin(self) -> None:
        self.at_work += 1
        if self.at_work == 1:
            self.since = time.monotonic()

    def _end(self) -> None:
        self.at_work -= 1
        if not self.at_work:
            self.worked += time.monotonic() - self.since


# ---------------------------------------------------------------- small things


def _grown_pause(tries: int) -> float:
    """Twice as long each time, and not the same for all, who would all come back at once."""
    return min(PAUSE * 2**tries, LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def _wanted_pause(error: APIStatusError) -> float | None:
    """Seconds that a server asks us to wait, given in seconds or as a date."""
    text = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        date = email.utils.parsedate_tz(text)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _said(error: APIStatusError) -> str:
    """What the server says is wrong."""
    body = error.body if isinstance(error.body, dict) else {}
    return one_line(str(body.get("message") or error.message))
