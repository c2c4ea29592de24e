"""Replicas on GPUs from a directory of operation tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from perf_model.borrowed import BorrowedCosts, costs_of
from perf_model.costs import OperationCosts
from perf_model.footprint import Footprint
from perf_model.hosts import HOSTS, HostedSteps, HostTraits, host_traits
from perf_model.layout import PlanContext, ReplicaLayout, plan
from perf_model.numeric import FloatArray
from perf_model.precision import Precision
from perf_model.steps import TableSteps
from perf_model.systems import GpuSystem, read_system
from perf_model.tables import default_root
from search_spaces.errors import InvalidValueError
from search_spaces.model import LatentAttention, ModelSpec


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

    @property
    def request_ms(self) -> float:
        """Time of a request outside the steps of the engine."""
        latent = sum(g.count for g in self.key.model.layers if isinstance(g.attention, LatentAttention))
        return self.traits.request_ms + self.traits.latent_layer_ms * latent

    def most_sequences(self, isl: FloatArray, osl: FloatArray, token_budget: FloatArray) -> FloatArray:
        """Sequences that fit on an attention rank; below 1 where even one does not.

        Engines that give cache blocks as sequences grow hold sequences of all ages, half their output on average;
        the others reserve the whole length. One sequence must fit whole.
        """
        whole = self.footprint.most_sequences(isl + osl, token_budget)
        if self.traits.reserves_whole:
            return whole
        return np.where(whole < 1.0, whole, self.footprint.most_sequences(isl + osl / 2.0, token_budget))


@dataclass(frozen=True)
class Silicon:
    """Replicas from the tables below `root`; tables, costs and replicas are made once.

    `repair` mends known faults of the public tables (see `OperationCosts`). `hosts` gives the engines' constants.
    """

    root: Path
    repair: bool = True
    hosts: Mapping[str, HostTraits] = field(default_factory=lambda: HOSTS)
    systems: dict[str, GpuSystem] = field(default_factory=dict, compare=False, repr=False)
    _costs: dict[tuple[str, str], OperationCosts | BorrowedCosts] = field(
        default_factory=dict, compare=False, repr=False
    )
    _kernels: dict[ReplicaKey, TableSteps] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _replicas(self) -> dict[ReplicaKey, GpuReplica]:
        return {}

    def system(self, name: str) -> GpuSystem:
        """Facts of a GPU system; raises `InvalidValueError` with the known names."""
        return self.systems.get(name) or read_system(self.root, name)

    def with_system(self, system: GpuSystem) -> Silicon:
        """The same with facts of a system that the directory need not know (its operations have no tables then)."""
        if self.systems.get(system.name) == system:
            return self
        self.systems[system.name] = system
        return self

    def costs(self, system: str, engine: str) -> OperationCosts | BorrowedCosts:
        """Times of operations on `system` with `engine`."""
        key = (system, engine)
        if key not in self._costs:
            self._costs[key] = costs_of(self.root, self.system(system), engine, repair=self.repair)
        return self._costs[key]

    def replica(self, key: ReplicaKey) -> GpuReplica:
        """The replica of `key`; raises `InvalidValueError` where the layout does not divide the model."""
        if key not in self._replicas:
            self._replicas[key] = self._replica(key)
        return self._replicas[key]

    def with_hosts(self, hosts: Mapping[str, HostTraits]) -> Silicon:
        """The same tables and kernels with other constants of the engines."""
        return replace(self, hosts=hosts)

    def kernels(self, key: ReplicaKey) -> TableSteps:
        """Step times of a replica's kernels, without what its host adds."""
        if key not in self._kernels:
            self._kernels[key] = self._kernel_steps(key)
        return self._kernels[key]

    def _kernel_steps(self, key: ReplicaKey) -> TableSteps:
        costs = self.costs(key.system, key.engine)
        context = PlanContext(
            model=key.model,
            layout=key.layout,
            precision=key.precision,
            engine=key.engine,
            gpus_per_node=costs.system.gpus_per_domain,
            module_formats=costs.module_formats(),
        )
        return TableSteps(plan(context), costs)

    def _replica(self, key: ReplicaKey) -> GpuReplica:
        costs, traits = self.costs(key.system, key.engine), host_traits(key.engine, self.hosts)
        footprint = Footprint(
            model=key.model,
            layout=key.layout,
            precision=key.precision,
            system=costs.system,
            memory_share=traits.memory_share,
        )
        steps = HostedSteps(self.kernels(key), traits, key.model.num_layers)
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
