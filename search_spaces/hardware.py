"""The machines: devices, node pools and the cluster they form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from search_spaces.errors import require


class DeviceKind(StrEnum):
    """What a device is. On a CPU pool one device is one core."""

    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak figures of one device (a GPU, or one CPU core).

    `flops` maps a precision (`bf16`, `fp8`, `int8`, `fp4`, `fp32`) to dense FLOP/s. Bandwidths are bytes/s for each
    direction; `link_bandwidth` joins devices of a node, `network_bandwidth` joins nodes (both per device).
    """

    name: str
    kind: DeviceKind
    memory_bytes: float
    memory_bandwidth: float
    flops: Mapping[str, float]
    link_bandwidth: float
    network_bandwidth: float
    power_w: float | None = None

    def __post_init__(self) -> None:
        for label in ("memory_bytes", "memory_bandwidth", "link_bandwidth", "network_bandwidth"):
            value = getattr(self, label)
            require(value > 0, f"{label}={value} of device {self.name!r} must be above 0")
        require(bool(self.flops), f"device {self.name!r} names no precision in flops; give at least one, such as bf16")


@dataclass(frozen=True, kw_only=True)
class NodePool:
    """`nodes` identical nodes. `price_per_hour` is dollars per node.

    `devices_per_node` are the devices that replicas may reserve; the load generator and the router take CPU cores of
    their own beyond these. A pool is found in Ray by `labels` or by `accelerator_type`; a CPU pool without either is
    any node.
    """

    name: str
    device: Device
    nodes: int
    devices_per_node: int
    price_per_hour: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str | None = None

    def __post_init__(self) -> None:
        require(self.nodes >= 1, f"nodes={self.nodes} of pool {self.name!r} must be at least 1")
        require(
            self.devices_per_node >= 1,
            f"devices per node={self.devices_per_node} of pool {self.name!r} must be at least 1",
        )
        require(
            self.price_per_hour >= 0,
            f"price_per_hour={self.price_per_hour} of pool {self.name!r} must not be negative",
        )

    @property
    def devices(self) -> int:
        """Devices in the pool."""
        return self.nodes * self.devices_per_node

    @property
    def price_per_device_hour(self) -> float:
        """Dollars for one device for one hour."""
        return self.price_per_hour / self.devices_per_node
