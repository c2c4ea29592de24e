"""How well a study used the devices that it may use."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.errors import require


@dataclass(frozen=True, kw_only=True)
class DeviceUse:
    """Device-seconds of all node pools while there was something left to propose, and those that trials held of them.

    A device counts as held from the placement of a trial until its outcome is known; deployments that are kept warm do
    not count.
    """

    reserved_device_s: float = 0.0
    device_s: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.reserved_device_s >= 0 and self.device_s >= 0,
            f"device-seconds {self.reserved_device_s} of {self.device_s} must not be negative",
        )

    @property
    def share(self) -> float:
        """Held share of all device-seconds, 0 before any time has passed."""
        return self.reserved_device_s / self.device_s if self.device_s > 0 else 0.0

    def and_then(self, later: DeviceUse) -> DeviceUse:
        """This use and a later one, as one."""
        return DeviceUse(
            reserved_device_s=self.reserved_device_s + later.reserved_device_s, device_s=self.device_s + later.device_s
        )

    def __str__(self) -> str:
        return (
            f"while proposals remained, trials held {self.share:.0%} of the device-seconds of the node pools "
            f"({self.reserved_device_s:,.0f} of {self.device_s:,.0f})"
        )
