"""How well a search uses the devices that it may use."""

from __future__ import annotations

from dataclasses import dataclass

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
