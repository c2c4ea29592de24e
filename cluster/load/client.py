"""A streaming client for `POST /v1/completions` that is a measuring instrument first.

Every piece of an answer is stamped in the event loop's read callback, before it is decoded. Connections are kept open,
as those of a gateway are, so that many requests at once do not measure the cost of connecting. A connection that the
server closed while it was idle may take one more try on a new one, provided that not a byte of an answer had come; the
request's clock runs on. A server that closes after a single answer without having said so (llama.cpp's does) gets a new
connection for each request from then on. Everything else that goes wrong is an error of the request.

Plain asyncio and not aiohttp: on a busy machine, against a server of known timing, a short aiohttp client with a
connection for each request added 7 ms to the median TTFT of 16 streams in step and 46 ms to that of 64; this one added
0.3 ms and 2 ms (`python benchmarks/client_accuracy.py --compare`).
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.load.http1 import EventParser, MalformedResponseError, ResponseDecoder
from cluster.load.timings import ErrorClass
from search_spaces.errors import require

CONNECT_LIMIT_S = 10.0
IDLE_LIMIT_NS = 2_000_000_000
"""An idle connection older than this is not used again; servers commonly close theirs after 5 s."""
_ERROR_TEXT_LIMIT = 500


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where requests go. `base_url` is the server's, with or without a trailing `/v1`."""

    base_url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        require(
            parts.scheme in {"http", "https"} and bool(parts.hostname),
            f"url={self.base_url!r} is no HTTP address; give one such as http://127.0.0.1:8000",
        )

    @property
    def host(self) -> str:
        """Host to connect to."""
        return urlsplit(self.base_url).hostname or ""

    @property
    def port(self) -> int:
        """Port to connect to."""
        return urlsplit(self.base_url).port or (443 if self.is_tls else 80)

    @property
    def is_tls(self) -> bool:
        """True for https."""
        return urlsplit(self.base_url).scheme == "https"

    def head(self) -> bytes:
        """The head of a completion request, up to the headers that differ between requests."""
        path = urlsplit(self.base_url).path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join(lines).encode() + b"\r\n"


def completion_body(model_name: str, prompt: list[int], output_tokens: int) -> bytes:
    """JSON body of a streamed completion of exactly `output_tokens` tokens."""
    body = {
        "model": model_name,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body, separators=(",", ":")).encode()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for one request. Times are `time.monotonic_ns`; `usage` holds the server's token counts."""

    sent_ns: int
    connect_ns: int
    token_ns: tuple[int, ...]
    end_ns: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    resent: bool = False
    error: ErrorClass | None = None
    error_text: str = ""


class Exchange:
    """The answer to one request as it comes in; `ended` is set when it is complete or has failed."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.token_ns: list[int] = []
        self.end_ns = 0
        self.usage: Mapping[str, object] = {}
        self.error: ErrorClass | None = None
        self.error_text = ""
        self.untouched = True
        self._decoder = ResponseDecoder()
        self._events = EventParser()
        self._error_body = b""
        self._finished = False  # a finish_reason or [DONE] has come
        self._empty_finish_ns = 0  # the event with the finish_reason carried no text

    @property
    def reusable(self) -> bool:
        """True where the connection may carry another request."""
        return self._decoder.done and self._decoder.reusable and self.error in {None, ErrorClass.STATUS}

    def received(self, data: bytes, now_ns: int) -> None:
        """Bytes of the answer, read at `now_ns`."""
        self.untouched = False
        try:
            body = self._decoder.feed(data)
            if self._decoder.status == 200:
                for event in self._events.feed(body):
                    self._take(event, now_ns)
            else:
                self._error_body = (self._error_body + body)[:_ERROR_TEXT_LIMIT]
        except MalformedResponseError as error:
            self.fail(ErrorClass.STREAM, str(error), now_ns)
        if self._decoder.done and not self.ended.is_set():
            self._conclude(now_ns)

    def closed(self, cause: Exception | None, now_ns: int) -> None:
        """The connection was closed by the server, or broke for `cause`."""
        self._decoder.close()
        if self._decoder.done:
            self._conclude(now_ns)
        else:
            reason = f": {cause}" if cause else ""
            self.fail(ErrorClass.STREAM, f"the connection closed after {len(self.token_ns)} tokens{reason}", now_ns)

    def fail(self, error: ErrorClass, text: str, now_ns: int) -> None:
        """End with `error`, unless the exchange has ended."""
        if not self.ended.is_set():
            self.error, self.error_text = error, text[:_ERROR_TEXT_LIMIT]
            self.end_ns = now_ns
            self.ended.set()

    def _take(self, event: bytes, now_ns: int) -> None:
        if event == b"[DONE]":
            self._finished = True
            return
        try:
            data = json.loads(event)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            self.fail(ErrorClass.STREAM, f"an event is no JSON object: {event[:200]!r}", now_ns)
        elif "error" in data:
            self.fail(ErrorClass.STREAM, f"the stream held an error: {data['error']}", now_ns)
        else:
            self._take_completion(data, now_ns)

    def _take_completion(self, data: Mapping[str, object], now_ns: int) -> None:
        """Stamp an event that carries tokens.

        A token may have no text of its own (a part of a character), so an event counts whether it has text or not; but
        the event with the `finish_reason` is a token with some engines and a mere end with others: without text it
        counts only if the server's token count is one above the events that came before.
        """
        usage = data.get("usage")
        if isinstance(usage, dict):
            self.usage = usage
        choices = data.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            return
        self._finished = self._finished or choices[0].get("finish_reason") is not None
        if choices[0].get("finish_reason") is None or choices[0].get("text"):
            self.token_ns.append(now_ns)
        else:
            self._empty_finish_ns = now_ns

    def _conclude(self, now_ns: int) -> None:
        if self._decoder.status != 200:
            text = self._error_body.decode(errors="replace")
            self.fail(ErrorClass.STATUS, f"status {self._decoder.status}: {text}", now_ns)
            return
        if not self._finished:
            self.fail(ErrorClass.STREAM, f"the stream ended after {len(self.token_ns)} tokens without [DONE]", now_ns)
        counted = _count(self.usage, "completion_tokens")
        if self._empty_finish_ns and counted == len(self.token_ns) + 1:
            self.token_ns.append(self._empty_finish_ns)
        if not self.token_ns:
            self.fail(ErrorClass.STREAM, "the stream ended without a token", now_ns)
        if not self.ended.is_set():
            self.end_ns = now_ns
            self.ended.set()


class _Connection(asyncio.Protocol):
    """One open connection, which carries one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.idle_since_ns = 0
        self.carried = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):  # always: the loop makes no other kind for a stream socket
            self.transport = transport

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        if self.exchange is not None:
            self.exchange.received(data, now_ns)

    def eof_received(self) -> None:
        """The server will send no more: let the transport close."""

    def connection_lost(self, exc: Exception | None) -> None:
        now_ns = time.monotonic_ns()
        self.transport = None
        if self.exchange is not None:
            self.exchange.closed(exc, now_ns)

    @property
    def is_open(self) -> bool:
        """True while a request can be written."""
        return self.transport is not None and not self.transport.is_closing()

    def send(self, request: bytes, exchange: Exchange) -> None:
        """Write `request`; its answer goes to `exchange`."""
        self.carried += 1
        self.exchange = exchange
        if self.transport is None:
            exchange.closed(None, time.monotonic_ns())
        else:
            self.transport.write(request)

    def abort(self) -> None:
        """Close at once, whatever is in flight."""
        if self.transport is not None:
            self.transport.abort()


class StreamingClient:
    """Sends completions to one endpoint and times their answers. Belongs to one event loop."""

    def __init__(self, endpoint: Endpoint, request_limit_s: float) -> None:
        self._endpoint = endpoint
        self._limit_s = request_limit_s
        self._head = endpoint.head()
        self._tls = ssl.create_default_context() if endpoint.is_tls else None
        self._run_id = uuid.uuid4().hex[:8]
        self._idle: list[_Connection] = []
        self._in_flight: set[Exchange] = set()
        self._connecting: set[asyncio.Task[_Connection]] = set()
        self._abandoned = False
        self._keeps_open = True

    async def complete(self, body: bytes, index: int) -> Answer:
        """Send `body` as request number `index` and wait for its answer; faults are in the answer, never raised."""
        sent_ns = time.monotonic_ns()
        deadline_s = asyncio.get_running_loop().time() + self._limit_s
        request = self._head + f"X-Request-Id: {self._run_id}-{index}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        idle = self._take_idle()
        if idle is not None:
            exchange = await self._carry(idle, request + body, deadline_s)
            if not (exchange.untouched and exchange.error is ErrorClass.STREAM):
                return _answer(exchange, sent_ns)
            self._keeps_open = self._keeps_open and idle.carried > 2
        connection = await self._connect()
        connect_ns = time.monotonic_ns() - sent_ns
        if isinstance(connection, _Connection):
            exchange = await self._carry(connection, request + body, deadline_s)
        else:
            exchange = Exchange()
            exchange.fail(*connection, time.monotonic_ns())
        return _answer(exchange, sent_ns, connect_ns, resent=idle is not None)

    def abandon(self) -> None:
        """End everything in flight; its answers are marked as abandoned."""
        self._abandoned = True
        for exchange in self._in_flight:
            exchange.fail(ErrorClass.ABANDONED, "in flight when the run ended", time.monotonic_ns())
        for task in self._connecting:
            task.cancel()

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    async def _carry(self, connection: _Connection, request: bytes, deadline_s: float) -> Exchange:
        """Write `request` and wait until its exchange has ended; keep the connection where that is sound."""
        exchange = Exchange()
        self._in_flight.add(exchange)
        timer = asyncio.get_running_loop().call_at(deadline_s, self._time_out, exchange)
        connection.send(request, exchange)
        await exchange.ended.wait()
        timer.cancel()
        self._in_flight.discard(exchange)
        connection.exchange = None
        if exchange.reusable and self._keeps_open and not self._abandoned:
            connection.idle_since_ns = time.monotonic_ns()
            self._idle.append(connection)
        else:
            connection.abort()
        return exchange

    def _time_out(self, exchange: Exchange) -> None:
        text = f"{len(exchange.token_ns)} tokens came within the limit of {self._limit_s:g} s for a request"
        exchange.fail(ErrorClass.TIMEOUT, text, time.monotonic_ns())

    def _take_idle(self) -> _Connection | None:
        """The connection used last, or None; drops those that are closed or old."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and time.monotonic_ns() - connection.idle_since_ns < IDLE_LIMIT_NS:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection | tuple[ErrorClass, str]:
        """A new connection, or why there is none."""
        task = asyncio.get_running_loop().create_task(self._open())
        self._connecting.add(task)
        await asyncio.wait({task}, timeout=CONNECT_LIMIT_S)
        self._connecting.discard(task)
        where = f"{self._endpoint.host}:{self._endpoint.port}"
        if not task.done():
            task.cancel()
            return ErrorClass.CONNECT, f"no connection to {where} within {CONNECT_LIMIT_S:g} s"
        if task.cancelled():
            return ErrorClass.ABANDONED, "connecting when the run ended"
        cause = task.exception()
        return task.result() if cause is None else (ErrorClass.CONNECT, f"no connection to {where}: {cause}")

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._endpoint.host, self._endpoint.port, ssl=self._tls
        )
        return connection


def _answer(exchange: Exchange, sent_ns: int, connect_ns: int = 0, *, resent: bool = False) -> Answer:
    return Answer(
        sent_ns=sent_ns,
        connect_ns=connect_ns,
        token_ns=tuple(exchange.token_ns),
        end_ns=exchange.end_ns,
        prompt_tokens=_count(exchange.usage, "prompt_tokens"),
        completion_tokens=_count(exchange.usage, "completion_tokens"),
        resent=resent,
        error=exchange.error,
        error_text=exchange.error_text,
    )


def _count(usage: Mapping[str, object], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) else None
