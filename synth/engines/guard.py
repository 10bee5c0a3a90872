"""Keep a server from sending requests elsewhere and answers without end: a hook of the HTTP client."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2

from synth.engines.answers import limit_bytes
from synth.engines.interface import EngineError
from trainer.errors import one_line


async def guard(response: httpx2.Response) -> None:
    """Limit the bytes of a response before they are read, and read them as UTF-8.

    Raises EngineError for a redirect to another server, which would get the prompts.
    """
    if response.has_redirect_location:
        asked, to = response.request.url, response.request.url.join(response.headers["location"])
        upgraded = asked.scheme == "http" and to.scheme == "https" and (asked.port, to.port) == (None, None)
        if to.host != asked.host or (to.scheme, to.port) != (asked.scheme, asked.port) and not upgraded:
            raise EngineError(f"{asked.scheme}://{asked.netloc.decode()} sends requests on to another server, {one_line(to.host)}; "
                              "set base_url to that one if you trust it")
    response.encoding = "utf-8"  # as JSON is; the charset that a server names may be none, or another
    response.stream = _LimitedStream(response.stream, response.headers.pop("content-encoding", "").strip().lower())


class _LimitedStream(httpx2.AsyncByteStream):
    """A response's body, decompressed, of at most so many bytes."""

    def __init__(self, stream: httpx2.AsyncByteStream, encoding: str):
        self.stream, self.encoding = stream, encoding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in limit_bytes(self.stream, self.encoding):
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()
