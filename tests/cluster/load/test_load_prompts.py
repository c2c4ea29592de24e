"""Prompts: exact lengths, repeatable, and with nothing in common beyond the stated share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.load.prompts import Prompts, ordinary_ids
from search_spaces.errors import InvalidValueError
from search_spaces.workload import Length, Workload


def prompts(shared: float = 0.0, spread: float = 0.0, isl: int = 64, seed: int = 1) -> Prompts:
    workload = Workload(isl=Length(mean=isl, spread=spread), osl=Length(mean=20, spread=spread), shared_prefix=shared)
    return Prompts(workload=workload, vocabulary=range(100, 900), seed=seed)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@given(
    shared=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    isl=st.integers(1, 300),
    first=st.integers(0, 1000),
    apart=st.integers(1, 799),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_two_prompts_share_the_stated_share_and_not_a_token_more(
    shared: float, isl: int, first: int, apart: int, seed: int
) -> None:
    source = prompts(shared, isl=isl, seed=seed)
    one, other = source.request(first).prompt, source.request(first + apart).prompt
    assert len(one) == len(other) == isl
    assert common_prefix(one, other) == round(shared * isl)


def test_prompts_follow_from_the_seed_alone_and_not_from_what_was_drawn_before() -> None:
    once = [prompts(0.3, 0.5, seed=7).request(index) for index in range(20)]
    source = prompts(0.3, 0.5, seed=7)
    again = [source.request(index) for index in reversed(range(20))][::-1]
    assert once == again
    assert once != [prompts(0.3, 0.5, seed=8).request(index) for index in range(20)]


def test_runs_with_different_seeds_share_no_prefix() -> None:
    one, other = prompts(0.5, seed=1), prompts(0.5, seed=2)
    assert max(common_prefix(one.request(i).prompt, other.request(i).prompt) for i in range(100)) <= 2


def test_lengths_are_uniform_over_the_whole_range() -> None:
    source = prompts(spread=0.5, isl=100)
    requests = [source.request(index) for index in range(3000)]
    lengths = [len(request.prompt) for request in requests]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert sum(lengths) / len(lengths) == pytest.approx(100, rel=0.02)
    assert {request.output_tokens for request in requests} == set(range(10, 31))


def test_token_ids_stay_in_the_middle_of_the_vocabulary() -> None:
    assert ordinary_ids(1000) == range(100, 900)
    assert ordinary_ids(2) == range(2)
    ids = {token for index in range(200) for token in prompts().request(index).prompt}
    assert min(ids) >= 100
    assert max(ids) < 900


def test_a_vocabulary_of_one_token_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="vocab_size=1 must be at least 2"):
        ordinary_ids(1)
