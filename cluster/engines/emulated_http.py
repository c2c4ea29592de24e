"""A small HTTP/1.1 server for the emulated engine, over httptools.

An answer of thousands of tokens a second must cost next to nothing here, since many replicas share a laptop with the
load client, and a process must be up at once: a framework takes several times the processor time for each token and
half of the start. One request at a time goes over a connection, which stays open.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

import httptools

LARGEST_REQUEST_BYTES = 64 * 2**20
JSON, TEXT, EVENTS = "application/json", "text/plain; version=0.0.4", "text/event-stream"


class RefusedError(Exception):
    """A request that is answered with `status` and an error object."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request; header names are in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    keeps_open: bool


class Reply:
    """The way back to the client. Every answer is whole (`send`) or streamed (`begin`, `write`, `end`)."""

    def __init__(self, transport: asyncio.WriteTransport, *, keeps_open: bool) -> None:
        self.keeps_open = keeps_open
        self.begun = False
        self._transport = transport

    def send(self, status: int, body: bytes, content_type: str = JSON) -> None:
        """A whole answer."""
        self._head(status, content_type, f"Content-Length: {len(body)}")
        self._transport.write(body)

    def send_json(self, status: int, tree: object) -> None:
        """A whole answer in JSON."""
        self.send(status, json.dumps(tree).encode())

    def send_error(self, error: RefusedError) -> None:
        """The refusal in OpenAI's form, unless the answer was begun."""
        if not self.begun:
            self.send_json(error.status, {"error": {"code": error.status, "message": str(error)}})

    def begin(self) -> None:
        """The head of a stream of events."""
        self._head(200, EVENTS, "Transfer-Encoding: chunked")

    def write(self, data: bytes) -> None:
        """A piece of the stream."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        """The end of the stream."""
        self._transport.write(b"0\r\n\r\n")

    def abort(self) -> None:
        """Break the connection off."""
        self._transport.abort()

    def _head(self, status: int, content_type: str, length: str) -> None:
        self.begun = True
        lines = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"Content-Type: {content_type}",
            length,
            f"Connection: {'keep-alive' if self.keeps_open else 'close'}",
        )
        self._transport.write(("\r\n".join(lines) + "\r\n\r\n").encode())


Handler = Callable[[Request, Reply], Awaitable[None]]


class Connection(asyncio.Protocol):
    """Reads requests one after the other and has `handler` answer them; a client that leaves cancels it."""

    def __init__(self, handler: Handler, api_key: str | None, members: set[Connection]) -> None:
        self._handler, self._api_key, self._members = handler, api_key, members
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._last = False
        self._queue: deque[Request] = deque()
        self._reader = _Reader(self._queue)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client has connected."""
        if isinstance(transport, asyncio.Transport):  # always: the loop makes no other kind for a stream socket
            self._transport = transport
            self._members.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._transport is None:
            return
        try:
            self._reader.feed(data)
        except RefusedError as error:
            Reply(self._transport, keeps_open=False).send_error(error)
            self._transport.close()
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or was sent away."""
        del exc
        self._members.discard(self)
        if self._task is not None:
            self._task.cancel()

    def abort_when_idle(self) -> None:
        """Close the connection, once the request that is being answered has its answer."""
        self._last = True
        if self._task is None and self._transport is not None:
            self._transport.abort()

    def _next(self) -> None:
        if self._task is not None or not self._queue or self._transport is None:
            return
        request = self._queue.popleft()
        reply = Reply(self._transport, keeps_open=request.keeps_open)
        self._task = asyncio.get_running_loop().create_task(self._answer(request, reply))
        self._task.add_done_callback(lambda task: self._answered(task, reply))

    async def _answer(self, request: Request, reply: Reply) -> None:
        try:
            self._check_key(request)
            await self._handler(request, reply)
        except RefusedError as error:
            reply.send_error(error)

    def _answered(self, task: asyncio.Task[None], reply: Reply) -> None:
        self._task = None
        if self._transport is None or task.cancelled():
            return
        if task.exception() is not None:  # a bug: the loop's handler prints it when the task goes
            asyncio.get_running_loop().call_exception_handler({"message": "request failed", "task": task})
            self._transport.abort()
        elif self._last or not reply.keeps_open:
            self._transport.close()
        else:
            self._next()

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._api_key is None or request.path == "/health":
            return
        if not hmac.compare_digest(given.encode(), self._api_key.encode()):
            raise RefusedError(401, "the bearer token is missing or wrong")


class _Reader:
    """Takes bytes apart into requests, which it puts into `queue`. Its public methods are the parser's callbacks."""

    def __init__(self, queue: deque[Request]) -> None:
        self._queue = queue
        self._parser = httptools.HttpRequestParser(self)
        self.on_message_begin()

    def feed(self, data: bytes) -> None:
        """Bytes from the client; raises `RefusedError`."""
        self._bytes += len(data)
        if self._bytes > LARGEST_REQUEST_BYTES:
            raise RefusedError(413, f"a request is larger than {LARGEST_REQUEST_BYTES} bytes")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise RefusedError(400, f"this is no HTTP request: {error}") from error

    def on_message_begin(self) -> None:
        """A request begins."""
        self._bytes = 0
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        """A part of its target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        target = urlsplit(self._url.decode("latin-1"))
        request = Request(
            method=self._parser.get_method().decode(),
            path=target.path,
            query={name: values[-1] for name, values in parse_qs(target.query).items()},
            headers=self._headers,
            body=b"".join(self._body),
            keeps_open=self._parser.should_keep_alive(),
        )
        self._queue.append(request)
