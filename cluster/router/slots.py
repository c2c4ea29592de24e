"""Slots of replicas, owned by the router: each is held by one request at a time, first come, first served."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Slot `index` of the replica at base URL `url`."""

    url: str
    index: int


class SlotPool:
    """The slots of all replicas of one kind.

    `clean` brings a slot whose request failed back to an idle state; the slot stays out of use until it has returned.
    """

    def __init__(self, urls: tuple[str, ...], slots_per_replica: int, clean: Callable[[Slot], Awaitable[None]]) -> None:
        self._free = [Slot(url=url, index=index) for index in range(slots_per_replica) for url in urls]
        self._held: Counter[str] = Counter()
        self._waiters: deque[asyncio.Future[Slot]] = deque()
        self._clean = clean
        self._cleaning: set[asyncio.Task[None]] = set()
        self.total = len(self._free)

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return sum(not waiter.done() for waiter in self._waiters)

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Slot]:
        """A slot of the replica with the fewest held ones; it is free again afterwards, cleaned if the block raised."""
        slot = await self._acquire()
        try:
            yield slot
        except BaseException:  # a cancelled request leaves its slot as dirty as a failed one; the error goes on
            self._release_when_clean(slot)
            raise
        self._release(slot)

    async def _acquire(self) -> Slot:
        if self._free:
            return self._take(min(self._free, key=lambda slot: self._held[slot.url]))
        waiter: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # the slot was handed over in the moment of the cancellation
                self._release(waiter.result())
            raise

    def _take(self, slot: Slot) -> Slot:
        self._free.remove(slot)
        self._held[slot.url] += 1
        return slot

    def _release(self, slot: Slot) -> None:
        self._free.append(slot)
        self._held[slot.url] -= 1
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(self._take(slot))
                return

    def _release_when_clean(self, slot: Slot) -> None:
        task = asyncio.get_running_loop().create_task(self._clean_and_release(slot))
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)

    async def _clean_and_release(self, slot: Slot) -> None:
        try:
            await self._clean(slot)
        finally:
            self._release(slot)
