"""Several replicas that serve whole requests: each goes to the one with the fewest in flight."""

from __future__ import annotations

import time
from collections import Counter

import aiohttp
from aiohttp import web

from cluster.router.records import Record
from cluster.router.replies import last_timings, last_usage
from cluster.router.requests import JsonObject
from cluster.router.upstream import posted, relay


class AggregatedRoute:
    """Balances requests over `urls`."""

    def __init__(self, session: aiohttp.ClientSession, urls: tuple[str, ...]) -> None:
        self._session = session
        self._in_flight: Counter[str] = Counter(dict.fromkeys(urls, 0))
        self._sent: Counter[str] = Counter(dict.fromkeys(urls, 0))

    async def complete(self, request: web.Request, body: JsonObject, record: Record) -> web.StreamResponse:
        """Answer `body`; raises `UpstreamError`."""
        url = min(self._in_flight, key=lambda url: (self._in_flight[url], self._sent[url]))
        self._in_flight[url] += 1
        self._sent[url] += 1
        record.replica = url
        try:
            return await self._pass_on(url, request, body, record)
        finally:
            self._in_flight[url] -= 1

    async def _pass_on(self, url: str, request: web.Request, body: JsonObject, record: Record) -> web.StreamResponse:
        sent_at = time.perf_counter()
        async with posted(self._session, f"{url}/v1/completions", body) as upstream:
            relayed = await relay(upstream, request)
        if relayed.first_at is not None:
            record.first_chunk_ms = (relayed.first_at - sent_at) * 1e3
        timings = last_timings(relayed.tail)
        if timings is not None:
            record.prompt_tokens = timings.prompt_n + timings.cache_n
            record.prefill_engine_ms, record.decode_engine_ms = timings.prompt_ms, timings.predicted_ms
        usage = last_usage(relayed.tail)
        if usage is not None:
            record.prompt_tokens = usage.prompt_tokens
        return relayed.response

    def state(self) -> dict[str, object]:
        """Requests in flight and sent so far, by replica."""
        return {"in_flight": dict(self._in_flight), "sent": dict(self._sent)}
