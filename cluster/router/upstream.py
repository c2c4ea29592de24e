"""Calls from the router to replicas."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ValidationError

from cluster.engines.child_process import API_KEY_VARIABLE

ACTION_TIMEOUT_S = 120.0
"""Longest wait for a slot action, which queues behind the step that the engine computes."""
TAIL_BYTES = 8192
"""Bytes kept of the end of an answer; its last chunk, with the engine's timings, takes about 600."""

Reply = TypeVar("Reply", bound=BaseModel)
Result = TypeVar("Result")


class UpstreamError(Exception):
    """A replica refused a request or could not be reached; `status` is what the client is told."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


class BrokenStreamError(UpstreamError):
    """A replica broke off in the middle of an answer; `response` has been begun."""

    def __init__(self, message: str, response: web.StreamResponse) -> None:
        super().__init__(message)
        self.response = response


def open_session() -> aiohttp.ClientSession:
    """A session that opens a connection for each request.

    llama.cpp's server closes idle connections without a word, and a request sent into such a one is lost.
    """
    key = os.environ.get(API_KEY_VARIABLE)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
        headers={"Authorization": f"Bearer {key}"} if key else None,
    )


@asynccontextmanager
async def posted(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, object]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to `body`, its content still unread; raises `UpstreamError` where there is none or it is a refusal."""
    try:
        response = await session.post(url, json=body)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise UpstreamError(f"{url} was not reached: {type(error).__name__}: {error}") from error
    async with response:
        if response.status != 200:
            text = (await _read(response)).decode(errors="replace")
            raise UpstreamError(f"{url} answered {response.status}: {text[:500]}", _status(response.status))
        yield response


def _status(status: int) -> int:
    """Refusals of the request (4xx) are the client's to see; faults of a replica are a bad gateway."""
    return status if 400 <= status < 500 else 502


async def _read(response: aiohttp.ClientResponse) -> bytes:
    return b"".join([chunk async for chunk in _chunks(response)])


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except aiohttp.ClientError as error:
        raise UpstreamError(f"{response.url} broke off: {type(error).__name__}: {error}") from error


async def call(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, object],
    reply: type[Reply],
    timeout_s: float | None = None,
) -> Reply:
    """The parsed answer to `body`; raises `UpstreamError`."""
    try:
        async with asyncio.timeout(timeout_s), posted(session, url, body) as response:
            text = await _read(response)
        return reply.model_validate_json(text)
    except TimeoutError as error:
        raise UpstreamError(f"{url} gave no answer in {timeout_s} s", 504) from error
    except ValidationError as error:
        raise UpstreamError(f"{url} answered what is no {reply.__name__}: {text[:300]!r}") from error


async def uninterrupted(work: Coroutine[None, None, Result]) -> Result:
    """The result of `work`, which runs to its end even where the caller is cancelled meanwhile (then that goes on).

    A slot action cannot be called back: whoever asked for it must see its end before slot or file are reused.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


@dataclass(frozen=True, kw_only=True)
class Relayed:
    """A response passed on in full; `first_at` is when its first bytes came, in seconds of `time.perf_counter`."""

    response: web.StreamResponse
    tail: bytes
    first_at: float | None


async def relay(
    upstream: aiohttp.ClientResponse, request: web.Request, begun: Callable[[], None] | None = None
) -> Relayed:
    """Pass `upstream` on as it comes; `begun` is called when the first bytes have come, before they are passed on.

    Raises `BrokenStreamError` where the replica breaks off; the client then has an error event and no `[DONE]`.
    """
    response = web.StreamResponse(headers={"Content-Type": upstream.headers.get("Content-Type", "application/json")})
    await response.prepare(request)
    tail, first_at = b"", None
    try:
        async for chunk in _chunks(upstream):
            if first_at is None:
                first_at = time.perf_counter()
                if begun is not None:
                    begun()
            await response.write(chunk)
            tail = (tail + chunk)[-TAIL_BYTES:]
    except UpstreamError as error:
        event = json.dumps({"error": {"code": error.status, "message": str(error)}})
        await response.write(f"data: {event}\n\n".encode())
        raise BrokenStreamError(str(error), response) from error
    await response.write_eof()
    return Relayed(response=response, tail=tail, first_at=first_at)
