"""Laws of the search space, over random spaces and genotypes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.errors import InvalidValueError
from search_spaces.hardware import Device, DeviceKind, NodePool
from search_spaces.model import Attention, DenseFeedForward, LayerGroup, ModelSpec
from search_spaces.problem import Objective, Problem
from search_spaces.rules import group_sizes, infeasibility, packs
from search_spaces.serving import Candidate, Mode, Role, make_options
from search_spaces.space import RoleChoices, Space, build_space
from search_spaces.workload import Arrival, Length, Workload


def make_problem(*, devices_per_node: int = 4, nodes: int = 1, arrival: Arrival = Arrival.CLOSED) -> Problem:
    device = Device(
        name="core",
        kind=DeviceKind.CPU,
        memory_bytes=4e9,
        memory_bandwidth=1e10,
        flops={"fp32": 5e10},
        link_bandwidth=1e10,
        network_bandwidth=1e9,
    )
    layers = LayerGroup(
        count=4,
        attention=Attention(heads=8, kv_heads=4, head_dim=32),
        feed_forward=DenseFeedForward(intermediate_size=512),
    )
    return Problem(
        model=ModelSpec(name="tiny", hidden_size=256, vocab_size=1000, layers=(layers,)),
        workload=Workload(isl=Length(mean=128, spread=0.2), osl=Length(mean=32), arrival=arrival),
        node_pools=(NodePool(name="local", device=device, nodes=nodes, devices_per_node=devices_per_node),),
        objectives=(Objective(metric="output_tokens_per_s"), Objective(metric="ttft_p99_ms")),
    )


def subsets(values: list[int | str | bool]) -> st.SearchStrategy[tuple[int | str | bool, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(
        lambda chosen: tuple(value for value in values if value in chosen)
    )


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    options = {
        "max_num_seqs": draw(subsets([1, 2, 4, 8])),
        "batch_size": draw(subsets([64, 128, 512])),
        "ubatch_size": draw(subsets([32, 64, 128, 256])),
        "kv_cache_dtype": draw(subsets(["f16", "q8_0"])),
        "flash_attention": draw(subsets([True, False])),
        "threads": draw(subsets([1, 2])),
    }
    role = RoleChoices(
        node_pools=("local",),
        replicas=draw(subsets([1, 2, 3])),
        tp=draw(subsets([1, 2])),
        dp=draw(subsets([1, 2])),
        ep=draw(subsets([1, 2, 4])),
    )
    modes = draw(st.sampled_from([(Mode.AGGREGATED,), (Mode.DISAGGREGATED,), tuple(Mode)]))
    return build_space(
        make_problem(devices_per_node=draw(st.integers(2, 12))),
        engines={"llamacpp": options},
        loads=draw(subsets([1, 2, 4, 8])),
        modes=modes,
        roles=dict.fromkeys(Role, role),
    )


def draw_candidate(space: Space, seed: int) -> Candidate:
    return space.sample(random.Random(seed))


@given(spaces(), st.integers(0, 1000))
def test_encode_inverts_decode(space: Space, seed: int) -> None:
    candidate = draw_candidate(space, seed)
    assert space.decode(space.encode(candidate)) == candidate


@given(spaces(), st.integers(0, 1000))
def test_genotypes_hold_exactly_the_parameters(space: Space, seed: int) -> None:
    genotype = space.encode(draw_candidate(space, seed))
    assert list(genotype) == [parameter.name for parameter in space.parameters]
    assert all(genotype[parameter.name] in parameter.choices for parameter in space.parameters)


@given(spaces(), st.integers(0, 1000))
def test_repaired_candidates_obey_the_engine(space: Space, seed: int) -> None:
    for pool in draw_candidate(space, seed).config.pools:
        assert pool.option("ubatch_size") <= pool.option("batch_size")
        assert pool.option("flash_attention") or pool.option("kv_cache_dtype") != "q8_0"
        assert pool.devices_per_rank == pool.option("threads")


@given(spaces(), st.integers(0, 1000))
def test_pools_of_a_deployment_agree_on_what_the_hand_over_needs(space: Space, seed: int) -> None:
    pools = draw_candidate(space, seed).config.pools
    assert len({(pool.option("kv_cache_dtype"), pool.option("flash_attention")) for pool in pools}) == 1


@given(spaces(), st.integers(0, 1000))
def test_key_is_shared_by_equal_candidates_only(space: Space, seed: int) -> None:
    one, other = draw_candidate(space, seed), draw_candidate(space, seed + 1)
    assert (one.key == other.key) == (one == other)
    assert all(sibling.config.key == one.config.key for sibling in space.same_config(one))
    assert one not in space.same_config(one)


@given(spaces(), st.integers(0, 1000))
def test_neighbours_are_distinct_members(space: Space, seed: int) -> None:
    candidate = draw_candidate(space, seed)
    neighbours = space.neighbours(candidate)
    assert candidate not in neighbours
    assert len({neighbour.key for neighbour in neighbours}) == len(neighbours)
    assert all(space.decode(space.encode(neighbour)) == neighbour for neighbour in neighbours)


@given(st.lists(st.integers(1, 8), max_size=8), st.integers(1, 4), st.integers(1, 8))
def test_packing_never_exceeds_the_room(sizes: list[int], bins: int, capacity: int) -> None:
    if packs(sizes, bins, capacity):
        assert sum(sizes) <= bins * capacity
        assert max(sizes, default=0) <= capacity


def test_fit_lowers_replicas_to_the_devices_of_the_pool() -> None:
    role = RoleChoices(node_pools=("local",), replicas=(1, 2, 8))
    space = build_space(
        make_problem(devices_per_node=3), engines={"llamacpp": {"threads": (1,)}}, loads=(4,), roles={Role.MIXED: role}
    )
    candidate = space.decode({"mode": "aggregated", "mixed.replicas": 8})
    assert candidate.config.devices == 2
    assert infeasibility(candidate, space.problem) is None


def test_what_cannot_be_repaired_is_explained() -> None:
    role = RoleChoices(node_pools=("local",), tp=(3,))
    space = build_space(
        make_problem(), engines={"llamacpp": {}}, loads=(4,), modes=(Mode.AGGREGATED,), roles={Role.MIXED: role}
    )
    reason = infeasibility(space.default(), space.problem)
    assert reason == "tp=3 does not divide 8 attention heads; choose one of [1, 2, 4, 8]"


def test_pools_that_cannot_hand_over_are_explained() -> None:
    space = build_space(
        make_problem(), engines={"llamacpp": {"threads": (1,)}}, loads=(4,), modes=(Mode.DISAGGREGATED,)
    )
    fit = space.default()
    prefill, decode = fit.config.pools
    other = replace(decode, options=make_options(dict(decode.options) | {"kv_cache_dtype": "f32"}))
    unfit = replace(fit, config=replace(fit.config, pools=(prefill, other)))
    assert infeasibility(fit, space.problem) is None
    assert str(infeasibility(unfit, space.problem)).startswith("kv_cache_dtype=f32 of the decode pool differs from f16")


def test_too_large_a_group_names_the_node() -> None:
    space = build_space(
        make_problem(devices_per_node=1), engines={"llamacpp": {"threads": (2,)}}, loads=(4,), modes=(Mode.AGGREGATED,)
    )
    candidate = space.default()
    assert group_sizes(candidate.config, "local") == [2]
    assert "a node of pool 'local' has 1" in str(infeasibility(candidate, space.problem))


def test_default_takes_the_engines_defaults_and_the_middle_load() -> None:
    space = build_space(make_problem(), engines={"llamacpp": {"threads": (1,)}}, loads=(1, 4, 16))
    default = space.default()
    assert default.config.mode is Mode.AGGREGATED
    assert default.load.concurrency == 4
    assert default.config.pools[0].option("max_num_seqs") == 4
    assert space.default(Mode.DISAGGREGATED).config.mode is Mode.DISAGGREGATED


def test_values_outside_the_engines_limits_are_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"max_num_seqs=0 is outside its limits; choose from \[1, 2"):
        build_space(make_problem(), engines={"llamacpp": {"max_num_seqs": (0,)}}, loads=(4,))
    with pytest.raises(InvalidValueError, match="has no option 'nonsense'; choose max_num_seqs"):
        build_space(make_problem(), engines={"llamacpp": {"nonsense": (1,)}}, loads=(4,))


def test_unknown_genes_and_values_are_refused() -> None:
    space = build_space(make_problem(), engines={"llamacpp": {}}, loads=(1, 4))
    with pytest.raises(InvalidValueError, match="parameter 'tp' is unknown"):
        space.decode({"tp": 1})
    with pytest.raises(InvalidValueError, match=r"concurrency=3 is no choice; choose one of \[1, 4\]"):
        space.decode({"concurrency": 3})


def test_long_requests_do_not_fit_the_context() -> None:
    space = build_space(make_problem(), engines={"llamacpp": {}}, loads=(1,))
    short = replace(space.problem, model=replace(space.problem.model, max_context=100))
    assert "holds 100" in str(infeasibility(space.default(), short))
