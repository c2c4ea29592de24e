"""Prefill on one replica, decode on another: the KV cache of each request goes over through a slot file.

The prompt is computed in a slot of a prefill replica, which saves the slot; a slot of a decode replica restores it and
answers. llama.cpp computes the last prompt token again, because a slot keeps no logits, so the decode replica reports
one prompt token computed and all others cached. A prefill slot is free as soon as its file is written; files wait for
a decode slot, not slots for slots, so the two pools cannot lock each other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import aiohttp
from aiohttp import web
from pydantic import BaseModel

from cluster.router.options import RouterOptions
from cluster.router.records import Record
from cluster.router.replies import Completion, Restored, Saved, last_timings
from cluster.router.requests import JsonObject, check_single_prompt
from cluster.router.slots import Slot, SlotPool
from cluster.router.upstream import ACTION_TIMEOUT_S, Reply, UpstreamError, call, posted, relay, uninterrupted

log = logging.getLogger(__name__)


class _Anything(BaseModel):
    """A reply of which nothing is read."""


class DisaggregatedRoute:
    """Hands requests over from prefill to decode replicas."""

    def __init__(self, session: aiohttp.ClientSession, options: RouterOptions) -> None:
        self._session = session
        self._slot_dir = options.slot_dir
        self._prefill = SlotPool(options.prefill_urls, options.prefill_slots, self._erase)
        self._decode = SlotPool(options.decode_urls, options.decode_slots, self._erase)

    async def complete(self, request: web.Request, body: JsonObject, record: Record) -> web.StreamResponse:
        """Answer `body`; raises `BadRequestError` or `UpstreamError`."""
        check_single_prompt(body)
        with self._hand_over_file() as file:
            saved = await self._compute_prompt(body, file, record)
            waiting_since = time.perf_counter()
            async with self._decode.hold() as slot:
                record.decode_queue_ms = _ms_since(waiting_since)
                record.replica = slot.url
                await self._restore(slot, file, saved, record)
                file.unlink()
                return await self._decode_in(slot, request, body, record)

    def state(self) -> dict[str, object]:
        """Slots by kind: in all, free, and requests that wait for one."""
        pools = {"prefill": self._prefill, "decode": self._decode}
        return {
            "slots": {
                kind: {"total": pool.total, "free": pool.free, "waiting": pool.waiting} for kind, pool in pools.items()
            }
        }

    @contextmanager
    def _hand_over_file(self) -> Iterator[Path]:
        path = self._slot_dir / f"kv-{uuid4().hex}.bin"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    async def _compute_prompt(self, body: JsonObject, file: Path, record: Record) -> Saved:
        arrived = time.perf_counter()
        async with self._prefill.hold() as slot:
            record.prefill_queue_ms, record.prefill_replica = _ms_since(arrived), slot.url
            started = time.perf_counter()
            answer = await call(self._session, f"{slot.url}/v1/completions", _prefill_body(body, slot), Completion)
            record.prefill_ms, record.prefill_engine_ms = _ms_since(started), answer.timings.prompt_ms
            record.prompt_tokens = answer.timings.prompt_n + answer.timings.cache_n
            started = time.perf_counter()
            saved = await uninterrupted(self._act(slot, "save", {"filename": file.name}, Saved))
            record.save_ms, record.save_engine_ms = _ms_since(started), saved.timings.save_ms
        record.kv_bytes = saved.n_written
        if saved.n_saved != record.prompt_tokens:
            raise UpstreamError(f"{slot.url} saved {saved.n_saved} of {record.prompt_tokens} prompt tokens")
        return saved

    async def _restore(self, slot: Slot, file: Path, saved: Saved, record: Record) -> None:
        started = time.perf_counter()
        restored = await uninterrupted(self._act(slot, "restore", {"filename": file.name}, Restored))
        record.restore_ms, record.restore_engine_ms = _ms_since(started), restored.timings.restore_ms
        record.hand_over_ms = (record.save_ms or 0.0) + record.restore_ms
        if restored.n_restored != saved.n_saved:
            raise UpstreamError(f"{slot.url} restored {restored.n_restored} of {saved.n_saved} tokens")

    async def _decode_in(
        self, slot: Slot, request: web.Request, body: JsonObject, record: Record
    ) -> web.StreamResponse:
        sent_at = time.perf_counter()
        pinned = body | {"id_slot": slot.index, "cache_prompt": True}
        async with posted(self._session, f"{slot.url}/v1/completions", pinned) as upstream:
            relayed = await relay(upstream, request)
        if relayed.first_at is not None:
            record.first_chunk_ms = (relayed.first_at - sent_at) * 1e3
        timings = last_timings(relayed.tail)
        if timings is not None:
            record.decode_engine_ms = timings.predicted_ms
            record.decode_prompt_n, record.decode_cache_n = timings.prompt_n, timings.cache_n
        return relayed.response

    async def _act(self, slot: Slot, action: str, body: JsonObject, reply: type[Reply]) -> Reply:
        url = f"{slot.url}/slots/{slot.index}?action={action}"
        try:
            return await call(self._session, url, body, reply, ACTION_TIMEOUT_S)
        except UpstreamError as error:  # refused or failed, it is no fault of the client's
            raise UpstreamError(str(error)) from error

    async def _erase(self, slot: Slot) -> None:
        """Empty a slot whose request ended early; the replica does so once it has stopped working on it."""
        try:
            await self._act(slot, "erase", {}, _Anything)
        except UpstreamError as error:
            log.info("slot %d of %s was not erased: %s", slot.index, slot.url, error)


def _prefill_body(body: JsonObject, slot: Slot) -> JsonObject:
    """`body` for the prefill replica: one token, whole; the decode replica finds that token again from the same KV."""
    dropped = {"stream", "stream_options", "max_completion_tokens"}
    kept = {name: value for name, value in body.items() if name not in dropped}
    return kept | {"max_tokens": 1, "n_predict": 1, "stream": False, "id_slot": slot.index}


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
