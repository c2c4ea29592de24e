"""A placement group that is asked for again while Ray may not have seen yet what was freed.

Ray looks at a group that did not fit once a second. One that is asked for within some ten milliseconds of the removal
of another on the same devices does not fit yet, and waits for that second; asked for anew it is there a tenth of a
second after the removal (Ray 2.56, one node, measured). Where the devices are really taken, Ray's own pace will do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

ASK_AGAIN_S = (0.1, 0.3, 0.7, 1.5)
"""Seconds after the first asking at which a group that Ray has not begun to place is asked for anew."""


class Group:
    """A packed placement group of `bundles`, asked for as it is made; `selectors` are labels of nodes, one for each."""

    def __init__(
        self,
        bundles: Sequence[Mapping[str, float]],
        *,
        name: str = "",
        selectors: Sequence[Mapping[str, str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bundles, self._name, self._clock = [dict(bundle) for bundle in bundles], name, clock
        self._selectors = None if selectors is None else [dict(labels) for labels in selectors]
        self._again_s = [clock() + delay for delay in ASK_AGAIN_S]
        self.group = self._ask()

    def _ask(self) -> PlacementGroup:
        group: PlacementGroup = placement_group(
            self._bundles, strategy="PACK", name=self._name, bundle_label_selector=self._selectors
        )
        return group

    def is_placed(self) -> bool:
        """True once it is there; look again and again until then, as looking asks for it anew."""
        table: dict[str, Any] = placement_group_table(self.group)
        if table["state"] == "PENDING" and self._again_s and self._clock() >= self._again_s[0]:
            self._again_s = [at_s for at_s in self._again_s if at_s > self._clock()]
            remove_placement_group(self.group)
            self.group = self._ask()
        return bool(table["state"] == "CREATED")

    def remove(self) -> None:
        """Give it back, placed or not, which ends its actors."""
        remove_placement_group(self.group)
