"""Load balancing and pass-through, against replicas whose every move the test decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from cluster.router.app import make_runner
from cluster.router.options import RouterOptions
from tests.support.llamacpp import ask, open_session, request_body
from tests.support.web import listening, replica_runner, until

CHUNK = b'data: {"choices":[{"text":" w%d"}]}\n\n'
LAST = (
    b'data: {"choices":[{"text":""}],"usage":{"prompt_tokens":2,"completion_tokens":2},"timings":{"cache_n":0,'
    b'"prompt_n":2,"prompt_ms":3.0,"predicted_n":2,"predicted_ms":4.0}}\n\ndata: [DONE]\n\n'
)


class Replica:
    """Streams two tokens, the second when `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.received = 0
        self.left = 0
        self.break_off = False
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.received += 1
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(CHUNK % 1)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        if self.break_off:
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write(CHUNK % 2 + LAST)
        return response


@asynccontextmanager
async def balanced(count: int, tmp_path: Path) -> AsyncIterator[tuple[str, list[Replica], aiohttp.ClientSession]]:
    async with AsyncExitStack() as stack:
        replicas = [Replica() for _ in range(count)]
        for replica in replicas:
            app = web.Application()
            app.router.add_post("/v1/completions", replica.complete)
            replica.url = await stack.enter_async_context(listening(replica_runner(app)))
        urls = tuple(replica.url for replica in replicas)
        options = RouterOptions(host="127.0.0.1", port=1, mixed_urls=urls, slot_dir=tmp_path)
        url = await stack.enter_async_context(listening(make_runner(options)))
        yield url, replicas, await stack.enter_async_context(open_session())


async def get(session: aiohttp.ClientSession, url: str) -> dict[str, object]:
    async with session.get(url) as response:
        answer: dict[str, object] = await response.json()
        return answer | {"status_code": response.status}


async def test_each_request_goes_to_the_replica_with_the_fewest_in_flight(tmp_path: Path) -> None:
    async with balanced(3, tmp_path) as (url, replicas, session):
        slow, *fast = replicas
        for replica in fast:
            replica.gate.set()
        held = [asyncio.create_task(ask(session, url, request_body([1], 2))) for _ in range(3)]
        await until(lambda: slow.received == 1)
        quick = [await ask(session, url, request_body([1], 2)) for _ in range(8)]
        assert [answer.pieces for answer in quick] == [(" w1", " w2")] * 8
        assert slow.received == 1
        assert abs(fast[0].received - fast[1].received) <= 1
        slow.gate.set()
        assert all(answer.done for answer in await asyncio.gather(*held))


async def test_the_first_token_does_not_wait_for_the_second(tmp_path: Path) -> None:
    async with balanced(1, tmp_path) as (url, (replica,), session):
        async with session.post(f"{url}/v1/completions", json=request_body([1], 2)) as response:
            assert await asyncio.wait_for(response.content.readline(), 2) == (CHUNK % 1).split(b"\n")[0] + b"\n"
            assert not replica.gate.is_set()
            replica.gate.set()
            rest = await response.read()
        assert rest == b"\n" + CHUNK % 2 + LAST
        stats = await get(session, f"{url}/router/stats")
        assert stats["mode"] == "aggregated"
        (record,) = stats["records"]  # type: ignore[misc] - JSON
        assert record["prefill_engine_ms"] == 3.0
        assert record["decode_engine_ms"] == 4.0


async def test_a_client_that_goes_away_frees_its_replica(tmp_path: Path) -> None:
    async with balanced(1, tmp_path) as (url, (replica,), session):
        task = asyncio.create_task(ask(session, url, request_body([1], 2)))
        await until(lambda: replica.received == 1)
        task.cancel()
        await until(lambda: replica.left == 1)
        stats = await get(session, f"{url}/router/stats")
        assert stats["in_flight"] == {replica.url: 0}
        assert stats["endings"] == {"completed": 0, "failed": 0, "cancelled": 1}


async def test_a_replica_that_breaks_off_ends_the_stream_with_an_error_event(tmp_path: Path) -> None:
    async with balanced(1, tmp_path) as (url, (replica,), session):
        replica.break_off = True
        replica.gate.set()
        answer = await ask(session, url, request_body([1], 2))
        assert answer.status == 200
        assert not answer.done
        assert "broke off" in answer.error
        assert (await get(session, f"{url}/router/stats"))["endings"] == {"completed": 0, "failed": 1, "cancelled": 0}


async def test_faults_are_told_with_their_cause(tmp_path: Path) -> None:
    options = RouterOptions(host="127.0.0.1", port=1, mixed_urls=("http://127.0.0.1:9",), slot_dir=tmp_path)
    async with listening(make_runner(options)) as url, open_session() as session:
        answer = await ask(session, url, request_body([1], 2))
        assert answer.status == 502
        assert "http://127.0.0.1:9/v1/completions was not reached" in json.loads(answer.error)["error"]["message"]
        health = await get(session, f"{url}/health")
        assert health["status_code"] == 503
        async with session.post(f"{url}/v1/completions", data=b"{no json") as response:
            assert response.status == 400
            assert "no JSON" in await response.text()


@pytest.mark.parametrize(
    "urls",
    [
        {},
        {"prefill_urls": ("http://a",), "prefill_slots": 1},
        {"mixed_urls": ("http://a",), "decode_urls": ("http://b",)},
        {"prefill_urls": ("http://a",), "decode_urls": ("http://b",), "prefill_slots": 1},
    ],
)
def test_half_a_deployment_is_refused(urls: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mixed_urls|decode_slots"):
        RouterOptions.model_validate({"host": "127.0.0.1", "port": 1, "slot_dir": tmp_path, **urls})
