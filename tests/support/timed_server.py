"""A local OpenAI-compatible server of known timing: the ruler that load clients are held against.

Request k gets its first token `ttft_ms` after the server has read it, and each next one `itl_ms` later. The deadlines
are absolute (a late token does not delay those that follow) and every write is recorded, so that a test compares a
client with what really happened on a loaded machine and not with what was asked for. Times are nanoseconds of
`time.monotonic_ns`, which all processes of a Linux machine share.

`python tests/support/timed_server.py --ttft-ms 50 --itl-ms 10` prints `ready <port>` when it listens. It serves
`POST /v1/completions` (streamed, token-id prompts), `GET /health`, `GET /truth` (JSON list of `Truth`, in the order
received) and `POST /reset` (forgets the truth).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import selectors
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum


class Fault(StrEnum):
    """What the server does to every `fault_every`-th request instead of answering it well."""

    NONE = "none"
    HTTP_500 = "http_500"  # an error status with a JSON body
    DROP = "drop"  # half of the tokens, then the connection is reset
    CUT = "cut"  # half of the tokens, then a well-formed end without [DONE]
    GARBAGE = "garbage"  # an event that is no JSON
    ERROR_EVENT = "error_event"  # an error object inside the stream
    STALL = "stall"  # half of the tokens, then silence
    SILENT = "silent"  # reads the request and never answers
    EMPTY = "empty"  # a well-formed stream without a token


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Timing and faults. `jitter` is the share of `itl_ms` by which each token may be early or late (seeded).

    `tokens_per_event` packs tokens into one event, `usage` tells whether token counts end the stream, `keep_alive`
    whether the server leaves connections open, and `split` writes every event in two pieces.
    """

    ttft_ms: float = 50.0
    itl_ms: float = 10.0
    jitter: float = 0.0
    seed: int = 0
    fault: Fault = Fault.NONE
    fault_every: int = 1
    tokens_per_event: int = 1
    usage: bool = True
    keep_alive: bool = True
    split: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.jitter < 0.5, f"jitter={self.jitter} must be in [0, 0.5): tokens keep their order"
        assert self.fault_every >= 1, f"fault_every={self.fault_every} must be at least 1"


@dataclass(kw_only=True)
class Truth:
    """What happened to one request: when it had been read, when each token event was written, how it ended."""

    request_id: str
    received_ns: int
    prompt_tokens: int
    max_tokens: int
    prompt: list[int]
    authorization: str
    token_ns: list[int] = field(default_factory=list)
    end_ns: int = 0
    fault: str = Fault.NONE


def _event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return _sse(json.dumps({"id": "cmpl-0", "object": "text_completion", "model": "timed", "choices": [choice]}))


def _sse(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_TOKEN = _chunk(_event(" tok"))


def _plain(status: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    )
    return head.encode() + b"\r\n" + body


class _State:
    """What the connections of one server share."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.random = random.Random(behaviour.seed)
        self.truths: list[Truth] = []
        self.streams = 0

    def next_fault(self) -> Fault:
        self.streams += 1
        return self.behaviour.fault if self.streams % self.behaviour.fault_every == 0 else Fault.NONE

    def offsets_s(self, events: int) -> list[float]:
        """When each token event is due after the first, in seconds: jittered about the schedule, not summed up."""
        step_s = self.behaviour.itl_ms * self.behaviour.tokens_per_event / 1e3
        jitter = self.behaviour.jitter
        return [(index + (self.random.uniform(-jitter, jitter) if index else 0.0)) * step_s for index in range(events)]


class _Connection(asyncio.Protocol):
    """One request and its answer, timed by the loop's timers."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode().split("\r\n")
        headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
        if len(body) >= int(headers.get("content-length", "0")):
            self._buffer = b""
            self._answer(lines[0].split(" ")[:2], headers, body, now)

    def _answer(self, route: list[str], headers: dict[str, str], body: bytes, now: int) -> None:
        if route == ["POST", "/v1/completions"]:
            self._complete(json.loads(body), headers, now)
        elif route == ["GET", "/truth"]:
            self._end(_plain("200 OK", json.dumps([asdict(truth) for truth in self._state.truths]).encode()))
        elif route == ["POST", "/reset"]:
            self._state.truths.clear()
            self._end(_plain("200 OK", b"{}"))
        elif route == ["GET", "/health"]:
            self._end(_plain("200 OK", b"{}"))
        else:
            self._end(_plain("404 Not Found", b'{"error": {"message": "no such route"}}'))

    def _complete(self, request: dict[str, object], headers: dict[str, str], now: int) -> None:
        problem = _problem_of(request)
        if problem:
            self._end(_plain("400 Bad Request", json.dumps({"error": {"message": problem}}).encode()))
            return
        prompt, max_tokens = request["prompt"], request["max_tokens"]
        assert isinstance(prompt, list)
        assert isinstance(max_tokens, int)
        truth = Truth(
            request_id=headers.get("x-request-id", ""),
            received_ns=now,
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            prompt=prompt,
            authorization=headers.get("authorization", ""),
        )
        self._state.truths.append(truth)
        self._stream(truth, self._state.next_fault())

    def _stream(self, truth: Truth, fault: Fault) -> None:
        behaviour = self._state.behaviour
        truth.fault = fault
        if fault is Fault.HTTP_500:
            truth.end_ns = time.monotonic_ns()
            self._end(_plain("500 Internal Server Error", b'{"error": {"message": "injected failure"}}'))
        elif fault is not Fault.SILENT:
            events = -(-truth.max_tokens // behaviour.tokens_per_event)
            whole = fault in {Fault.NONE, Fault.GARBAGE, Fault.ERROR_EVENT}
            events = events if whole else 0 if fault is Fault.EMPTY else events // 2
            self._start(truth, fault, events)

    def _start(self, truth: Truth, fault: Fault, events: int) -> None:
        """Set the timer of the first token event; each sets that of the next. The end comes with the last of them."""
        start_s = truth.received_ns / 1e9 + self._state.behaviour.ttft_ms / 1e3
        deadlines = iter([start_s + offset_s for offset_s in self._state.offsets_s(events)])
        if events:
            self._at(next(deadlines), self._token, truth, fault, deadlines)
        else:
            self._at(start_s, self._finish, truth, fault)

    def _at(self, deadline_s: float, callback: Callable[..., None], *arguments: object) -> None:
        self._timer = asyncio.get_running_loop().call_at(deadline_s, callback, *arguments)

    def _token(self, truth: Truth, fault: Fault, deadlines: Iterator[float]) -> None:
        assert self._transport is not None
        data = _TOKEN if truth.token_ns else _HEAD + _TOKEN
        truth.token_ns.append(time.monotonic_ns())
        half = len(data) // 2 if self._state.behaviour.split else len(data)
        self._transport.write(data[:half])
        self._transport.write(data[half:])
        deadline_s = next(deadlines, None)
        if deadline_s is None:
            self._finish(truth, fault)
        else:
            self._at(deadline_s, self._token, truth, fault, deadlines)

    def _finish(self, truth: Truth, fault: Fault) -> None:
        assert self._transport is not None
        truth.end_ns = time.monotonic_ns()
        if fault is Fault.DROP:
            self._transport.abort()
        elif fault is Fault.CUT:
            self._end(_chunk(b""))
        elif fault is Fault.GARBAGE:
            self._end(_chunk(_sse("{not json")) + _chunk(b""))
        elif fault is Fault.ERROR_EVENT:
            self._end(_chunk(_sse('{"error": {"message": "injected failure in the stream"}}')) + _chunk(b""))
        elif fault is Fault.EMPTY:
            self._end(_HEAD + _chunk(_sse("[DONE]")) + _chunk(b""))
        elif fault is Fault.NONE:
            self._end(b"".join(_chunk(event) for event in self._last_events(truth)) + _chunk(b""))

    def _last_events(self, truth: Truth) -> list[bytes]:
        counts = {"prompt_tokens": truth.prompt_tokens, "completion_tokens": truth.max_tokens}
        usage = [_sse(json.dumps({"choices": [], "usage": counts}))] if self._state.behaviour.usage else []
        return [_event("", finish="length"), *usage, _sse("[DONE]")]

    def _end(self, data: bytes) -> None:
        """Write the last bytes of an answer; the next request on this connection starts anew."""
        assert self._transport is not None
        self._transport.write(data)
        if not self._state.behaviour.keep_alive:
            self._transport.close()


def _problem_of(request: dict[str, object]) -> str | None:
    """Why `request` is not what a load client must send, None where it is."""
    prompt = request.get("prompt")
    wanted = {"stream": True, "ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True}}
    wrong = [key for key, value in wanted.items() if request.get(key) != value]
    if wrong:
        return f"{wrong[0]} must be {wanted[wrong[0]]!r}"
    if not (isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt)):
        return "prompt must be a list of token ids"
    return None if isinstance(request.get("max_tokens"), int) else "max_tokens must be a number"


async def _serve(behaviour: Behaviour, port: int) -> None:
    state = _State(behaviour)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(state), "127.0.0.1", port, backlog=1024)
    print(f"ready {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def serve(behaviour: Behaviour, port: int = 0) -> None:
    """Serve until the process is ended.

    The loop waits in select(), whose timeouts have microseconds; epoll's have milliseconds and would make every token
    up to one millisecond late.
    """
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve(behaviour, port))


class TimedServer:
    """A running server, seen from the test: its URL and what it recorded."""

    def __init__(self, url: str) -> None:
        self.url = url

    def truths(self) -> list[Truth]:
        """What happened to each request so far, in the order received."""
        with urllib.request.urlopen(f"{self.url}/truth", timeout=30) as reply:  # noqa: S310 - our own http URL
            return [Truth(**item) for item in json.load(reply)]

    def reset(self) -> None:
        """Forget what happened so far."""
        request = urllib.request.Request(f"{self.url}/reset", data=b"{}")  # noqa: S310 - our own http URL
        urllib.request.urlopen(request, timeout=30).close()  # noqa: S310 - our own http URL


@contextmanager
def timed_server(behaviour: Behaviour | None = None) -> Iterator[TimedServer]:
    """A server in a process of its own on a free port, ended on leaving."""
    argv = [sys.executable, __file__, *_arguments(behaviour or Behaviour())]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert line[:1] == ["ready"], f"the timed server did not start: {line}"
        yield TimedServer(f"http://127.0.0.1:{line[1]}")
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _arguments(behaviour: Behaviour) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in asdict(behaviour).items()]


def _parse(argv: list[str] | None = None) -> tuple[Behaviour, int]:
    parser = argparse.ArgumentParser(description="OpenAI-compatible server of known timing")
    default = asdict(Behaviour())
    for key, value in default.items():
        kind = (lambda text: text == "True") if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, default=value)
    parser.add_argument("--port", type=int, default=0)
    values = vars(parser.parse_args(argv))
    port = values.pop("port")
    return Behaviour(**values), port


if __name__ == "__main__":
    serve(*_parse())
