"""Plans against brute force, and what is said where a demand cannot be met."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest

from search_spaces.errors import InvalidValueError
from tuner.plan import Demand, Plan, Stock, Unit, patterns, plan, undominated


@cache
def fewest_nodes(sizes: tuple[int, ...], room: int) -> int:
    """The fewest nodes that hold replicas of `sizes`, by trying every way; sizes above a node take whole ones."""
    whole = sum(math.ceil(size / room) for size in sizes if size > room)
    parts = tuple(sorted((size for size in sizes if size <= room), reverse=True))
    return whole + _bins(parts, room, ())


@cache
def _bins(sizes: tuple[int, ...], room: int, left: tuple[int, ...]) -> int:
    if not sizes:
        return 0
    size, *rest = sizes
    best = 1 + _bins(tuple(rest), room, tuple(sorted((*left, room - size))))
    for index in {left.index(space) for space in left if space >= size}:
        after = tuple(sorted((*left[:index], left[index] - size, *left[index + 1 :])))
        best = min(best, _bins(tuple(rest), room, after))
    return best


def most_copies(unit: Unit, stocks: Sequence[Stock], demand: Demand) -> int:
    """Copies of `unit` alone that there is room for."""
    count = 0
    while True:
        more = count + 1
        if demand.devices is not None and unit.devices * more > demand.devices:
            return count
        for stock in stocks:
            sizes = tuple(sorted(unit.sizes.get(stock.pool, ()) * more))
            if stock.nodes is not None and fewest_nodes(sizes, stock.devices_per_node) > stock.nodes:
                return count
        count = more


def brute_force(
    units: Sequence[Unit], stocks: Sequence[Stock], demand: Demand, efficiency: float
) -> tuple[bool, float]:
    """(met, cost), or (not met, the largest share) over every number of copies of each unit."""
    priced = all(s.price_per_hour > 0 for s in stocks if any(s.pool in unit.sizes for unit in units))
    cheapest, largest = math.inf, 0.0
    for copies in product(*(range(most_copies(unit, stocks, demand) + 1) for unit in units)):
        devices = sum(unit.devices * n for unit, n in zip(units, copies, strict=True))
        if demand.devices is not None and devices > demand.devices:
            continue
        cost = 0.0
        for stock in stocks:
            sizes = [s for unit, n in zip(units, copies, strict=True) for s in unit.sizes.get(stock.pool, ()) * n]
            nodes = fewest_nodes(tuple(sorted(sizes)), stock.devices_per_node)
            if stock.nodes is not None and nodes > stock.nodes:
                break
            cost += nodes * (stock.price_per_hour if priced else stock.devices_per_node)
        else:
            factor = efficiency if sum(copies) > 1 else 1.0
            share = min(
                factor * sum(getattr(unit, name) * n for unit, n in zip(units, copies, strict=True)) / target
                for name, target in (("rate", demand.rate), ("users", demand.users))
                if target is not None
            )
            largest = max(largest, share / (1 + demand.headroom))
            if share / (1 + demand.headroom) >= 1 - 1e-9:
                cheapest = min(cheapest, cost)
    return (True, cheapest) if cheapest < math.inf else (False, min(largest, 1.0))


def small_case(rng: random.Random) -> tuple[list[Unit], list[Stock], Demand, float]:
    rooms = {"p": rng.choice([4, 6, 8]), "q": rng.choice([3, 8])}
    stocks = [
        Stock(
            pool=name, devices_per_node=room, nodes=rng.randint(1, 3), price_per_hour=rng.choice([0.0, 5.0, 7.0, 12.0])
        )
        for name, room in rooms.items()
    ]
    units = []
    for index in range(rng.randint(1, 3)):
        pools = rng.choice([["p"], ["q"], ["p", "q"]])
        sizes = {pool: tuple(rng.choice([2, 3, 4, 5, 8]) for _ in range(rng.randint(1, 2))) for pool in pools}
        units.append(Unit(name=str(index), rate=rng.uniform(1, 10), users=rng.randint(1, 20), sizes=sizes))
    demand = Demand(
        rate=rng.uniform(1, 22),
        users=rng.uniform(2, 40) if rng.random() < 0.4 else None,
        devices=rng.randint(6, 30) if rng.random() < 0.3 else None,
        headroom=rng.choice([0.0, 0.2]),
    )
    return units, stocks, demand, rng.choice([1.0, 0.9])


@pytest.mark.parametrize("seed", range(10))
def test_plans_agree_with_brute_force(seed: int) -> None:
    """20 cases each, 200 in all: the same cost where the demand can be met, the same share where it cannot."""
    rng = random.Random(seed)
    outcomes = Counter[bool]()
    for _ in range(20):
        units, stocks, demand, efficiency = small_case(rng)
        met, figure = brute_force(units, stocks, demand, efficiency)
        found = plan(units, stocks, demand, efficiency=efficiency)
        assert found.met == met, (units, stocks, demand, efficiency)
        assert (found.cost if met else found.served_share) == pytest.approx(figure, rel=1e-6, abs=1e-6)
        check(found, units, stocks, demand)
        outcomes[met] += 1
    assert outcomes[True] >= 2
    assert outcomes[False] >= 2


def check(found: Plan, units: Sequence[Unit], stocks: Sequence[Stock], demand: Demand) -> None:
    """A plan keeps its own word: nodes hold the replicas, and rates are those of its copies."""
    for stock in stocks:
        sizes = sorted(s for unit, n in found.copies for s in unit.sizes.get(stock.pool, ()) * n)
        assert found.nodes.get(stock.pool, 0) >= fewest_nodes(tuple(sizes), stock.devices_per_node)
        assert stock.nodes is None or found.nodes.get(stock.pool, 0) <= stock.nodes
    assert demand.devices is None or found.devices <= demand.devices
    if found.met and demand.rate is not None:
        assert found.rate >= demand.rate * (1 + demand.headroom) * (1 - 1e-6)
    assert all(unit in units for unit, _ in found.copies)


H100 = Stock(pool="h100", devices_per_node=8, price_per_hour=24.0)
A100 = Stock(pool="a100", devices_per_node=8, price_per_hour=12.0)
FAST = Unit(name="1", rate=10, users=100, sizes={"h100": (4,)}, metrics={"ttft_p95_ms": 100})
CHEAP = Unit(name="2", rate=4, users=50, sizes={"a100": (4,)}, metrics={"ttft_p95_ms": 400})


def test_the_cheapest_pool_serves_and_a_limit_moves_the_rest() -> None:
    one = plan([FAST, CHEAP], [H100, A100], Demand(rate=40))
    assert (one.nodes, one.cost_per_hour) == ({"h100": 2}, 48.0), "10 a copy at 12: cheaper than 4 at 6"
    few = plan(
        [FAST, CHEAP], [Stock(pool="h100", devices_per_node=8, nodes=1, price_per_hour=24), A100], Demand(rate=40)
    )
    assert (few.nodes, few.cost_per_hour) == ({"h100": 1, "a100": 3}, 60.0)
    assert few.rate == 40, "no more devices than it takes, though the nodes have room"


def test_users_headroom_and_a_number_of_devices() -> None:
    assert plan([FAST], [H100], Demand(users=350)).nodes == {"h100": 2}
    assert plan([FAST], [H100], Demand(users=350, headroom=0.2)).nodes == {"h100": 3}
    most = plan([FAST, CHEAP], [H100, A100], Demand(devices=64))
    assert (most.met, most.rate, most.devices, most.served_share) == (True, 160, 64, None)
    assert most.nodes == {"h100": 8}


def test_what_cannot_be_met_says_the_nearest() -> None:
    stocks = [Stock(pool="h100", devices_per_node=8, nodes=2, price_per_hour=24.0)]
    nearest = plan([FAST], stocks, Demand(rate=100))
    assert (nearest.met, nearest.rate, nearest.served_share) == (False, 40, pytest.approx(0.4))
    assert nearest.nodes == {"h100": 2}


def test_copies_count_for_the_measured_efficiency_and_one_alone_for_all_of_itself() -> None:
    assert plan([FAST], [H100], Demand(rate=10), efficiency=0.9).copies == ((FAST, 1),)
    three = plan([FAST], [H100], Demand(rate=20), efficiency=0.9)
    assert three.copies == ((FAST, 3),)
    assert three.rate == pytest.approx(27)


def test_replicas_are_packed_and_not_only_counted() -> None:
    unit = Unit(name="1", rate=1, users=1, sizes={"h100": (5,)})
    assert plan([unit], [H100], Demand(rate=3)).nodes == {"h100": 3}, "15 devices fit 2 nodes, three 5s do not"
    spanning = Unit(name="2", rate=1, users=1, sizes={"h100": (12, 4)})
    assert plan([spanning], [H100], Demand(rate=2)).nodes == {"h100": 5}, "two times two whole nodes, and 4 + 4"


def test_patterns_are_the_maximal_fillings() -> None:
    assert sorted(map(sorted, (p.elements() for p in patterns([3, 5], 8)))) == [[3, 3], [3, 5]]
    assert [dict(p) for p in patterns([4], 8)] == [{4: 2}]
    with pytest.raises(InvalidValueError, match="more than 5000 patterns"):
        patterns(list(range(1, 30)), 128)


def test_a_node_of_too_many_patterns_is_counted_and_says_so() -> None:
    sizes = {"big": tuple(range(7, 40))}
    found = plan(
        [Unit(name="1", rate=1, users=1, sizes=sizes)], [Stock(pool="big", devices_per_node=191)], Demand(rate=1)
    )
    assert found.exact_packing == {"big": False}
    assert found.cost_per_hour is None


def test_a_unit_that_another_beats_is_left_out() -> None:
    worse = Unit(name="3", rate=9, users=90, sizes={"h100": (4,)})
    larger = Unit(name="4", rate=10, users=100, sizes={"h100": (4, 4)})
    other = Unit(name="5", rate=9, users=120, sizes={"h100": (4,)})
    assert {unit.name for unit in undominated([worse, larger, FAST, other])} == {"1", "5"}
    predicted = Unit(name="6", rate=99, users=999, sizes={"h100": (4,)}, predicted=True)
    assert {unit.name for unit in undominated([FAST, predicted])} == {"1", "6"}, (
        "a prediction never ousts a measurement"
    )


@pytest.mark.parametrize(
    ("units", "stocks", "demand", "part"),
    [
        ([FAST], [A100], {"rate": 1.0}, "no deployment fits the node pools"),
        ([FAST], [H100], {}, "nothing is demanded"),
        ([FAST], [H100], {"rate": -1.0}, "rate=-1.0"),
        ([FAST], [H100], {"rate": 1.0, "headroom": -0.1}, "headroom"),
    ],
)
def test_what_makes_no_plan_is_told(
    units: list[Unit], stocks: list[Stock], demand: dict[str, float], part: str
) -> None:
    with pytest.raises(InvalidValueError, match=part):
        plan(units, stocks, Demand(**demand))  # type: ignore[arg-type]  # numbers by name
