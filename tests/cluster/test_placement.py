from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import (
    BundleKind,
    NodeView,
    Placement,
    PlacementError,
    check_pools,
    fit_together,
    live_nodes,
    missing_nodes,
    needs_router,
    plan_placement,
)
from search_spaces.hardware import DeviceKind, NodePool
from search_spaces.problem import Problem
from search_spaces.rules import group_sizes, packs
from search_spaces.serving import Parallelism, Pool, Role, ServingConfig
from tests.support.ray_problem import CORE, POOL, PROBLEM, aggregated, disaggregated

GPU = replace(CORE, name="H100", kind=DeviceKind.GPU)


def node_pools() -> st.SearchStrategy[tuple[NodePool, ...]]:
    pool = st.builds(
        NodePool,
        name=st.just("first"),
        device=st.sampled_from([CORE, GPU]),
        nodes=st.integers(1, 4),
        devices_per_node=st.integers(1, 8),
        labels=st.sampled_from([{}, {"gpu": "H100"}]),
    )
    return st.tuples(pool, pool.map(lambda p: replace(p, name="second")))


def serving_pools(role: Role) -> st.SearchStrategy[Pool]:
    sizes = st.builds(Parallelism, tp=st.integers(1, 8), pp=st.integers(1, 3), dp=st.integers(1, 2))
    return st.builds(
        Pool,
        role=st.just(role),
        node_pool=st.sampled_from(["first", "second"]),
        replicas=st.integers(1, 4),
        parallelism=sizes,
        devices_per_rank=st.integers(1, 2),
    )


def configs() -> st.SearchStrategy[ServingConfig]:
    mixed = serving_pools(Role.MIXED).map(lambda p: (p,))
    split = st.tuples(serving_pools(Role.PREFILL), serving_pools(Role.DECODE))
    return st.builds(ServingConfig, engine=st.just("any"), pools=st.one_of(mixed, split))


def problem_on(pools: tuple[NodePool, ...]) -> Problem:
    return replace(PROBLEM, node_pools=pools)


@given(configs(), node_pools())
def test_a_plan_holds_every_replica_and_never_more_than_a_node_has(
    config: ServingConfig, pools: tuple[NodePool, ...]
) -> None:
    problem = problem_on(pools)
    try:
        plan = plan_placement(config, problem)
    except PlacementError:
        return
    used: Counter[tuple[str | None, int | None]] = Counter()
    for bundle in plan.replicas:
        used[bundle.node_pool, bundle.node] += bundle.devices
    for (name, node), devices in used.items():
        pool = problem.node_pool(name or "")
        assert 0 <= (node or 0) < pool.nodes
        assert devices <= pool.devices_per_node
    for pool in config.pools:
        for index in range(pool.replicas):
            parts = [b for b in plan.replicas if b.role is pool.role and b.index == index]
            assert sum(b.devices for b in parts) == pool.devices_per_replica
            assert all(b.devices % (pool.parallelism.tp * pool.devices_per_rank) == 0 for b in parts)


@given(configs(), node_pools())
def test_a_plan_reserves_what_it_uses(config: ServingConfig, pools: tuple[NodePool, ...]) -> None:
    problem = problem_on(pools)
    try:
        plan = plan_placement(config, problem)
    except PlacementError:
        return
    kinds = Counter(bundle.kind for bundle in plan.bundles)
    assert kinds[BundleKind.CLIENT] == 1
    assert kinds[BundleKind.ROUTER] == (1 if needs_router(config) else 0)
    assert len({bundle.name for bundle in plan.bundles}) == len(plan.bundles)
    for bundle in plan.replicas:
        on_gpu = problem.node_pool(bundle.node_pool or "").device.kind is DeviceKind.GPU
        assert bundle.resources["GPU" if on_gpu else "CPU"] == bundle.devices
        assert bundle.labels == problem.node_pool(bundle.node_pool or "").labels


def plan_or_reason(config: ServingConfig, problem: Problem) -> Placement | str:
    try:
        return plan_placement(config, problem)
    except PlacementError as error:
        return str(error)


@given(configs(), node_pools())
def test_planning_is_deterministic(config: ServingConfig, pools: tuple[NodePool, ...]) -> None:
    assert plan_or_reason(config, problem_on(pools)) == plan_or_reason(config, problem_on(pools))


@given(configs(), node_pools())
def test_what_the_rules_allow_on_one_node_can_be_placed(config: ServingConfig, pools: tuple[NodePool, ...]) -> None:
    pools = tuple(replace(pool, nodes=1) for pool in pools)
    problem = problem_on(pools)
    allowed = all(packs(group_sizes(config, p.name), p.nodes, p.devices_per_node) for p in pools)
    try:
        plan_placement(config, problem)
    except PlacementError:
        assert not allowed
    else:
        assert allowed


@given(configs(), node_pools())
def test_a_configuration_fits_alone_where_it_has_a_plan(config: ServingConfig, pools: tuple[NodePool, ...]) -> None:
    problem = problem_on(pools)
    if fit_together([config], problem):
        plan_placement(config, problem)


@given(st.lists(configs(), max_size=4), node_pools(), st.integers(0, 4))
def test_what_fits_together_never_takes_more_than_the_live_nodes_have(
    wanted: list[ServingConfig], pools: tuple[NodePool, ...], live: int
) -> None:
    problem = problem_on(pools)
    alive = {pool.name: live for pool in pools}
    if not fit_together(wanted, problem, alive):
        return
    assert fit_together(wanted, problem), "with more nodes it fits too"
    for pool in pools:
        used = sum(p.devices for config in wanted for p in config.pools if p.node_pool == pool.name)
        assert used <= min(live, pool.nodes) * pool.devices_per_node


@given(configs(), node_pools(), st.integers(0, 4))
def test_a_plan_for_the_live_nodes_uses_no_others(
    config: ServingConfig, pools: tuple[NodePool, ...], live: int
) -> None:
    try:
        plan = plan_placement(config, problem_on(pools), {pool.name: live for pool in pools})
    except PlacementError:
        return
    assert all((bundle.node or 0) < live for bundle in plan.replicas)


@given(configs(), node_pools())
def test_the_parts_of_a_replica_are_led_by_one_and_hold_whole_groups(
    config: ServingConfig, pools: tuple[NodePool, ...]
) -> None:
    try:
        plan = plan_placement(config, problem_on(pools))
    except PlacementError:
        return
    assert len(plan.leaders) == sum(pool.replicas for pool in config.pools)
    assert sorted(b.name for leader in plan.leaders for b in plan.parts(leader)) == sorted(
        b.name for b in plan.replicas
    )
    for leader in plan.leaders:
        parts = plan.parts(leader)
        assert parts[0] == leader
        assert len({part.node for part in parts}) == len(parts), "the parts of one node are one part"
        pool = next(pool for pool in config.pools if pool.role is leader.role)
        assert all(part.devices % pool.parallelism.tp == 0 for part in parts)


def test_live_nodes_are_counted_once_and_go_to_the_pool_that_asks_for_most() -> None:
    plain = replace(POOL, name="any", labels={}, nodes=2)
    picky = replace(POOL, name="moon", labels={"zone": "moon"}, nodes=1)
    nodes = [node(cpus=8, zone="moon"), node(cpus=8, zone="moon"), node(cpus=8), node(cpus=1)]
    assert live_nodes([plain, picky], nodes) == {"any": 2, "moon": 1}
    assert live_nodes([plain, picky], nodes[:1]) == {"any": 0, "moon": 1}
    assert live_nodes([plain], nodes) == {"any": 2}, "no more than are declared"


def test_missing_nodes_are_named() -> None:
    assert missing_nodes(aggregated(), PROBLEM, {}) == "pool 'here' has 0 of 1"
    assert missing_nodes(aggregated(), PROBLEM, {"here": 1}) == "no node is missing"


def test_a_group_larger_than_a_node_names_value_limit_and_remedy() -> None:
    pool = Pool(role=Role.MIXED, node_pool="here", parallelism=Parallelism(tp=4))
    with pytest.raises(PlacementError, match=r"needs 4 devices on one node .*'here' has 2; lower tp"):
        plan_placement(ServingConfig(engine="any", pools=(pool,)), PROBLEM)


def test_more_replicas_than_the_pool_holds_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"3 replicas of 1 devices .* 1 nodes x 2 devices.*; use fewer"):
        plan_placement(aggregated(replicas=3), PROBLEM)


def test_a_replica_that_fits_no_node_is_split_between_stages_only() -> None:
    pool = Pool(role=Role.MIXED, node_pool="big", parallelism=Parallelism(tp=4, pp=2))
    big = NodePool(name="big", device=GPU, nodes=2, devices_per_node=4, accelerator_type="H100")
    plan = plan_placement(ServingConfig(engine="any", pools=(pool,)), problem_on((big,)))
    assert [(b.name, b.node, b.gpus) for b in plan.replicas] == [("mixed-0.0", 0, 4), ("mixed-0.1", 1, 4)]
    assert plan.spanning == ("mixed-0.1",)
    assert plan.replicas[0].resources == {"CPU": 4.0, "GPU": 4.0, "accelerator_type:H100": 0.001}


@pytest.mark.parametrize(
    ("sizes", "room", "devices"),
    [
        (Parallelism(tp=2, pp=4), 6, [4, 4]),  # and not 6 and 2, which engines do not take
        (Parallelism(tp=2, pp=3), 4, [2, 2, 2]),
        (Parallelism(tp=1, pp=3, dp=2), 5, [3, 3]),  # a data-parallel rank on each
        (Parallelism(tp=1, pp=6, dp=2), 4, [4, 4, 4]),  # a rank fits no node: its stages are split
    ],
)
def test_the_parts_of_a_replica_are_of_one_size_on_few_nodes(sizes: Parallelism, room: int, devices: list[int]) -> None:
    pool = Pool(role=Role.MIXED, node_pool="big", parallelism=sizes)
    big = NodePool(name="big", device=GPU, nodes=4, devices_per_node=room)
    plan = plan_placement(ServingConfig(engine="any", pools=(pool,)), problem_on((big,)))
    assert [bundle.devices for bundle in plan.replicas] == devices


def test_where_no_equal_parts_fit_groups_go_where_there_is_room() -> None:
    large = Pool(role=Role.PREFILL, node_pool="big", parallelism=Parallelism(tp=3))
    split = Pool(role=Role.DECODE, node_pool="big", parallelism=Parallelism(tp=1, pp=5))
    big = NodePool(name="big", device=GPU, nodes=2, devices_per_node=4)
    plan = plan_placement(ServingConfig(engine="any", pools=(large, split)), problem_on((big,)))
    assert sorted(bundle.devices for bundle in plan.replicas) == [1, 3, 4]


def test_one_replica_needs_no_router() -> None:
    assert plan_placement(aggregated(), PROBLEM).router is None
    assert plan_placement(aggregated(replicas=2), PROBLEM).router is not None
    assert plan_placement(disaggregated(), PROBLEM).router is not None


def test_deployments_fit_together_until_the_pool_is_full() -> None:
    assert fit_together([aggregated(), aggregated()], PROBLEM)
    assert not fit_together([aggregated(), disaggregated()], PROBLEM)


def node(cpus: float = 0.0, gpus: float = 0.0, **labels: str) -> NodeView:
    return NodeView(node_id="n", host="a", ip="10.0.0.1", cpus=cpus, gpus=gpus, labels=labels)


def test_a_pool_that_is_not_there_is_named_with_what_was_found_and_a_remedy() -> None:
    pool = NodePool(name="fast", device=GPU, nodes=2, devices_per_node=8, labels={"gpu": "H100"})
    nodes = [node(cpus=64, gpus=8, gpu="H100"), node(cpus=64, gpus=8, gpu="A100"), node(cpus=64, gpus=4, gpu="H100")]
    with pytest.raises(PlacementError) as caught:
        check_pools([pool], nodes)
    text = str(caught.value)
    assert "'fast' needs 2 nodes with 8 GPUs and gpu=H100, but the cluster has 1" in text
    assert "a (64 CPUs, 8 GPUs, gpu=A100)" in text
    assert "ray start --labels" in text


def test_pools_on_the_same_nodes_are_counted_together() -> None:
    twins = [replace(POOL, name="one", labels={}), replace(POOL, name="two", labels={})]
    with pytest.raises(PlacementError, match="needs 2 nodes"):
        check_pools(twins, [node(cpus=16)])
    check_pools(twins, [node(cpus=16), node(cpus=16)])


def test_the_load_generator_needs_cpus_that_no_pool_takes() -> None:
    with pytest.raises(PlacementError, match=r"has 3 CPUs, but the node pools take 2 and the load generator .* 1\.5"):
        check_pools([replace(POOL, labels={})], [node(cpus=3)])
    check_pools([replace(POOL, labels={})], [node(cpus=3.5)])
