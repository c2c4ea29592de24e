"""What was found in one space, tried in another."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from search_spaces.nearest import nearest
from search_spaces.serving import Mode, OptionValue
from search_spaces.space import build_space
from search_spaces.workload import Arrival, Load
from tests.studies.toy import WIDE, toy_problem, wide_space

SPACE = wide_space(toy_problem())


@given(st.integers(0, 10_000))
def test_a_candidate_of_the_space_is_nearest_to_itself(seed: int) -> None:
    candidate = SPACE.sample(random.Random(seed))
    assert nearest(SPACE, candidate, {"here": "here"}) == candidate


@given(st.integers(0, 10_000))
def test_what_is_nearest_is_in_the_space(seed: int) -> None:
    other = build_space(
        toy_problem(), engines={"llamacpp": WIDE | {"max_num_seqs": (3, 16), "threads": (1, 3)}}, loads=(3.0, 30.0)
    )
    found = nearest(SPACE, other.sample(random.Random(seed)), {})
    assert found is not None
    assert SPACE.decode(SPACE.encode(found)) == found


def option(value: OptionValue) -> OptionValue:
    """The slots that `value` slots come nearest to."""
    other = build_space(toy_problem(), engines={"llamacpp": WIDE | {"max_num_seqs": (value,)}}, loads=(2.0,))
    found = nearest(SPACE, other.default(Mode.AGGREGATED), {"here": "here"})
    assert found is not None
    return found.config.pools[0].option("max_num_seqs")


def test_numbers_are_near_by_their_ratio() -> None:
    assert [option(value) for value in (3, 16, 6)] == [4, 8, 8]


def test_loads_are_near_where_they_are_of_one_kind() -> None:
    default = SPACE.default()
    heavy = nearest(SPACE, replace(default, load=Load(arrival=Arrival.CLOSED, value=500)), {})
    rate = nearest(SPACE, replace(default, load=Load(arrival=Arrival.POISSON, value=500)), {})
    assert heavy is not None
    assert rate is not None
    assert heavy.load.value == 8.0
    assert rate.load == default.load


def test_another_engine_or_mode_has_no_nearest() -> None:
    default = SPACE.default(Mode.AGGREGATED)
    assert nearest(SPACE, replace(default, config=replace(default.config, engine="vllm")), {}) is None
    assert nearest(replace(SPACE, modes=(Mode.DISAGGREGATED,)), default, {}) is None
