"""Options of production engines: where they apply, what an engine would refuse, and what changes the answers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.engines import ENGINES, engine_spec
from search_spaces.engines.base import EngineParameter
from search_spaces.hardware import DeviceKind, NodePool
from search_spaces.known_gpus import known_gpu
from search_spaces.model_presets import TINY_MODEL
from search_spaces.problem import Objective, Problem
from search_spaces.rules import infeasibility
from search_spaces.serving import Mode, OptionValue, Parallelism, Role
from search_spaces.space import Space, build_space
from search_spaces.workload import Length, Workload
from tests.support.ray_problem import CORE

APART = ("vllm", "sglang", "trtllm")
PROBLEM = Problem(
    model=TINY_MODEL,
    workload=Workload(isl=Length(mean=600), osl=Length(mean=100)),
    node_pools=(
        NodePool(name="cores", device=CORE, nodes=1, devices_per_node=8),
        NodePool(name="gpus", device=known_gpu("h100_sxm"), nodes=2, devices_per_node=8),
    ),
    objectives=(Objective(metric="ttft_p50_ms"), Objective(metric="output_tokens_per_s")),
)


def vllm_space(**options: tuple[OptionValue, ...]) -> Space:
    return build_space(PROBLEM, engines={"vllm": options}, loads=(1.0, 8.0))


EVERYTHING: dict[str, tuple[OptionValue, ...]] = {
    parameter.name: parameter.choices for parameter in engine_spec("vllm").parameters
}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_any_choice_of_all_options_on_cores_and_gpus_is_written_and_read_back(seed: int) -> None:
    space = vllm_space(**EVERYTHING)
    candidate = space.sample(random.Random(seed))
    assert space.decode(space.encode(candidate)) == candidate
    for pool in candidate.config.pools:
        kind = PROBLEM.node_pool(pool.node_pool).device.kind
        offered = {parameter.name for parameter in engine_spec("vllm").parameters_of(pool.role, (kind,))}
        assert set(dict(pool.options)) == offered
        assert pool.devices_per_rank == (pool.option("threads") if kind is DeviceKind.CPU else 1)


def test_a_study_that_names_nothing_searches_neither_numerics_nor_rare_options() -> None:
    genes = {parameter.name.rpartition(".")[2] for parameter in vllm_space().parameters}
    for parameter in engine_spec("vllm").parameters:
        assert (parameter.name in genes) == parameter.searched
    assert not genes & {"kv_cache_dtype", "quantization", "dtype", "speculative_method", "kv_connector"}


@pytest.mark.parametrize("engine", APART)
def test_what_changes_the_answers_is_never_searched_by_itself(engine: str) -> None:
    spec = engine_spec(engine)
    assert {p.name for p in spec.parameters if p.numerics} >= {"kv_cache_dtype"}
    assert not any(p.numerics and p.searched for p in spec.parameters)
    assert not any(p.numerics and p.is_number for p in spec.parameters)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_option_says_what_it_is(engine: str) -> None:
    spec = engine_spec(engine)
    names = [parameter.name for parameter in spec.parameters]
    assert len(set(names)) == len(names)
    for parameter in spec.parameters:
        assert parameter.unit
        assert parameter.meaning
        assert len(set(parameter.choices)) == len(parameter.choices) > 1
        assert set(parameter.kinds) & set(spec.devices)


@pytest.mark.parametrize(
    ("engine", "sizes", "options", "refused"),
    [
        ("vllm", {"tp": 8, "ep": 8}, {}, None),
        ("vllm", {"tp": 2, "dp": 4, "ep": 8}, {}, None),
        ("vllm", {"tp": 8, "ep": 4}, {}, "ep=4 is neither 1 nor tp*dp=8"),
        ("sglang", {"tp": 8, "ep": 2}, {}, None),
        ("sglang", {"tp": 8, "ep": 2}, {"moe_a2a_backend": "none"}, None),
        ("sglang", {"tp": 8, "ep": 2}, {"moe_a2a_backend": "deepep"}, "ep=2 is not tp*dp=8: moe_a2a_backend=deepep"),
        ("sglang", {"tp": 2, "dp": 4, "ep": 8}, {"moe_a2a_backend": "deepep"}, None),
        ("sglang", {"tp": 2, "dp": 4}, {"speculative_algorithm": "NGRAM"}, "data-parallel attention (dp=4)"),
        ("sglang", {"tp": 8}, {"speculative_algorithm": "NGRAM"}, None),
        ("trtllm", {"tp": 8, "ep": 2}, {}, None),
        ("trtllm", {"dp": 8, "ep": 8}, {}, None),
        ("trtllm", {"tp": 2, "dp": 4}, {}, "choose tp=1 with dp=8, or dp=1"),
        ("llamacpp", {"tp": 2, "dp": 4, "ep": 2}, {}, None),
    ],
)
def test_parallel_sizes_that_an_engine_cannot_do_are_refused(
    engine: str, sizes: dict[str, int], options: dict[str, OptionValue], refused: str | None
) -> None:
    found = engine_spec(engine).parallel_conflict(Parallelism(**sizes), options)
    assert (found is None) if refused is None else (found is not None and refused in found)


def test_a_whole_prompt_must_fit_a_step() -> None:
    space = vllm_space(enable_chunked_prefill=(False,), max_num_batched_tokens=(512, 1024), max_num_seqs=(8,))
    genes: dict[str, OptionValue] = {"mode": str(Mode.AGGREGATED), "mixed.node_pool": "gpus"}
    small, large = (space.decode(genes | {"mixed.max_num_batched_tokens": n}) for n in (512, 1024))
    reason = infeasibility(small, PROBLEM)
    assert reason is not None
    assert "max_num_batched_tokens=512 cannot hold the longest request of 700 tokens" in reason
    assert infeasibility(large, PROBLEM) is None


def test_pools_that_hand_over_are_alike_in_what_it_depends_on() -> None:
    space = vllm_space(**EVERYTHING)
    genes: dict[str, OptionValue] = {"mode": str(Mode.DISAGGREGATED)}
    for name in engine_spec("vllm").shared_options:
        values = EVERYTHING[name]
        genes |= {f"{Role.PREFILL}.{name}": values[-1], f"{Role.DECODE}.{name}": values[0]}
    prefill, decode = space.decode(genes).config.pools
    for name in engine_spec("vllm").shared_options:
        assert prefill.option(name) == decode.option(name) == EVERYTHING[name][-1]


def test_schedules_that_need_the_cache_go_with_it() -> None:
    conflict = engine_spec("sglang").conflict
    assert conflict({"disable_radix_cache": True, "schedule_policy": "fcfs"}) is None
    assert "choose fcfs" in str(conflict({"disable_radix_cache": True, "schedule_policy": "lpm"}))


def test_an_option_keeps_its_default_where_it_is_not_searched() -> None:
    parameter = EngineParameter(name="x", choices=(1, 2), default=2, unit="u", meaning="m", searched=False)
    assert parameter.searched_choices == (2,)
