"""Pairing of prefill and decode replicas in the words of vLLM, SGLang and TensorRT-LLM, against stand-ins for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from pydantic import ValidationError

from cluster.hand_over import not_handed_over, tokens_handed_over
from cluster.router.app import make_runner
from cluster.router.metrics_text import read_figures
from cluster.router.options import Protocol, RouterOptions
from search_spaces.outcome import FailureReason
from tests.support.llamacpp import ask, open_session, request_body
from tests.support.web import listening, replica_runner, until

BLOCKS = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_host": "10.0.0.1", "remote_port": 18000}
CONTEXT = {"request_type": "context_only", "ctx_request_id": 42, "first_gen_tokens": [7], "opaque_state": "abc"}
METRICS = {"kv_tokens_received_total": 'engine:tokens_total{source="external"}', "requests_running": "engine:running"}


class Engine:
    """A stand-in for a replica that notes what it is asked."""

    def __init__(self, kind: str, protocol: Protocol) -> None:
        self.kind, self.protocol = kind, protocol
        self.asked: list[dict[str, Any]] = []
        self.status = 200
        self.forgets = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.left = 0
        self.received = 0
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        if self.status != 200:
            return web.json_response({"error": {"message": "no room"}}, status=self.status)
        if not body.get("stream"):
            return web.json_response(self._whole(body))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(body["max_tokens"]):
            await response.write(_event({"choices": [{"text": f" w{number}"}]}))
        self.received += 256
        usage = {"prompt_tokens": 300, "completion_tokens": body["max_tokens"], "total_tokens": 302}
        details = {"prompt_tokens_details": {"cached_tokens": 256}}
        await response.write(_event({"choices": [], "usage": usage | details}) + b"data: [DONE]\n\n")
        return response

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"choices": [{"text": " w0"}], "usage": {"prompt_tokens": 300, "completion_tokens": 1}}
        if self.forgets or self.kind == "decode":
            return answer
        if self.protocol is Protocol.KV_TRANSFER_PARAMS:
            answer["kv_transfer_params"] = BLOCKS
        if self.protocol is Protocol.DISAGGREGATED_PARAMS:
            answer["choices"][0]["disaggregated_params"] = CONTEXT
        del body
        return answer

    async def metrics(self, _request: web.Request) -> web.Response:
        lines = [
            "# TYPE engine:tokens_total counter",
            f'engine:tokens_total{{model="m",source="external"}} {self.received}',
            'engine:tokens_total{model="m",source="local"} 5.0',
            "engine:running 1",
        ]
        return web.Response(text="\n".join(lines) + "\n")


def _event(tree: object) -> bytes:
    return f"data: {json.dumps(tree)}\n\n".encode()


@asynccontextmanager
async def paired(
    protocol: Protocol, tmp_path: Path, *, prefills: int = 1, decodes: int = 1
) -> AsyncIterator[tuple[str, list[Engine], list[Engine], aiohttp.ClientSession]]:
    async with AsyncExitStack() as stack:
        kinds = {"prefill": prefills, "decode": decodes}
        engines = {kind: [Engine(kind, protocol) for _ in range(count)] for kind, count in kinds.items()}
        for engine in (*engines["prefill"], *engines["decode"]):
            app = web.Application()
            app.router.add_post("/v1/completions", engine.complete)
            app.router.add_get("/metrics", engine.metrics)
            engine.url = await stack.enter_async_context(listening(replica_runner(app)))
        options = RouterOptions(
            host="127.0.0.1",
            port=1,
            prefill_urls=tuple(engine.url for engine in engines["prefill"]),
            decode_urls=tuple(engine.url for engine in engines["decode"]),
            protocol=protocol,
            prefill_side_ports=tuple(18_000 + n for n in range(prefills)),
            metrics=METRICS,
            slot_dir=tmp_path,
        )
        url = await stack.enter_async_context(listening(make_runner(options)))
        yield url, engines["prefill"], engines["decode"], await stack.enter_async_context(open_session())


async def stats(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(f"{url}/router/stats") as response:
        answer: dict[str, Any] = await response.json()
        return answer


APART = [protocol for protocol in Protocol if protocol is not Protocol.SLOTS]


@pytest.mark.parametrize("protocol", APART)
async def test_an_answer_comes_from_the_decode_replica_after_one_token_of_prefill(
    protocol: Protocol, tmp_path: Path
) -> None:
    async with paired(protocol, tmp_path) as (url, (prefill,), (decode,), session):
        answer = await ask(session, url, request_body([5, 6], 3))
        assert answer.pieces == (" w0", " w1", " w2")
        assert answer.done
        (first,), (second,) = prefill.asked, decode.asked
        assert first["prompt"] == second["prompt"] == [5, 6]
        assert not first.get("stream")
        assert "stream_options" not in first
        assert second["max_tokens"] == 3
        (record,) = (await stats(session, url))["records"]
        assert (record["replica"], record["prefill_replica"]) == (decode.url, prefill.url)
        assert (record["prompt_tokens"], record["decode_cache_n"], record["decode_prompt_n"]) == (300, 256, 44)
        assert record["total_ms"] >= record["first_chunk_ms"] > 0
        assert record["prefill_ms"] > 0


async def test_vllm_is_told_where_the_blocks_are(tmp_path: Path) -> None:
    async with paired(Protocol.KV_TRANSFER_PARAMS, tmp_path) as (url, (prefill,), (decode,), session):
        await ask(session, url, request_body([5, 6], 3))
        told = prefill.asked[0]["kv_transfer_params"]
        assert (told["do_remote_decode"], told["do_remote_prefill"]) == (True, False)
        assert prefill.asked[0]["max_tokens"] == 1
        assert decode.asked[0]["kv_transfer_params"] == BLOCKS


async def test_vllm_with_files_gets_the_same_prompt_twice(tmp_path: Path) -> None:
    async with paired(Protocol.REPEAT, tmp_path) as (url, (prefill,), (decode,), session):
        await ask(session, url, request_body([5, 6], 3))
        assert prefill.asked[0]["max_tokens"] == 1
        assert decode.asked[0] == request_body([5, 6], 3)


async def test_tensorrt_llm_gets_the_context_servers_parameters(tmp_path: Path) -> None:
    async with paired(Protocol.DISAGGREGATED_PARAMS, tmp_path) as (url, (prefill,), (decode,), session):
        await ask(session, url, request_body([5, 6], 3))
        assert prefill.asked[0]["disaggregated_params"] == {"request_type": "context_only"}
        assert decode.asked[0]["disaggregated_params"] == {**CONTEXT, "request_type": "generation_only"}


async def test_sglangs_two_replicas_meet_in_a_room(tmp_path: Path) -> None:
    async with paired(Protocol.BOOTSTRAP, tmp_path, prefills=2) as (url, prefills, (decode,), session):
        for replica in prefills:
            replica.gate.clear()
        asking = asyncio.create_task(ask(session, url, request_body([5, 6], 3)))
        await until(lambda: bool(decode.asked))  # it does not wait for the prefill replica
        for replica in prefills:
            replica.gate.set()
        await asking
        await ask(session, url, request_body([5, 6], 3))
        rooms = set()
        for number, replica in enumerate(prefills):
            room = {key: value for key, value in replica.asked[0].items() if key.startswith("bootstrap")}
            assert room["bootstrap_host"] == urlsplit(replica.url).hostname
            assert room["bootstrap_port"] == 18_000 + number
            assert any(room.items() <= body.items() for body in decode.asked)
            rooms.add(room["bootstrap_room"])
            assert replica.asked[0]["max_tokens"] == 3
        assert len(rooms) == 2


async def test_a_prefill_replica_that_fails_fails_the_request_at_once(tmp_path: Path) -> None:
    async with paired(Protocol.BOOTSTRAP, tmp_path) as (url, (prefill,), (decode,), session):
        prefill.status = 503
        decode.gate.clear()  # it would wait for a cache that never comes
        answer = await ask(session, url, request_body([5, 6], 3))
        assert answer.status == 502
        assert "no room" in answer.error
        await until(lambda: decode.left == 1)


@pytest.mark.parametrize("protocol", [Protocol.KV_TRANSFER_PARAMS, Protocol.DISAGGREGATED_PARAMS])
async def test_an_answer_without_what_is_handed_on_is_no_disaggregated_serving(
    protocol: Protocol, tmp_path: Path
) -> None:
    async with paired(protocol, tmp_path) as (url, (prefill,), (decode,), session):
        prefill.forgets = True
        answer = await ask(session, url, request_body([5, 6], 3))
        assert answer.status == 502
        assert "answered without" in answer.error
        assert not decode.asked


@pytest.mark.parametrize("protocol", APART)
async def test_requests_are_spread_and_a_client_that_leaves_ends_its_own(protocol: Protocol, tmp_path: Path) -> None:
    async with paired(protocol, tmp_path, prefills=2, decodes=2) as (url, prefills, decodes, session):
        await asyncio.gather(*(ask(session, url, request_body([n], 2)) for n in range(8)))
        assert [len(engine.asked) for engine in (*prefills, *decodes)] == [4, 4, 4, 4]
        for engine in decodes:
            engine.gate.clear()
        asking = asyncio.create_task(ask(session, url, request_body([9], 2)))
        await until(lambda: sum(len(engine.asked) for engine in decodes) == 9)
        asking.cancel()
        await until(lambda: sum(engine.left for engine in decodes) == 1)
        found = await stats(session, url)
        assert found["in_flight"] == 0
        assert found["endings"] == {"completed": 8, "failed": 0, "cancelled": 1}
        assert all(count == 0 for kind in found["in_flight_by_replica"].values() for count in kind.values())


async def test_figures_of_replicas_show_whether_caches_were_handed_over(tmp_path: Path) -> None:
    async with paired(Protocol.REPEAT, tmp_path) as (url, (prefill,), (decode,), session):
        before = json.dumps(await stats(session, url))
        assert tokens_handed_over(before, before) == 0
        await ask(session, url, request_body([5, 6], 3))
        found = await stats(session, url)
        assert found["engine_metrics"][decode.url] == {"kv_tokens_received_total": 256.0, "requests_running": 1.0}
        assert found["engine_metrics"][prefill.url]["kv_tokens_received_total"] == 0.0
        assert tokens_handed_over(before, json.dumps(found)) == 256


def test_nothing_is_said_where_nobody_counts() -> None:
    uncounted = json.dumps({"mode": "disaggregated", "engine_metrics": {"http://a": {"requests_running": 1.0}}})
    aggregated = json.dumps({"mode": "aggregated", "engine_metrics": {"http://a": {"kv_tokens_received_total": 1.0}}})
    for stats_text in (None, "no json", uncounted, aggregated):
        assert tokens_handed_over(stats_text, stats_text) is None
    assert not_handed_over().reason is FailureReason.REQUESTS_FAILED


def test_samples_are_summed_by_name_and_labels() -> None:
    text = 'a_total{x="1",y="q\\"uote"} 2\na_total{x="2"} 3\nb 1e3\nb_total 7\n# a_total 9\nnonsense\n'
    wanted = {"all": "a_total", "one": 'a_total{x="1"}', "b": "b", "gone": "c", "other": 'b{x="1"}'}
    assert read_figures(text, wanted) == {"all": 5.0, "one": 2.0, "b": 1000.0}


def test_a_meeting_needs_a_port_for_each_prefill_replica(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="give one for each of 2 prefill_urls"):
        RouterOptions(
            host="127.0.0.1",
            port=1,
            prefill_urls=("http://a", "http://b"),
            decode_urls=("http://c",),
            protocol=Protocol.BOOTSTRAP,
            prefill_side_ports=(1,),
            slot_dir=tmp_path,
        )
