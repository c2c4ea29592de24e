"""The response decoder and the event parser give the same whatever pieces the bytes come in."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.load.http1 import EventParser, MalformedResponseError, ResponseDecoder

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(marks)]


def decode(data: bytes, cuts: list[int] | None = None) -> tuple[ResponseDecoder, bytes]:
    decoder = ResponseDecoder()
    return decoder, b"".join(decoder.feed(piece) for piece in pieces(data, cuts or []))


@given(chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=6), cuts=st.lists(st.integers(0, 10_000)))
@settings(max_examples=200)
def test_a_chunked_body_survives_any_cutting(chunks: list[bytes], cuts: list[int]) -> None:
    coded = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    stream = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\nTrailer: x\r\n\r\n"
    decoder, body = decode(stream, cuts)
    assert body == b"".join(chunks)
    assert (decoder.status, decoder.done, decoder.reusable) == (200, True, True)
    assert not decode(stream[:-1])[0].done


@given(body=st.binary(max_size=60), cuts=st.lists(st.integers(0, 10_000)))
def test_a_counted_body_survives_any_cutting(body: bytes, cuts: list[int]) -> None:
    decoder, read = decode(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body, cuts)
    assert read == body
    assert decoder.done
    assert decoder.reusable


def test_a_body_without_length_ends_with_the_connection() -> None:
    decoder, body = decode(HEAD + b"\r\nhello")
    assert (body, decoder.done, decoder.reusable) == (b"hello", False, False)
    decoder.close()
    assert decoder.done


def test_closing_does_not_complete_a_body_that_has_a_length() -> None:
    decoder, _ = decode(HEAD + b"Content-Length: 9\r\n\r\nhello")
    decoder.close()
    assert not decoder.done


def test_a_connection_is_not_used_again_where_the_server_says_so() -> None:
    assert not decode(HEAD + b"Connection: close\r\nContent-Length: 0\r\n\r\n")[0].reusable
    assert not decode(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")[0].reusable
    assert decode(b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n")[0].reusable


def test_interim_responses_are_passed_over() -> None:
    decoder, body = decode(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\nok")
    assert (decoder.status, body) == (200, b"ok")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"garbage\r\n\r\n", r"b'garbage.* is no HTTP/1.1 response: Expected HTTP/"),
        (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            "is no HTTP/1.1 response: Invalid character in chunk size",
        ),
        (HEAD + b"Content-Length: many\r\n\r\n", "is no HTTP/1.1 response: Invalid character in Content-Length"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "head of the response is longer than 65536 bytes"),
    ],
)
def test_what_is_no_http_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(MalformedResponseError, match=message):
        decode(data)


@given(cuts=st.lists(st.integers(0, 10_000)))
def test_events_survive_any_cutting(cuts: list[int]) -> None:
    stream = b': ping\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: [DONE]\n\ndata: unfinished'
    parser = EventParser()
    events = [event for piece in pieces(stream, cuts) for event in parser.feed(piece)]
    assert events == [b'{"a": 1}', b"two\nlines", b"[DONE]"]
