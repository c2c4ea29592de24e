"""The port through which a run of a study reaches the nodes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from cluster.runner import TrialRunner
from search_spaces.hardware import Device, NodePool
from search_spaces.problem import Problem
from tuner.places import Place


class Cluster(Protocol):
    """Nodes that were joined or started."""

    @property
    def trials_at_once(self) -> int:
        """Trials that may be in flight together; those whose devices are busy wait."""
        ...

    def measure(self, pool: NodePool) -> Device:
        """What one device of `pool` can do, measured on a node of it."""
        ...

    def runner(self, study: str) -> TrialRunner:
        """A runner for trials of `study`; closing it stops everything it started."""
        ...


Connect = Callable[[Problem, Place], AbstractContextManager[Cluster]]
"""Joins or starts the nodes that a problem names, for the time of a `with` block."""
