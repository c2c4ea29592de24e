"""Reading a streamed HTTP/1.1 response piece by piece, and the server-sent events inside it. No I/O here.

The load client stamps bytes where the event loop hands them over, before anything looks at them; a client library
hands them on through queues and tasks of its own, which costs it accuracy when many streams arrive at once.
"""

from __future__ import annotations

from enum import Enum, auto

_HEAD_LIMIT_BYTES = 64 * 1024


class MalformedResponseError(Exception):
    """The server's bytes are no HTTP/1.1 response."""


class _State(Enum):
    HEAD = auto()
    CHUNK_SIZE = auto()
    CHUNK_DATA = auto()
    CHUNK_END = auto()
    TRAILER = auto()
    LENGTH = auto()
    UNTIL_CLOSE = auto()
    DONE = auto()


class ResponseDecoder:
    """Decodes one response: `feed` takes bytes as they come and returns the body bytes in them.

    `status` is 0 until the head has been read; `done` says that the body is complete; `reusable` that the connection
    may carry another request afterwards.
    """

    def __init__(self) -> None:
        self.status = 0
        self.reusable = True
        self._state = _State.HEAD
        self._buffer = b""
        self._left = 0

    @property
    def done(self) -> bool:
        """True when the whole body has been read."""
        return self._state is _State.DONE

    def feed(self, data: bytes) -> bytes:
        """Body bytes in `data`; raises `MalformedResponseError`."""
        self._buffer += data
        body = []
        while self._buffer and self._state is not _State.DONE:
            before = len(self._buffer), self._state
            body.append(self._step())
            if (len(self._buffer), self._state) == before:
                break  # more bytes are needed
        return body[0] if len(body) == 1 else b"".join(body)

    def close(self) -> None:
        """The peer closed: ends a body without length, and one that had ended already."""
        if self._state is _State.UNTIL_CLOSE:
            self._state = _State.DONE

    def _step(self) -> bytes:
        match self._state:
            case _State.CHUNK_DATA | _State.LENGTH:
                return self._take_counted()
            case _State.UNTIL_CLOSE:
                body, self._buffer = self._buffer, b""
                return body
            case _State.HEAD:
                self._read_head()
            case _:
                self._read_line()
        return b""

    def _take_counted(self) -> bytes:
        body, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        self._left -= len(body)
        if self._left == 0:
            self._state = _State.CHUNK_END if self._state is _State.CHUNK_DATA else _State.DONE
        return body

    def _read_line(self) -> None:
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            if len(line) > _HEAD_LIMIT_BYTES:
                raise MalformedResponseError(f"a line of the response is longer than {_HEAD_LIMIT_BYTES} bytes")
            return
        self._buffer = rest
        if self._state is _State.CHUNK_SIZE:
            self._left = _chunk_size(line)
            self._state = _State.CHUNK_DATA if self._left else _State.TRAILER
        elif self._state is _State.CHUNK_END:
            self._state = _State.CHUNK_SIZE
        elif not line:  # the empty line after the trailers
            self._state = _State.DONE

    def _read_head(self) -> None:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            if len(head) > _HEAD_LIMIT_BYTES:
                raise MalformedResponseError(f"the head of the response is longer than {_HEAD_LIMIT_BYTES} bytes")
            return
        self._buffer = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = _status(first)
        if self.status < 200:  # an interim response; the real one follows
            self.status = 0
            return
        pairs = (line.partition(":") for line in lines)
        self._choose_body({name.strip().lower(): value.strip().lower() for name, _, value in pairs}, first)

    def _choose_body(self, headers: dict[str, str], status_line: str) -> None:
        keeps = "keep-alive" in headers.get("connection", "") or status_line.startswith("HTTP/1.1")
        self.reusable = keeps and "close" not in headers.get("connection", "")
        if "chunked" in headers.get("transfer-encoding", ""):
            self._state = _State.CHUNK_SIZE
        elif "content-length" in headers:
            self._left = _content_length(headers["content-length"])
            self._state = _State.LENGTH if self._left else _State.DONE
        else:
            self.reusable = False
            self._state = _State.UNTIL_CLOSE


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


def _status(line: str) -> int:
    parts = line.split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit():
        raise MalformedResponseError(f"{line[:80]!r} is no HTTP/1.1 status line")
    return int(parts[1])


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.split(b";", 1)[0], 16)
    except ValueError as error:
        raise MalformedResponseError(f"{line[:80]!r} is no chunk size") from error


def _content_length(text: str) -> int:
    if not text.isdigit():
        raise MalformedResponseError(f"{text[:80]!r} is no content length")
    return int(text)
