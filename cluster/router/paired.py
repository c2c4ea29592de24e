"""Prefill on one replica, decode on another, where the engines carry the KV cache over themselves.

The router chooses the two replicas (the least busy of each kind), tells them of each other in the words of the engine
(`cluster.router.options.Protocol`) and passes the decode replica's answer on. Engines queue by themselves, so requests
are sent at once. What a decode replica found in its cache stands in the usage of its answer, and is recorded.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from cluster.router.options import Protocol, RouterOptions
from cluster.router.records import Record
from cluster.router.replies import PrefillAnswer, last_usage
from cluster.router.requests import JsonObject, check_single_prompt
from cluster.router.upstream import UpstreamError, call, posted, relay

log = logging.getLogger(__name__)

PREFILL_ENDS_S = 1.0
"""How much later than the decode replica's a prefill replica's answer may end, before its request is cut off."""
_ROOMS = 2**63
"""SGLang takes 64-bit numbers for rooms."""


class LeastBusy:
    """Replicas of one kind: a request goes to the one with the fewest in flight, among these the fewest sent."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        self.in_flight: Counter[str] = Counter(dict.fromkeys(urls, 0))
        self.sent: Counter[str] = Counter(dict.fromkeys(urls, 0))

    @contextmanager
    def hold(self) -> Iterator[str]:
        """The base URL of a replica, for the time of a request."""
        url = min(self.in_flight, key=lambda url: (self.in_flight[url], self.sent[url]))
        self.in_flight[url] += 1
        self.sent[url] += 1
        try:
            yield url
        finally:
            self.in_flight[url] -= 1


def _whole(body: JsonObject) -> JsonObject:
    """`body` for an answer in one piece."""
    return {name: value for name, value in body.items() if name not in {"stream", "stream_options"}}


def _one_token(body: JsonObject) -> JsonObject:
    """`body` for a prefill replica that is asked first: a single token, in one piece."""
    kept = {name: value for name, value in _whole(body).items() if name not in {"max_completion_tokens", "min_tokens"}}
    return kept | {"max_tokens": 1}


@dataclass(frozen=True, kw_only=True)
class InTurn:
    """A protocol in which the decode replica is asked once the prefill replica has answered.

    `ask` is what the prefill replica is told beyond the prompt; `hand_on` makes of its answer what the decode replica
    is told, and raises `UpstreamError` where the answer does not have it.
    """

    ask: JsonObject
    hand_on: Callable[[PrefillAnswer], JsonObject]


def _blocks(answer: PrefillAnswer) -> JsonObject:
    if not answer.kv_transfer_params:
        raise UpstreamError("the prefill replica answered without kv_transfer_params; does it have a KV connector?")
    return {"kv_transfer_params": answer.kv_transfer_params}


def _nothing(_answer: PrefillAnswer) -> JsonObject:
    return {}


def _context(answer: PrefillAnswer) -> JsonObject:
    found = answer.choices[0].disaggregated_params if answer.choices else None
    if not found:
        raise UpstreamError("the context server answered without disaggregated_params; has it a cache transceiver?")
    return {"disaggregated_params": {**found, "request_type": "generation_only"}}


IN_TURN: Mapping[Protocol, InTurn] = {
    Protocol.KV_TRANSFER_PARAMS: InTurn(
        ask={
            "kv_transfer_params": {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "remote_engine_id": None,
                "remote_block_ids": None,
                "remote_host": None,
                "remote_port": None,
            }
        },
        hand_on=_blocks,
    ),
    Protocol.REPEAT: InTurn(ask={}, hand_on=_nothing),
    Protocol.DISAGGREGATED_PARAMS: InTurn(
        ask={"disaggregated_params": {"request_type": "context_only"}}, hand_on=_context
    ),
}


class PairedRoute:
    """Pairs prefill and decode replicas by the protocol of `options`."""

    def __init__(self, session: aiohttp.ClientSession, options: RouterOptions) -> None:
        self._session = session
        self._protocol = options.protocol
        self._prefill, self._decode = LeastBusy(options.prefill_urls), LeastBusy(options.decode_urls)
        self._ending: set[asyncio.Task[PrefillAnswer]] = set()
        self._side_ports = dict(zip(options.prefill_urls, options.prefill_side_ports, strict=False))

    async def complete(self, request: web.Request, body: JsonObject, record: Record) -> web.StreamResponse:
        """Answer `body`; raises `BadRequestError` or `UpstreamError`."""
        check_single_prompt(body)
        if self._protocol is Protocol.BOOTSTRAP:
            return await self._at_once(request, body, record)
        return await self._in_turn(IN_TURN[self._protocol], request, body, record)

    def state(self) -> dict[str, object]:
        """Requests in flight and sent so far, by kind and replica."""
        kinds = {"prefill": self._prefill, "decode": self._decode}
        return {"in_flight_by_replica": {kind: dict(found.in_flight) for kind, found in kinds.items()}}

    async def _in_turn(
        self, protocol: InTurn, request: web.Request, body: JsonObject, record: Record
    ) -> web.StreamResponse:
        with self._prefill.hold() as url:
            answer = await self._prefilled(url, _one_token(body) | protocol.ask, record)
        with self._decode.hold() as url:
            return await self._decoded(url, request, body | protocol.hand_on(answer), record)

    async def _at_once(self, request: web.Request, body: JsonObject, record: Record) -> web.StreamResponse:
        """Both replicas meet in a room; the prefill replica's fault is told where it comes first."""
        with self._prefill.hold() as prefill, self._decode.hold() as decode:
            room = {
                "bootstrap_host": urlsplit(prefill).hostname,
                "bootstrap_port": self._side_ports[prefill],
                "bootstrap_room": secrets.randbelow(_ROOMS),
            }
            asking = asyncio.ensure_future(self._prefilled(prefill, _whole(body) | room, record))
            answering = asyncio.ensure_future(self._decoded(decode, request, body | room, record))
            try:
                await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_EXCEPTION)
                if asking.done() and asking.exception() is not None and record.first_chunk_ms is None:
                    asking.result()
                return await answering
            finally:
                answering.cancel()
                self._let_end(asking, cut_off=answering.cancelled() or not answering.done())
                await asyncio.gather(answering, return_exceptions=True)

    def _let_end(self, asking: asyncio.Task[PrefillAnswer], *, cut_off: bool) -> None:
        """Give the prefill replica's answer a moment to end, or none; a client that has its answer is gone by then."""
        self._ending.add(asking)
        asking.add_done_callback(self._forget)
        asyncio.get_running_loop().call_later(0.0 if cut_off else PREFILL_ENDS_S, asking.cancel)

    def _forget(self, asking: asyncio.Task[PrefillAnswer]) -> None:
        self._ending.discard(asking)
        if not asking.cancelled() and asking.exception() is not None:
            log.info("a prefill replica failed after its request was answered: %s", asking.exception())

    async def _prefilled(self, url: str, body: JsonObject, record: Record) -> PrefillAnswer:
        record.prefill_replica, started = url, time.perf_counter()
        answer = await call(self._session, f"{url}/v1/completions", body, PrefillAnswer)
        record.prefill_ms = (time.perf_counter() - started) * 1e3
        if answer.usage is not None:
            record.prompt_tokens = answer.usage.prompt_tokens
        return answer

    async def _decoded(self, url: str, request: web.Request, body: JsonObject, record: Record) -> web.StreamResponse:
        record.replica, started = url, time.perf_counter()

        def begun() -> None:
            record.first_chunk_ms = (time.perf_counter() - started) * 1e3

        async with posted(self._session, f"{url}/v1/completions", body) as upstream:
            relayed = await relay(upstream, request, begun)
        usage = last_usage(relayed.tail)
        if usage is not None:
            record.prompt_tokens = usage.prompt_tokens
            if usage.prompt_tokens_details is not None:
                record.decode_cache_n = usage.prompt_tokens_details.cached_tokens or 0
                record.decode_prompt_n = usage.prompt_tokens - record.decode_cache_n
        return relayed.response
