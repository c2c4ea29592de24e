"""How many copies of which deployments, on how many nodes, serve a demand at the least cost: an integer program.

A unit is a deployment whose rate and latencies are known under one load. The plan runs copies of units side by side,
each under the load that it was measured with. Copies are assumed to scale linearly; where a study measured how several
replicas of a configuration compare with one, each copy counts for that `efficiency` as soon as there are two (see
`tuner.plan_units`). Nodes are rented whole. Replicas are packed into nodes exactly: a node of a pool holds one of the
patterns of replica sizes that fit, unless the sizes divide each other and the node, where counting devices is exact
already. A replica that is larger than a node takes whole nodes of its own.

The program is solved by HiGHS (`scipy.optimize.milp`): to optimality where that takes less than `TIME_LIMIT_S`, else to
the best plan known by then, whose distance from the optimum the plan tells.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from search_spaces.errors import InvalidValueError, require

MOST_PATTERNS = 5000
"""Patterns of a pool's node above which packing is not exact any more, but counts devices; the plan says so then."""
TIME_LIMIT_S = 1.2
"""Seconds for each solution; a plan takes one or two."""
_TOLERANCE = 1e-9
_OPTIMAL = 1e-6
_LIMIT_REACHED = 1
"""Status of `milp` where it ran into its time limit."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One copy of a deployment: requests/s and requests in flight that it serves, and the devices of its replicas.

    `sizes` holds the devices of every replica, by node pool. `metrics` are those under that load; `predicted` ones were
    never measured.
    """

    name: str
    rate: float
    users: float
    sizes: Mapping[str, tuple[int, ...]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    predicted: bool = False

    def __post_init__(self) -> None:
        require(self.rate > 0, f"rate={self.rate} of unit {self.name} must be above 0")
        require(bool(self.sizes), f"unit {self.name} uses no node pool; give the devices of its replicas")

    @property
    def devices(self) -> int:
        """Devices of all replicas."""
        return sum(sum(sizes) for sizes in self.sizes.values())


@dataclass(frozen=True, kw_only=True)
class Stock:
    """Nodes of a pool: at most `nodes` of them, None for as many as it takes. `price_per_hour` is 0 where unknown."""

    pool: str
    devices_per_node: int
    nodes: int | None = None
    price_per_hour: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.devices_per_node >= 1, f"devices per node={self.devices_per_node} of {self.pool} must be at least 1"
        )
        require(self.nodes is None or self.nodes >= 0, f"nodes={self.nodes} of {self.pool} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What to serve: requests/s, requests in flight (users), or both, with `headroom` (a share) on top.

    With neither, as much as `devices` can. `devices` limits those that replicas take.
    """

    rate: float | None = None
    users: float | None = None
    devices: int | None = None
    headroom: float = 0.0

    def __post_init__(self) -> None:
        for label in ("rate", "users", "devices"):
            value = getattr(self, label)
            require(value is None or value > 0, f"{label}={value} must be above 0")
        require(self.headroom >= 0, f"headroom={self.headroom} must not be negative")
        require(
            any(value is not None for value in (self.rate, self.users, self.devices)),
            "nothing is demanded; give a rate, a number of users, or a number of devices",
        )

    @property
    def open_ended(self) -> bool:
        """True where as much as possible is wanted."""
        return self.rate is None and self.users is None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Copies of each unit and nodes of each pool. `met` is False for the nearest that can be had.

    `served_share` is the share of the demand, headroom included, that it serves; None where none was given. `cost` is
    what was made small: dollars an hour, or devices of nodes where a price is missing; `cost_per_hour` is None then.
    `gap` is how far it may be from the best, relative; 0 where it is the best. `exact_packing` is False for pools where
    devices were counted instead of packed.
    """

    copies: tuple[tuple[Unit, int], ...]
    nodes: Mapping[str, int]
    rate: float
    users: float
    cost_per_hour: float | None
    met: bool
    served_share: float | None
    cost: float = 0.0
    gap: float = 0.0
    efficiency: float = 1.0
    exact_packing: Mapping[str, bool] = field(default_factory=dict)

    @property
    def devices(self) -> int:
        """Devices that replicas take."""
        return sum(unit.devices * count for unit, count in self.copies)


def undominated(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """`units` without those that another beats: at least its rate and users, on the same replicas or a part of them."""
    kept: list[tuple[Unit, Mapping[str, Counter[int]]]] = []
    for unit in sorted(units, key=lambda unit: (unit.predicted, unit.devices, -unit.rate)):
        sizes = {pool: Counter(found) for pool, found in unit.sizes.items()}
        if not any(_beats(other, have, unit, sizes) for other, have in kept):
            kept = [(o, h) for o, h in kept if not _beats(unit, sizes, o, h)]
            kept.append((unit, sizes))
    return tuple(unit for unit, _ in kept)


def _beats(one: Unit, have: Mapping[str, Counter[int]], other: Unit, need: Mapping[str, Counter[int]]) -> bool:
    if one.rate < other.rate or one.users < other.users or (one.predicted and not other.predicted):
        return False
    return all(pool in need and found <= need[pool] for pool, found in have.items())


def plan(units: Sequence[Unit], stocks: Sequence[Stock], demand: Demand, *, efficiency: float = 1.0) -> Plan:
    """The cheapest plan that meets `demand`; where none does, the one that comes nearest, with `met` False.

    Without prices the plan takes the fewest devices. An open-ended demand is served as far as possible, and then as
    cheaply. Raises `InvalidValueError` where there is no unit or no limit.
    """
    require(0 < efficiency <= 1, f"efficiency={efficiency} must be in (0, 1]")
    usable = [unit for unit in units if _placeable(unit, stocks)]
    if not usable:
        raise InvalidValueError(
            "no deployment fits the node pools; name the pools that the study measured, or give larger ones"
        )
    limited = demand.devices is not None or all(stock.nodes is not None for stock in stocks)
    require(limited or not demand.open_ended, "the demand has no end; give a number of devices or of nodes")
    found = _solved(_Program(undominated(usable), stocks, demand, efficiency), demand)
    if efficiency == 1:
        return found
    alone = [_solved(_Program([unit], stocks, demand, 1.0, most_copies=1), demand) for unit in usable]
    return min((found, *alone), key=lambda plan: _worse(plan, demand))


def _solved(program: _Program, demand: Demand) -> Plan:
    if not demand.open_ended:
        cheapest = program.solve(least_share=1.0)
        if cheapest is not None:
            return program.plan(cheapest, met=True)
    most = program.solve(least_share=None)
    if most is None:
        raise InvalidValueError("the plan's program has no solution; report this with the command that led to it")
    share = program.share_of(most)
    best = program.solve(least_share=share * (1 - _TOLERANCE)) if share > 0 else None
    return program.plan(most if best is None else best, met=demand.open_ended)


def _worse(plan: Plan, demand: Demand) -> tuple[float, ...]:
    """Sorts plans: those that meet the demand by cost, others by how far they are from it."""
    if plan.met and not demand.open_ended:
        return 0.0, plan.cost, float(plan.devices)
    return 1.0, -plan.rate if demand.open_ended else -(plan.served_share or 0.0), plan.cost


def _placeable(unit: Unit, stocks: Sequence[Stock]) -> bool:
    known = {stock.pool: stock for stock in stocks if stock.nodes != 0}
    return all(pool in known for pool in unit.sizes)


def patterns(sizes: Sequence[int], room: int) -> list[Counter[int]]:
    """The fullest ways to put replicas of `sizes` (distinct) into a node of `room` devices.

    Raises `InvalidValueError` beyond `MOST_PATTERNS`.
    """
    found: list[Counter[int]] = []
    for pattern in _fill(sorted(sizes, reverse=True), room):
        found.append(Counter({size: count for size, count in pattern.items() if count}))
        if len(found) > MOST_PATTERNS:
            raise InvalidValueError(f"more than {MOST_PATTERNS} patterns of {sorted(sizes)} in {room} devices")
    return found


def _fill(sizes: Sequence[int], room: int) -> Iterator[dict[int, int]]:
    """Maximal fillings: the smallest size is taken as often as it fits."""
    size, *smaller = sizes
    if not smaller:
        yield {size: room // size}
        return
    for count in range(room // size, -1, -1):
        for rest in _fill(smaller, room - count * size):
            yield {size: count, **rest}


def _divide_each_other(sizes: Sequence[int], room: int) -> bool:
    chain = [*sorted(sizes), room]
    return all(larger % smaller == 0 for smaller, larger in pairwise(chain))


@dataclass
class _PoolColumns:
    """Variables of a pool: the nodes of each pattern; one column that counts nodes where counting devices is exact."""

    stock: Stock
    first: int
    fillings: list[Counter[int]] | None
    exact: bool

    @property
    def width(self) -> int:
        return len(self.fillings) if self.fillings is not None else 1


class _Program:
    """The integer program. Columns: copies of each unit, nodes by pool and pattern, the served share of the demand."""

    def __init__(
        self,
        units: Sequence[Unit],
        stocks: Sequence[Stock],
        demand: Demand,
        efficiency: float,
        *,
        most_copies: float = math.inf,
    ) -> None:
        self._units, self._demand, self._efficiency, self._most_copies = units, demand, efficiency, most_copies
        used = {pool for unit in units for pool in unit.sizes}
        self._pools: list[_PoolColumns] = []
        column = len(units)
        for stock in stocks:
            if stock.pool in used:
                self._pools.append(self._pool(stock, column))
                column += self._pools[-1].width
        self._share, self._width = column, column + 1
        self._gap = 0.0
        self._rows: list[dict[int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []
        self._constrain()

    def _pool(self, stock: Stock, first: int) -> _PoolColumns:
        sizes = sorted(
            {s for unit in self._units for s in unit.sizes.get(stock.pool, ()) if s <= stock.devices_per_node}
        )
        if not sizes or _divide_each_other(sizes, stock.devices_per_node):
            return _PoolColumns(stock=stock, first=first, fillings=None, exact=True)
        try:
            fillings = patterns(sizes, stock.devices_per_node)
        except InvalidValueError:
            return _PoolColumns(stock=stock, first=first, fillings=None, exact=False)
        return _PoolColumns(stock=stock, first=first, fillings=fillings, exact=True)

    def _row(self, entries: Mapping[int, float], low: float, high: float) -> None:
        self._rows.append(dict(entries))
        self._low.append(low)
        self._high.append(high)

    def _constrain(self) -> None:
        demand = self._demand
        scale = 1.0 + demand.headroom
        targets = [("rate", demand.rate), ("users", demand.users)]
        if demand.open_ended:
            targets = [("rate", 1.0)]
        for name, target in targets:
            if target is not None:
                self._row(self._served(name, target * scale), 0.0, np.inf)
        if demand.devices is not None:
            self._row({i: float(unit.devices) for i, unit in enumerate(self._units)}, 0.0, float(demand.devices))
        for pool in self._pools:
            self._constrain_pool(pool)

    def _served(self, name: str, target: float) -> dict[int, float]:
        """What is served, as a share of `target`, less the share that counts as served."""
        entries: dict[int, float] = {self._share: -1.0}
        for index, unit in enumerate(self._units):
            entries[index] = self._efficiency * getattr(unit, name) / target
        return entries

    def _constrain_pool(self, pool: _PoolColumns) -> None:
        room = pool.stock.devices_per_node
        counts = [Counter(unit.sizes.get(pool.stock.pool, ())) for unit in self._units]
        sizes = sorted({size for count in counts for size in count if size <= room})
        if pool.fillings is None:
            row: dict[int, float] = {pool.first: float(room)}
            for index, count in enumerate(counts):
                row[index] = -float(sum(size * n for size, n in count.items() if size <= room))
            self._row(row, 0.0, np.inf)
        else:
            for size in sizes:
                row = {pool.first + i: float(filling[size]) for i, filling in enumerate(pool.fillings)}
                row |= {index: -float(count[size]) for index, count in enumerate(counts)}
                self._row(row, 0.0, np.inf)
        if pool.stock.nodes is not None:
            self._row(self._nodes(pool), 0.0, float(pool.stock.nodes))

    def _nodes(self, pool: _PoolColumns) -> dict[int, float]:
        """The number of nodes of `pool`, those of replicas that take whole nodes included."""
        room = pool.stock.devices_per_node
        entries = {pool.first + i: 1.0 for i in range(pool.width)}
        for index, unit in enumerate(self._units):
            whole = sum(math.ceil(size / room) for size in unit.sizes.get(pool.stock.pool, ()) if size > room)
            if whole:
                entries[index] = float(whole)
        return entries

    @property
    def _priced(self) -> bool:
        return all(pool.stock.price_per_hour > 0 for pool in self._pools)

    def _cost(self) -> NDArray[np.float64]:
        """Dollars an hour, or devices of nodes without prices; and a trifle for each device that replicas take."""
        cost = np.zeros(self._width)
        for pool in self._pools:
            price = pool.stock.price_per_hour if self._priced else float(pool.stock.devices_per_node)
            for column, nodes in self._nodes(pool).items():
                cost[column] += price * nodes
        cheapest = min(cost[cost > 0], default=1.0)
        cost[: len(self._units)] += [1e-6 * cheapest * unit.devices for unit in self._units]
        return cost

    def solve(self, least_share: float | None) -> NDArray[np.float64] | None:
        """The cheapest solution that serves `least_share` of the demand; the one that serves most for None."""
        most = np.inf if self._demand.open_ended else 1.0
        if least_share is None:
            objective = np.zeros(self._width)
            objective[self._share] = -1.0
        else:
            objective = self._cost()
        low, high = np.zeros(self._width), np.full(self._width, np.inf)
        high[: len(self._units)] = self._most_copies
        low[self._share], high[self._share] = least_share or 0.0, max(most, least_share or 0.0)
        integer = np.ones(self._width)
        integer[self._share] = 0
        matrix = lil_matrix((len(self._rows), self._width))
        for index, row in enumerate(self._rows):
            for column, value in row.items():
                matrix[index, column] = value
        limits = LinearConstraint(matrix.tocsr(), self._low, self._high)
        for time_limit_s in (TIME_LIMIT_S, math.inf):  # without any solution in time it takes as long as it takes
            options = {"mip_rel_gap": 0.0, "time_limit": time_limit_s}
            result = milp(objective, integrality=integer, bounds=Bounds(low, high), constraints=limits, options=options)
            if result.x is not None:
                self._gap = max(self._gap, float(result.mip_gap or 0.0))
                return np.asarray(result.x, dtype=np.float64)
            if result.status != _LIMIT_REACHED:
                return None
        return None

    def share_of(self, solution: NDArray[np.float64]) -> float:
        """The share of the demand that `solution` serves."""
        return float(solution[self._share])

    def plan(self, solution: NDArray[np.float64], *, met: bool) -> Plan:
        """`solution` in words of the plan."""
        numbers = np.rint(solution).astype(int)
        copies = tuple((unit, int(n)) for unit, n in zip(self._units, numbers, strict=False) if n > 0)
        nodes = {
            pool.stock.pool: int(sum(numbers[column] * n for column, n in self._nodes(pool).items()))
            for pool in self._pools
        }
        prices = {pool.stock.pool: pool.stock.price_per_hour for pool in self._pools}
        priced = all(prices[name] > 0 for name, n in nodes.items() if n)
        rate = self._efficiency * sum(unit.rate * n for unit, n in copies)
        users = self._efficiency * sum(unit.users * n for unit, n in copies)
        dollars = sum(prices[name] * n for name, n in nodes.items())
        rooms = {pool.stock.pool: pool.stock.devices_per_node for pool in self._pools}
        return Plan(
            copies=tuple(sorted(copies, key=lambda pair: -pair[0].rate * pair[1])),
            nodes={name: n for name, n in nodes.items() if n},
            rate=rate,
            users=users,
            cost_per_hour=dollars if priced else None,
            cost=dollars if self._priced else float(sum(rooms[name] * n for name, n in nodes.items())),
            met=met,
            served_share=None if self._demand.open_ended else self._shares(rate, users),
            gap=self._gap if self._gap > _OPTIMAL else 0.0,
            efficiency=self._efficiency,
            exact_packing={pool.stock.pool: pool.exact for pool in self._pools},
        )

    def _shares(self, rate: float, users: float) -> float:
        scale = 1.0 + self._demand.headroom
        pairs = ((rate, self._demand.rate), (users, self._demand.users))
        return min(have / (target * scale) for have, target in pairs if target is not None)
