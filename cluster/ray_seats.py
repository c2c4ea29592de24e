"""Where the processes of a deployment are: their nodes, addresses and cores, from when their actors live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.cores import CoreLedger
from cluster.node_facts import NodeFacts
from cluster.placement import Bundle, BundleKind, Placement
from cluster.ray_actors import Seat
from cluster.ray_site import Site

LOOPBACK = "127.0.0.1"


@dataclass(kw_only=True)
class Seats:
    """The seats of the bundles of `placement`, by their names; `owner` is the name of the deployment.

    `facts` are those of the nodes that bundles are on, by bundle; `addresses` those of all nodes, by node id.
    """

    owner: str
    placement: Placement
    site: Site
    facts: dict[str, NodeFacts] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)
    _taken: dict[str, Seat] = field(default_factory=dict)

    def __getitem__(self, bundle: str) -> Seat:
        return self._taken[bundle]

    def is_silent(self, bundle: str) -> bool:
        """True where the node of `bundle` does not answer, whatever Ray says."""
        facts = self.facts.get(bundle)
        return facts is not None and facts.node_id in self.site.watch.lost

    def take(self) -> None:
        """Cores for everyone, the replicas first; one node talks over the loopback address."""
        self.addresses = addresses = {node.node_id: node.ip for node in self.site.cluster.nodes()}
        one_node = len({facts.node_id for facts in self.facts.values()}) == 1
        router = self.placement.router
        for bundle in (*self.placement.replicas, self.placement.client, *((router,) if router else ())):
            facts = self.facts[bundle.name]
            cores = self._grant(bundle, self.site.ledger(facts))
            host = LOOPBACK if one_node else addresses.get(facts.node_id, facts.host)
            devices = facts.gpu_ids if bundle.gpus else cores
            self._taken[bundle.name] = Seat(
                host=host,
                cores=cores,
                device_ids=devices,
                on_gpu=bundle.gpus > 0,
                node=facts.node_id,
                api_key=self.site.api_key,
            )

    def free(self) -> None:
        """Give back the cores."""
        for name in self._taken:
            self.site.ledger(self.facts[name]).free(self._owner(name))

    @property
    def cores(self) -> dict[str, tuple[int, ...]]:
        """The cores of each bundle that has a seat."""
        return {name: seat.cores for name, seat in self._taken.items()}

    @property
    def sharing(self) -> list[str]:
        """Bundles whose cores others have too."""
        return [name for name in self._taken if self.site.ledger(self.facts[name]).shared(self._owner(name))]

    def _grant(self, bundle: Bundle, ledger: CoreLedger) -> tuple[int, ...]:
        owner = self._owner(bundle.name)
        match bundle.kind:
            case BundleKind.CLIENT:
                return ledger.grant_client(owner)
            case BundleKind.ROUTER:
                return ledger.grant_router(owner)
            case BundleKind.REPLICA:
                return ledger.grant_host() if bundle.gpus else ledger.grant_replica(owner, bundle.devices)

    def _owner(self, bundle: str) -> str:
        return f"{self.owner}/{bundle}"
