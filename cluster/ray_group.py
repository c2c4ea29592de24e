"""A placement group of Ray: asked for, looked at, and given back at a moment when Ray can take it back.

Ray 2.60 loses what it is reserving for a group that is removed just then: the devices stay taken until their node is
started anew, and everything that needs them waits without end (https://github.com/ray-project/ray/issues/64693).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

SETTLE_LIMIT_S = 5.0
"""So long a removal waits for Ray to have placed a group, or refused it."""
_LOOK_S = 0.01
_UNDER_WAY = frozenset({"PENDING", "PREPARED", "RESCHEDULING"})
_REFUSED = frozenset({"NO_RESOURCES", "INFEASIBLE"})
_log = logging.getLogger(__name__)


class Group:
    """A packed placement group of `bundles`, asked for as it is made; `selectors` are labels of nodes, one for each.

    Ray lists it as `name` and some letters of its own: Ray wants a name once in a cluster, and the group of a
    coordinator that was killed may still be there when the next one asks for the same deployment.
    """

    def __init__(
        self, bundles: Sequence[Mapping[str, float]], *, name: str, selectors: Sequence[Mapping[str, str]]
    ) -> None:
        self._name = f"{name}:{uuid.uuid4().hex[:8]}"
        self._group: PlacementGroup = placement_group(
            [dict(bundle) for bundle in bundles],
            strategy="PACK",
            name=self._name,
            bundle_label_selector=[dict(labels) for labels in selectors],
        )

    def is_placed(self) -> bool:
        """True once the devices are reserved."""
        return bool(self._table().get("state") == "CREATED")

    def scheduling(self, index: int) -> PlacementGroupSchedulingStrategy:
        """What puts an actor into bundle `index`."""
        return PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=index)

    def remove(self) -> None:
        """Give it back, placed or not, which ends its actors; waits up to `SETTLE_LIMIT_S` while Ray is placing it."""
        until_s = time.monotonic() + SETTLE_LIMIT_S
        while not (settled := self._is_settled()) and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        if not settled:
            _log.warning(
                "Ray had neither placed nor refused group %s after %g s; what it reserves for it may be lost until "
                "its node is started anew",
                self._name,
                SETTLE_LIMIT_S,
            )
        remove_placement_group(self._group)

    def _is_settled(self) -> bool:
        table = self._table()
        if table.get("state") in _UNDER_WAY:
            return table["state"] != "PREPARED" and table["stats"]["scheduling_state"] in _REFUSED
        return True

    def _table(self) -> dict[str, Any]:
        """What Ray has of the group; empty where it knows it no more."""
        table: dict[str, Any] = placement_group_table(self._group)
        return table
