"""Placement groups that are asked for right after another one on the same devices was removed."""

from __future__ import annotations

import time
from typing import Any

import pytest

import cluster.ray_group
from cluster.ray_group import ASK_AGAIN_S, Group
from cluster.ray_session import RayCluster


class FakeRay:
    """Groups that stay in `state`, and what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.state = 100.0, "PENDING"
        self.calls: list[str] = []
        monkeypatch.setattr(cluster.ray_group, "placement_group", self.ask)
        monkeypatch.setattr(cluster.ray_group, "placement_group_table", lambda _group: {"state": self.state})
        monkeypatch.setattr(cluster.ray_group, "remove_placement_group", lambda group: self.calls.append(f"-{group}"))

    def ask(self, _bundles: object, **_options: Any) -> str:
        number = sum(call.startswith("+") for call in self.calls)
        self.calls.append(f"+{number}")
        return str(number)

    def at(self, seconds: float, group: Group) -> bool:
        self.now_s = 100.0 + seconds
        return group.is_placed()


def test_a_group_that_does_not_come_is_asked_for_anew_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    group = Group([{"CPU": 1.0}], clock=lambda: fake.now_s)
    looks = [fake.at(step / 100, group) for step in range(1000)]
    assert not any(looks)
    assert fake.calls == ["+0"] + [call for n in range(len(ASK_AGAIN_S)) for call in (f"-{n}", f"+{n + 1}")]
    fake.state = "CREATED"
    assert fake.at(11.0, group)
    group.remove()
    assert fake.calls[-1] == f"-{len(ASK_AGAIN_S)}"


def test_a_look_that_comes_late_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    group = Group([{"CPU": 1.0}], clock=lambda: fake.now_s)
    assert not fake.at(5.0, group)
    assert not fake.at(6.0, group)
    assert fake.calls == ["+0", "-0", "+1"]


@pytest.mark.parametrize("state", ["PREPARED", "RESCHEDULING", "CREATED"])
def test_what_ray_has_begun_to_place_is_left_alone(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    fake = FakeRay(monkeypatch)
    fake.state = state
    group = Group([{"CPU": 1.0}], clock=lambda: fake.now_s)
    assert fake.at(0.5, group) is (state == "CREATED")
    assert fake.calls == ["+0"]


@pytest.mark.ray
def test_groups_that_follow_each_other_on_all_cores_are_placed(ray_cluster: RayCluster) -> None:
    import ray

    cores = ray.cluster_resources()["CPU"]
    for number in range(3):
        group = Group([{"CPU": cores}], name=f"all-{number}")
        deadline = time.monotonic() + 60.0
        while not group.is_placed():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        group.remove()
    assert ray_cluster.address
