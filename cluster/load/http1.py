"""Reading a streamed HTTP/1.1 response piece by piece, and the server-sent events inside it. No I/O here.

The load client stamps bytes where the event loop hands them over, before anything looks at them; a client library
hands them on through queues and tasks of its own, which costs it accuracy when many streams arrive at once (see
`benchmarks/client_accuracy.py --compare`). HTTP itself is read by httptools (llhttp).
"""

from __future__ import annotations

import httptools

_HEAD_LIMIT_BYTES = 64 * 1024


class MalformedResponseError(Exception):
    """The server's bytes are no HTTP/1.1 response."""


class ResponseDecoder:
    """Decodes one response: `feed` takes bytes as they come and returns the body bytes in them.

    `status` is 0 until the head has been read (interim responses are passed over); `done` says that the body is
    complete; `reusable` that the connection may carry another request afterwards.
    """

    def __init__(self) -> None:
        self.status = 0
        self.done = False
        self.reusable = False
        self._has_length = False
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """Body bytes in `data`; raises `MalformedResponseError`."""
        if self.done:
            return b""
        self._body.clear()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self.done:  # what follows a complete response is not ours to read
                raise MalformedResponseError(f"{data[:80]!r} is no HTTP/1.1 response: {error}") from error
        if not self.status:
            self._limit_head(len(data))
        return self._body[0] if len(self._body) == 1 else b"".join(self._body)

    def close(self) -> None:
        """The peer closed: ends a body without length, and one that had ended already."""
        if self.status and not self._has_length:
            self.done = True

    def _limit_head(self, added: int) -> None:
        self._head_bytes += added
        if self._head_bytes > _HEAD_LIMIT_BYTES:
            raise MalformedResponseError(f"the head of the response is longer than {_HEAD_LIMIT_BYTES} bytes")

    def on_header(self, name: bytes, _value: bytes) -> None:
        """Called by the parser for each header."""
        self._has_length = self._has_length or name.lower() in {b"content-length", b"transfer-encoding"}

    def on_headers_complete(self) -> None:
        """Called by the parser at the end of a head."""
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status

    def on_body(self, body: bytes) -> None:
        """Called by the parser for each piece of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Called by the parser at the end of a response."""
        if self.status:
            self.done = True
            self.reusable = self._parser.should_keep_alive()


class EventParser:
    """Splits a body into the `data` of server-sent events: `feed` takes bytes and returns the events they complete."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """Data of each event that ends in `body`."""
        *lines, self._buffer = (self._buffer + body).split(b"\n")
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
