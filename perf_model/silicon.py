"""Replicas on GPUs from a directory of operation tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from perf_model.costs import OperationCosts
from perf_model.footprint import Footprint
from perf_model.hosts import HostedSteps, HostTraits, host_traits
from perf_model.layout import PlanContext, ReplicaLayout, plan
from perf_model.precision import Precision
from perf_model.steps import TableSteps
from perf_model.systems import GpuSystem, read_system
from perf_model.tables import TableStore, default_root
from search_spaces.errors import InvalidValueError
from search_spaces.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class ReplicaKey:
    """What decides the step times of a replica."""

    model: ModelSpec
    system: str
    engine: str
    layout: ReplicaLayout
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class GpuReplica:
    """Step times and memory of one replica."""

    key: ReplicaKey
    steps: HostedSteps
    footprint: Footprint
    traits: HostTraits


@dataclass(frozen=True)
class Silicon:
    """Replicas from the tables below `root`; tables, costs and replicas are made once.

    `repair` mends known faults of the public tables (see `OperationCosts`).
    """

    root: Path
    repair: bool = True

    @cached_property
    def _costs(self) -> dict[tuple[str, str], OperationCosts]:
        return {}

    @cached_property
    def _replicas(self) -> dict[ReplicaKey, GpuReplica]:
        return {}

    def system(self, name: str) -> GpuSystem:
        """Facts of a GPU system; raises `InvalidValueError` with the known names."""
        return read_system(self.root, name)

    def costs(self, system: str, engine: str) -> OperationCosts:
        """Times of operations on `system` with `engine`."""
        key = (system, engine)
        if key not in self._costs:
            self._costs[key] = OperationCosts(TableStore(self.root, system, engine), self.system(system), self.repair)
        return self._costs[key]

    def replica(self, key: ReplicaKey) -> GpuReplica:
        """The replica of `key`; raises `InvalidValueError` where the layout does not divide the model."""
        if key not in self._replicas:
            self._replicas[key] = self._replica(key)
        return self._replicas[key]

    def _replica(self, key: ReplicaKey) -> GpuReplica:
        costs, traits = self.costs(key.system, key.engine), host_traits(key.engine)
        context = PlanContext(
            model=key.model,
            layout=key.layout,
            precision=key.precision,
            engine=key.engine,
            gpus_per_node=costs.system.gpus_per_domain,
            module_formats=costs.module_formats(),
        )
        footprint = Footprint(
            model=key.model,
            layout=key.layout,
            precision=key.precision,
            system=costs.system,
            memory_share=traits.memory_share,
        )
        steps = HostedSteps(TableSteps(plan(context), costs), traits, key.model.num_layers)
        return GpuReplica(key=key, steps=steps, footprint=footprint, traits=traits)


def default_silicon(root: Path | None = None) -> Silicon:
    """Replicas from `root`, or from the installed public tables; raises `InvalidValueError` where there are none."""
    found = root or default_root()
    if found is None:
        raise InvalidValueError(
            "no operation tables are installed; install the extra [silicon] (aiconfigurator-core), or give a directory "
            "of the same layout"
        )
    return Silicon(found)
