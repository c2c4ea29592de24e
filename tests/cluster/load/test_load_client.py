"""The client against real servers: what it sends, what it records, and every way in which an answer can go wrong."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from cluster.load.client import Answer, Endpoint, StreamingClient, completion_body
from cluster.load.timings import ErrorClass
from search_spaces.errors import InvalidValueError
from tests.support.timed_server import Behaviour, Fault, timed_server

pytestmark = pytest.mark.timing

BODY = completion_body("m", [5, 6, 7], 8)
QUICK = Behaviour(ttft_ms=5, itl_ms=2)


async def complete(url: str, count: int = 1, limit_s: float = 5.0) -> list[Answer]:
    client = StreamingClient(Endpoint(base_url=url), limit_s)
    answers = [await client.complete(BODY, index) for index in range(count)]
    client.close()
    return answers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_request_is_sent_as_documented_and_its_answer_counted() -> None:
    with timed_server(QUICK) as server:
        client = StreamingClient(Endpoint(base_url=f"{server.url}/v1/", api_key="secret"), 5.0)
        answer = await client.complete(BODY, 3)
        client.close()
        (truth,) = server.truths()
    assert truth.prompt == [5, 6, 7]
    assert truth.max_tokens == 8
    assert truth.authorization == "Bearer secret"
    assert truth.request_id.endswith("-3")
    assert answer.error is None
    assert (answer.prompt_tokens, answer.completion_tokens, len(answer.token_ns)) == (3, 8, 8)


async def test_stamps_lie_between_the_servers_writes_and_are_in_order() -> None:
    with timed_server(Behaviour(ttft_ms=30, itl_ms=20)) as server:
        (answer,) = await complete(server.url)
        (truth,) = server.truths()
    assert answer.sent_ns < truth.received_ns
    assert all(read > written for read, written in zip(answer.token_ns, truth.token_ns, strict=True))
    assert list(answer.token_ns) == sorted(answer.token_ns)
    assert answer.end_ns >= answer.token_ns[-1]


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(ttft_ms=5, itl_ms=2, split=True),
        Behaviour(ttft_ms=5, itl_ms=2, usage=False),
        Behaviour(ttft_ms=5, itl_ms=2, keep_alive=False),
    ],
    ids=["events in pieces", "no usage", "no keep-alive"],
)
async def test_servers_differ_in_manner_and_not_in_what_is_read(behaviour: Behaviour) -> None:
    with timed_server(behaviour) as server:
        answers = await complete(server.url, count=3)
    assert [answer.error for answer in answers] == [None] * 3
    assert [len(answer.token_ns) for answer in answers] == [8] * 3
    assert {answer.completion_tokens for answer in answers} == ({8} if behaviour.usage else {None})


async def test_an_event_of_several_tokens_is_one_arrival() -> None:
    with timed_server(Behaviour(ttft_ms=5, itl_ms=2, tokens_per_event=4)) as server:
        (answer,) = await complete(server.url)
    assert (len(answer.token_ns), answer.completion_tokens) == (2, 8)


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (Fault.HTTP_500, ErrorClass.STATUS, "status 500: .*injected failure"),
        (Fault.DROP, ErrorClass.STREAM, "connection closed after 4 tokens"),
        (Fault.CUT, ErrorClass.STREAM, "ended after 4 tokens without"),
        (Fault.GARBAGE, ErrorClass.STREAM, "no JSON object: b'{not json'"),
        (Fault.ERROR_EVENT, ErrorClass.STREAM, "injected failure in the stream"),
        (Fault.STALL, ErrorClass.TIMEOUT, "4 tokens came within the limit of 2 s"),
        (Fault.SILENT, ErrorClass.TIMEOUT, "0 tokens came within the limit of 2 s"),
        (Fault.EMPTY, ErrorClass.STREAM, "without a token"),
    ],
)
async def test_every_fault_is_an_error_of_its_class_and_the_next_request_is_well(
    fault: Fault, error: ErrorClass, text: str
) -> None:
    with timed_server(Behaviour(ttft_ms=5, itl_ms=2, fault=fault, fault_every=2)) as server:
        good, bad, after = await complete(server.url, count=3, limit_s=2.0)
    assert good.error is None
    assert bad.error is error
    assert re.search(text, bad.error_text), bad.error_text
    assert after.error is None
    assert not after.resent


async def test_no_server_is_a_connect_error() -> None:
    (answer,) = await complete(f"http://127.0.0.1:{free_port()}")
    assert answer.error is ErrorClass.CONNECT
    assert "no connection to 127.0.0.1:" in answer.error_text
    assert answer.token_ns == ()


async def test_connections_are_used_again() -> None:
    with timed_server(QUICK) as server:
        answers = await complete(server.url, count=5)
    assert answers[0].connect_ns > 0
    assert [answer.connect_ns for answer in answers[1:]] == [0] * 4


@asynccontextmanager
async def handmade_server(answer: Callable[[int], bytes | None]) -> AsyncIterator[tuple[str, list[int]]]:
    """A server that answers request k of a connection with `answer(k)`, or closes where that is None.

    Yields its URL and a list to which it adds the requests that each connection carried.
    """
    carried: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place = len(carried)
        carried.append(0)
        try:
            while reply := answer(carried[place]):
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(BODY))
                carried[place] += 1
                writer.write(reply)
            await asyncio.sleep(0.02)  # closes an idle connection without having said so
        except asyncio.IncompleteReadError:
            pass  # the client closed first
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", carried
    finally:
        server.close()
        await server.wait_closed()


def reply(*events: str) -> bytes:
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


EVENT = '{"choices": [{"text": "a", "finish_reason": null}]}'
LAST = '{"choices": [{"text": "", "finish_reason": "length"}]}'


def usage(tokens: int) -> str:
    return f'{{"choices": [], "usage": {{"prompt_tokens": 3, "completion_tokens": {tokens}}}}}'


@pytest.mark.parametrize(
    ("events", "arrivals"),
    [
        ((EVENT, EVENT, LAST, usage(2), "[DONE]"), 2),  # the last event is a mere end
        ((EVENT, EVENT, LAST, usage(3), "[DONE]"), 3),  # the last event is a token whose text is empty
        ((EVENT.replace('"a"', '""'), EVENT, LAST, usage(2), "[DONE]"), 2),  # a token that has no text yet
        ((EVENT, LAST.replace('""', '"b"')), 2),  # neither usage nor [DONE], but a finish_reason
    ],
)
async def test_which_events_are_tokens(events: tuple[str, ...], arrivals: int) -> None:
    async with handmade_server(lambda _: reply(*events)) as (url, _):
        (answer,) = await complete(url)
    assert answer.error is None
    assert len(answer.token_ns) == arrivals


async def test_a_request_on_a_connection_closed_meanwhile_goes_out_again_with_its_clock_running_on() -> None:
    """The server closes each connection 20 ms after its second answer, which the client learns by writing to it."""
    async with handmade_server(lambda k: reply(EVENT, LAST, usage(1), "[DONE]") if k < 2 else None) as (url, carried):
        client = StreamingClient(Endpoint(base_url=url), 5.0)
        answers = [await client.complete(BODY, 0), await client.complete(BODY, 1)]
        before_ns = time.monotonic_ns()
        answers.append(await client.complete(BODY, 2))
        client.close()
    assert [answer.error for answer in answers] == [None] * 3
    assert [answer.resent for answer in answers] == [False, False, True]
    assert answers[2].sent_ns - before_ns < 10_000_000
    assert answers[2].token_ns[0] - answers[2].sent_ns > 10_000_000  # the 20 ms lost are in its TTFT
    assert carried == [2, 1]


async def test_a_server_that_closes_after_each_answer_is_asked_on_new_connections_after_one_lesson() -> None:
    async with handmade_server(lambda k: reply(EVENT, LAST, usage(1), "[DONE]") if k < 1 else None) as (url, _):
        answers = await complete(url, count=5)
    assert [answer.error for answer in answers] == [None] * 5
    assert [answer.resent for answer in answers] == [False, True, False, False, False]


async def test_abandoned_requests_end_at_once() -> None:
    with timed_server(Behaviour(ttft_ms=60_000)) as server:
        client = StreamingClient(Endpoint(base_url=server.url), 60.0)
        tasks = [asyncio.create_task(client.complete(BODY, index)) for index in range(3)]
        await asyncio.sleep(0.2)
        client.abandon()
        answers = await asyncio.wait_for(asyncio.gather(*tasks), 2.0)
    assert {answer.error for answer in answers} == {ErrorClass.ABANDONED}


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host", "http://"])
def test_an_address_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidValueError, match="is no HTTP address; give one such as"):
        Endpoint(base_url=url)


@pytest.mark.parametrize(
    ("url", "line", "host"),
    [
        ("http://h:1", "POST /v1/completions HTTP/1.1", "Host: h:1"),
        ("http://h/v1", "POST /v1/completions HTTP/1.1", "Host: h:80"),
        ("https://h/base/", "POST /base/v1/completions HTTP/1.1", "Host: h:443"),
        ("http://[::1]:8000", "POST /v1/completions HTTP/1.1", "Host: [::1]:8000"),
    ],
)
def test_the_path_and_host_follow_from_the_address(url: str, line: str, host: str) -> None:
    lines = Endpoint(base_url=url).head().decode().split("\r\n")
    assert lines[0] == line
    assert lines[1] == host
