"""Times of operations on a system without tables: those of the most similar system that has them, by utilisation.

A measured time is a utilisation of the measured system. The system without tables is given the same utilisation: the
time is scaled by the ratio of the speeds of light of the two. Everything borrowed counts as roofline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from perf_model.costs import OperationCosts, attention_light, longest
from perf_model.curves import Curve, Origin, Surface, total
from perf_model.operations import AttentionOperation, Concurrent, Hop, Launches, MemoryMove, TokenOperation
from perf_model.systems import GpuSystem, read_system
from perf_model.tables import TableStore
from search_spaces.errors import InvalidValueError


@dataclass(frozen=True)
class BorrowedCosts:
    """Costs on `system` from those of `donor`, another system with the same engine."""

    system: GpuSystem
    donor: OperationCosts

    @property
    def _here(self) -> OperationCosts:
        """The donor's tables with this system's speeds: for speeds of light, and for what needs no table."""
        return replace(self.donor, system=self.system)

    def token_curve(self, operation: TokenOperation | Concurrent) -> Curve:
        """Milliseconds a step over the rank's tokens."""
        if isinstance(operation, Concurrent):
            groups = (operation.first, operation.second)
            first, second = (total([self.token_curve(op) for op in group]) for group in groups)
            return longest(first, second)
        if isinstance(operation, MemoryMove | Launches | Hop):
            return self._here.token_curve(operation)
        found = self.donor.token_curve(operation)
        x = np.maximum(found.x, 1.0)
        ratio = self._here.token_light(operation, x) / self.donor.token_light(operation, x)
        return Curve(x=found.x, y=found.y * ratio, low=found.low, high=found.high, origin=Origin.ROOFLINE)

    def surface(self, operation: AttentionOperation, *, decode: bool) -> Surface:
        """Milliseconds of one layer over sequences and length."""
        found = self.donor.surface(operation, decode=decode)
        rows, columns = np.meshgrid(found.rows, np.maximum(found.columns, 1.0), indexing="ij")
        here = attention_light(self.system, operation, decode=decode)(rows, columns)
        there = attention_light(self.donor.system, operation, decode=decode)(rows, columns)
        return replace(found, z=found.z * (here / there) ** found.power, origin=Origin.ROOFLINE)

    def module_formats(self) -> frozenset[str]:
        """Formats in which latent attention is tabled as a module."""
        return self.donor.module_formats()


def nearest_system(root: Path, engine: str, system: GpuSystem) -> GpuSystem | None:
    """The system with tables of `engine` whose bandwidth and FLOP/s are nearest to those of `system`, None for none."""
    measured = sorted(path.parent.parent.name for path in (root / "data").glob(f"*/gemm/{engine}") if path.is_dir())
    candidates = []
    for name in measured:
        try:
            candidates.append(read_system(root, name))
        except InvalidValueError:
            continue  # tables without a system file cannot lend: their speed of light is unknown
    return min(candidates, key=lambda other: _distance(system, other), default=None)


def _distance(one: GpuSystem, other: GpuSystem) -> float:
    bandwidth = math.log(one.memory_bandwidth / other.memory_bandwidth)
    return abs(bandwidth) + abs(math.log(one.peak("bf16") / other.peak("bf16")))


def costs_of(root: Path, system: GpuSystem, engine: str, *, repair: bool) -> OperationCosts | BorrowedCosts:
    """Costs on `system`: from its own tables, borrowed from the nearest system's, or from the roofline alone."""
    own = OperationCosts(TableStore(root, system.name, engine), system, repair)
    if (root / "data" / system.name / "gemm" / engine).is_dir():
        return own
    donor = nearest_system(root, engine, system)
    if donor is None:
        return own
    return BorrowedCosts(system, OperationCosts(TableStore(root, donor.name, engine), donor, repair))
