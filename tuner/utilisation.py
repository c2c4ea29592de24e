"""How well a search uses the devices that it may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Utilisation:
    """Device-seconds while there is something left to propose; `devices` are those of all node pools.

    A device counts as reserved from the placement of a trial until its outcome is known; deployments that are kept
    warm do not count.
    """

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
    def share(self) -> float:
        """Reserved share of all device-seconds, 0 before any time has passed."""
        return self.reserved_device_s / self.device_s if self.device_s > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"while proposals remained, trials held {self.share:.0%} of the device-seconds of the node pools "
            f"({self.reserved_device_s:,.0f} of {self.device_s:,.0f})"
        )
