"""Where processes go that run on plain machines, by a shell script or in containers on the host's network.

They keep the nodes, the devices and the cores that they were measured on. The endpoint gets the first port, the others
the ports after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search_spaces.errors import require
from search_spaces.outcome import LaunchedProcess
from tuner.deploy.chosen import Chosen
from tuner.deploy.layout import ROUTER, Place, PlaceOf

LOOPBACK = "127.0.0.1"
Node = tuple[str, str]
"""The name of a machine and the address at which its processes listened."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where a process finds its files: `work` what it reads, `shared` what it hands over, `model` its weights."""

    work: str
    shared: str
    model: str | None


def measured_nodes(chosen: Chosen) -> tuple[Node, ...]:
    """The machines of the measurement, in the order of their processes."""
    machines: dict[str, str] = {}
    for process in chosen.processes.values():
        known = machines.get(process.node, LOOPBACK)
        machines[process.node] = process.host if known == LOOPBACK else known
    return tuple(machines.items())


def on_nodes(chosen: Chosen, folders: Folders, *, base_port: int, hosts: Sequence[str] = ()) -> PlaceOf:
    """Places on the measured machines; `hosts` replaces their addresses, in order.

    Raises `InvalidValueError` where the number of hosts is another, or the ports end.
    """
    nodes = measured_nodes(chosen)
    require(
        len(hosts) in {0, len(nodes)},
        f"{len(hosts)} hosts were given, but the trial ran on {len(nodes)} ({', '.join(name for name, _ in nodes)}); "
        "give one for each, in this order",
    )
    names = list(chosen.processes)
    first = [ROUTER] if ROUTER in names else []
    ports = {name: base_port + i for i, name in enumerate(first + [name for name in names if name not in first])}
    require(
        base_port >= 1 and max(ports.values()) <= 65535,
        f"port={base_port} leaves no room for {len(ports)} processes up to 65535; choose a lower one",
    )
    addresses = dict(zip((name for name, _ in nodes), hosts or (host for _, host in nodes), strict=True))

    def place(process: LaunchedProcess) -> Place:
        host, port = addresses[process.node], ports[process.name]
        return Place(
            host=host,
            port=port,
            url=f"http://{host}:{port}",
            device_ids=process.device_ids,
            work_dir=folders.work,
            shared_dir=folders.shared,
            model_source=None if process.model_source is None else folders.model,
        )

    return place
