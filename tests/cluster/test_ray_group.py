"""Placement groups that are given back while Ray places them: the devices come back."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table, remove_placement_group

from cluster import ray_group
from cluster.ray_group import Group
from cluster.ray_session import RayCluster

pytestmark = pytest.mark.ray


@pytest.fixture
def states_at_removal(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Ray's word on each group in the moment in which its removal is ordered: state, and how its placing stands."""
    assert ray_cluster.address
    seen: list[tuple[str, str]] = []

    def look_and_remove(group: Any) -> None:
        table = placement_group_table(group)
        seen.append((table["state"], table["stats"]["scheduling_state"]))
        remove_placement_group(group)

    monkeypatch.setattr(ray_group, "remove_placement_group", look_and_remove)
    return seen


def bundles(cores: float) -> Group:
    return Group([{"CPU": cores}], name="given back at once", selectors=[{}])


def free_cores() -> float:
    found: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return found.get("CPU", 0.0)


def wait_for_cores(wanted: float) -> None:
    deadline = time.monotonic() + 30.0
    while (free := free_cores()) < wanted:
        assert time.monotonic() < deadline, f"{wanted - free:g} cores are lost"
        time.sleep(0.1)


def test_groups_are_removed_when_they_are_placed_or_refused_and_their_cores_come_back(
    states_at_removal: list[tuple[str, str]],
) -> None:
    before = free_cores()
    for _ in range(20):
        bundles(1.0).remove()
    placed, refused = ("CREATED", "FINISHED"), ("PENDING", "NO_RESOURCES")  # Ray learns late of cores that came back
    assert set(states_at_removal) <= {placed, refused}
    assert placed in states_at_removal
    wait_for_cores(before)


def test_a_group_that_does_not_fit_is_removed_when_it_is_refused(states_at_removal: list[tuple[str, str]]) -> None:
    before, total = free_cores(), ray.cluster_resources()["CPU"]  # type: ignore[no-untyped-call]
    holder = bundles(1.0)
    while not holder.is_placed():
        time.sleep(0.02)
    for group in (bundles(total), bundles(total + 1.0)):
        began_s = time.monotonic()
        group.remove()
        assert time.monotonic() - began_s < ray_group.SETTLE_LIMIT_S
    assert states_at_removal == [("PENDING", "NO_RESOURCES"), ("PENDING", "INFEASIBLE")]
    holder.remove()
    wait_for_cores(before)


def test_a_removal_goes_on_without_ray_and_says_so(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert ray_cluster.address
    group = bundles(1.0)
    removed: list[object] = []
    stuck = {"state": "PENDING", "stats": {"scheduling_state": "SCHEDULING_STARTED"}}
    monkeypatch.setattr(ray_group, "SETTLE_LIMIT_S", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(ray_group, "placement_group_table", lambda _group: stuck)
        patched.setattr(ray_group, "remove_placement_group", removed.append)
        group.remove()
    assert len(removed) == 1
    assert "may be lost until its node is started anew" in caplog.text
    group.remove()
