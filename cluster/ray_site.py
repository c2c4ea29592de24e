"""What all deployments of a runner share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cluster.cores import CoreLedger
from cluster.node_facts import NodeFacts
from cluster.processes import ProcessId
from cluster.ray_nodes import NodeWatch
from cluster.ray_session import RayCluster


@dataclass(frozen=True, kw_only=True)
class Site:
    """What all deployments of a runner share. `ledgers` are the cores of each machine, by its id.

    Clients must send `api_key` to every engine and router. `watch` knows which nodes are really there.
    """

    study: str
    cluster: RayCluster
    coordinator: ProcessId
    work_dir: Path
    api_key: str = field(repr=False)
    watch: NodeWatch
    ledgers: dict[str, CoreLedger] = field(default_factory=dict)

    def ledger(self, facts: NodeFacts) -> CoreLedger:
        """The core ledger of the machine that `facts` describe."""
        return self.ledgers.setdefault(facts.machine, CoreLedger(facts.cores))
