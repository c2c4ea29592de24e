"""How well a search uses the devices that it may use, and which node pools enough is waiting for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from search_spaces.hardware import NodePool
from search_spaces.serving import ServingConfig
from studies.device_use import DeviceUse


@dataclass
class Utilisation:
    """Counts the use of `devices`, those of all node pools, while a search runs; see `studies.device_use`."""

    devices: int
    reserved_device_s: float = 0.0
    device_s: float = 0.0
    _last_s: float | None = None
    _reserved: int = 0

    def add(self, now_s: float, reserved: int, *, proposals_remain: bool) -> None:
        """`reserved` devices hold trials from now on; what ends now counts only while `proposals_remain`."""
        if self._last_s is not None and proposals_remain:
            self.reserved_device_s += self._reserved * (now_s - self._last_s)
            self.device_s += self.devices * (now_s - self._last_s)
        self._last_s, self._reserved = now_s, reserved

    @property
    def use(self) -> DeviceUse:
        """What has been counted so far."""
        return DeviceUse(reserved_device_s=self.reserved_device_s, device_s=self.device_s)


def crowded_pools(
    pools: Sequence[NodePool], held: Iterable[ServingConfig], waiting: Iterable[ServingConfig]
) -> frozenset[str]:
    """Names of the `pools` that the deployments `waiting` for devices would fill once more; none where all are.

    A deployment waits for those of its pools that lack free devices beside what is `held`; where none does, their
    devices are free but scattered, and it waits for all of them.
    """
    taken = _devices(held)
    free = {pool.name: pool.devices - taken[pool.name] for pool in pools}
    waited: Counter[str] = Counter()
    for config in waiting:
        wanted = _devices([config])
        short = {name: devices for name, devices in wanted.items() if devices > free[name]}
        waited.update(short or wanted)
    crowded = frozenset(pool.name for pool in pools if waited[pool.name] >= pool.devices)
    return crowded if len(crowded) < len(pools) else frozenset()


def _devices(configs: Iterable[ServingConfig]) -> Counter[str]:
    """Devices of `configs` by node pool."""
    counts: Counter[str] = Counter()
    for config in configs:
        for pool in config.pools:
            counts[pool.node_pool] += pool.devices
    return counts
