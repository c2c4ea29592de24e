"""The question a study answers."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.errors import InvalidValueError, require
from search_spaces.hardware import NodePool
from search_spaces.metrics import Direction, metric_info
from search_spaces.model import ModelSpec
from search_spaces.serving import ServingConfig
from search_spaces.slos import Slo
from search_spaces.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A metric to optimise in its better direction."""

    metric: str

    def __post_init__(self) -> None:
        metric_info(self.metric)

    @property
    def direction(self) -> Direction:
        """Better direction of the metric."""
        return metric_info(self.metric).direction


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model and a workload to serve on node pools, judged by objectives under SLOs."""

    model: ModelSpec
    workload: Workload
    node_pools: tuple[NodePool, ...]
    objectives: tuple[Objective, ...]
    slos: tuple[Slo, ...] = ()

    def __post_init__(self) -> None:
        require(
            2 <= len(self.objectives) <= 4,
            f"{len(self.objectives)} objectives were given; a study takes two to four",
        )
        names = [pool.name for pool in self.node_pools]
        require(bool(names), "node_pools is empty; give at least one")
        require(len(set(names)) == len(names), f"node pool names {names} repeat; make them unique")

    def node_pool(self, name: str) -> NodePool:
        """The pool called `name`; raises `InvalidValueError` with the known names."""
        for pool in self.node_pools:
            if pool.name == name:
                return pool
        known = ", ".join(pool.name for pool in self.node_pools)
        raise InvalidValueError(f"node pool {name!r} is unknown; choose {known}")

    def price_per_hour(self, config: ServingConfig) -> float:
        """Dollars per hour of the devices that `config` reserves."""
        return sum(pool.devices * self.node_pool(pool.node_pool).price_per_device_hour for pool in config.pools)


__all__ = ["Objective", "Problem", "Slo"]
