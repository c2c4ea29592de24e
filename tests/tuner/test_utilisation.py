from __future__ import annotations

from dataclasses import replace

import pytest

from search_spaces.serving import Parallelism, Pool, Role, ServingConfig
from tests.studies.toy import toy_problem
from tuner.utilisation import Utilisation, crowded_pools


def test_time_counts_only_while_proposals_remain() -> None:
    used = Utilisation(devices=4)
    used.add(10.0, 0, proposals_remain=True)
    used.add(11.0, 3, proposals_remain=True)
    used.add(13.0, 2, proposals_remain=True)
    used.add(20.0, 0, proposals_remain=False)
    assert used.use.reserved_device_s == pytest.approx(2 * 3)
    assert used.use.device_s == pytest.approx(3 * 4)
    assert str(used.use).startswith("while proposals remained, trials held 50% of the device-seconds")


def test_nothing_is_used_before_time_passes() -> None:
    used = Utilisation(devices=4)
    used.add(1.0, 4, proposals_remain=True)
    assert used.use.share == 0.0


def deployment(**devices: int) -> ServingConfig:
    """Pools of so many devices on the node pools that are named: one mixed pool, or prefill and decode."""
    roles = (Role.MIXED,) if len(devices) == 1 else (Role.PREFILL, Role.DECODE)
    pools = tuple(
        Pool(role=role, node_pool=name, parallelism=Parallelism(tp=count))
        for role, (name, count) in zip(roles, devices.items(), strict=True)
    )
    return ServingConfig(engine="emulated", pools=pools)


NODE_POOLS = tuple(replace(toy_problem().node_pools[0], name=name, devices_per_node=8) for name in ("old", "new"))


def test_a_pool_is_crowded_once_what_waits_would_fill_it_again() -> None:
    held, one = [deployment(new=8)], deployment(new=4)
    assert crowded_pools(NODE_POOLS, held, [one]) == set()
    assert crowded_pools(NODE_POOLS, held, [one, one]) == {"new"}


def test_where_every_pool_is_crowded_none_is() -> None:
    held = [deployment(new=8), deployment(old=8)]
    assert crowded_pools(NODE_POOLS, held, [deployment(new=8), deployment(old=8)]) == set()


def test_a_deployment_waits_for_the_pools_that_lack_devices_alone() -> None:
    across = deployment(new=4, old=4)
    assert crowded_pools(NODE_POOLS, [deployment(new=8)], [across, across]) == {"new"}


def test_a_deployment_whose_devices_are_free_but_scattered_waits_for_all_its_pools() -> None:
    assert crowded_pools(NODE_POOLS, [deployment(new=2)], [deployment(new=4)] * 2) == {"new"}
