"""Slots are never lost, never held twice, and given out in the order in which they are asked for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from cluster.router.slots import Slot, SlotPool

URLS = ("http://a", "http://b")


class Cleaner:
    """Cleans slots when `gate` is open, and remembers them."""

    def __init__(self) -> None:
        self.cleaned: list[Slot] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, slot: Slot) -> None:
        await self.gate.wait()
        self.cleaned.append(slot)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_replica_with_the_fewest_held_slots_is_chosen() -> None:
    pool = SlotPool(URLS, 2, Cleaner())
    async with pool.hold() as first, pool.hold() as second, pool.hold() as third, pool.hold() as fourth:
        assert {first.url, second.url} == {third.url, fourth.url} == set(URLS)
        assert len({first, second, third, fourth}) == 4
        assert pool.free == 0
    assert pool.free == pool.total == 4


async def test_waiters_are_served_in_order_of_arrival() -> None:
    pool = SlotPool(("http://a",), 1, Cleaner())
    served: list[int] = []

    async def one(number: int) -> None:
        async with pool.hold():
            served.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(one(number) for number in range(20)))
    assert served == list(range(20))
    assert pool.waiting == 0


async def test_a_failed_request_s_slot_is_cleaned_before_it_is_used_again() -> None:
    cleaner = Cleaner()
    cleaner.gate.clear()
    pool = SlotPool(("http://a",), 1, cleaner)
    with pytest.raises(ValueError, match="broken"):
        async with pool.hold() as slot:
            raise ValueError("broken")
    waiting = asyncio.create_task(pool.hold().__aenter__())
    await settle()
    assert pool.free == 0
    assert pool.waiting == 1
    cleaner.gate.set()
    assert await waiting == slot
    assert cleaner.cleaned == [slot]


async def test_a_slot_comes_back_even_where_cleaning_fails() -> None:
    async def fail(_slot: Slot) -> None:
        raise RuntimeError("cannot clean")

    pool = SlotPool(("http://a",), 1, fail)
    errors: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
    with pytest.raises(ValueError, match="broken"):
        async with pool.hold():
            raise ValueError("broken")
    await settle()
    assert pool.free == 1


async def test_a_slot_given_to_a_waiter_in_the_moment_of_its_cancellation_is_not_lost() -> None:
    pool = SlotPool(("http://a",), 1, Cleaner())
    holder = pool.hold()
    await holder.__aenter__()
    waiter = asyncio.create_task(pool.hold().__aenter__())
    await settle()
    await holder.__aexit__(None, None, None)  # hands the slot to the waiter, which has not run yet
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert pool.free == 1


@pytest.mark.parametrize("seed", range(5))
async def test_no_slot_is_lost_or_held_twice_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    cleaner = Cleaner()
    pool = SlotPool(URLS, 3, cleaner)
    held: Counter[Slot] = Counter()
    completed = 0

    async def one() -> None:
        nonlocal completed
        async with pool.hold() as slot:
            held[slot] += 1
            try:
                assert held[slot] == 1
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                if rng.random() < 0.3:
                    raise ValueError("broken")
            finally:
                held[slot] -= 1
        completed += 1

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.create_task(one()))
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await settle()
    assert {type(result) for result in results} == {type(None), ValueError, asyncio.CancelledError}
    assert completed > 0
    assert pool.free == pool.total == 6
    assert pool.waiting == 0
