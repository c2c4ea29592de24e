from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.emulated_scheduler import BLOCK_TOKENS, Limits, Scheduler, Sequence, Step
from search_spaces.emulation import Chunk


def scheduler(*, sequences: int = 8, step_tokens: int = 64, blocks: int = 100, **changes: bool) -> Scheduler:
    return Scheduler(Limits(sequences=sequences, step_tokens=step_tokens, blocks=blocks, **changes))


def sequence(tokens: int, wanted: int = 4, first: int = 0) -> Sequence:
    return Sequence(prompt=tuple(range(first, first + tokens)), wanted=wanted)


def planned(rank: Scheduler) -> Step:
    step = rank.schedule()
    assert step is not None
    return step


def run(rank: Scheduler) -> list[Step]:
    """Every step until there is nothing to do."""
    steps = []
    while (step := rank.schedule()) is not None:
        rank.finish(step)
        steps.append(step)
        assert len(steps) < 10_000
    return steps


def test_a_request_alone_takes_a_prompt_and_then_a_step_for_each_token() -> None:
    rank = scheduler()
    asked = sequence(40, wanted=3)
    rank.add(asked)
    steps = run(rank)
    assert [step.prompts for step in steps] == [(Chunk(tokens=40),), (), ()]
    assert [len(step.decoding) for step in steps] == [0, 1, 1]
    assert [step.context for step in steps] == [0.0, 41.0, 42.0]
    assert asked.ended
    assert rank.free_blocks == 100


def test_a_long_prompt_comes_in_chunks_of_the_token_budget() -> None:
    rank = scheduler(step_tokens=64)
    rank.add(sequence(150, wanted=1))
    chunks = [step.prompts for step in run(rank)]
    assert chunks == [(Chunk(tokens=64),), (Chunk(tokens=64, start=64),), (Chunk(tokens=22, start=128),)]


def test_decoding_goes_on_beside_the_chunks_of_another_prompt() -> None:
    rank = scheduler(step_tokens=64)
    rank.add(sequence(10, wanted=9))
    rank.finish(planned(rank))
    rank.add(sequence(100, wanted=1, first=1000))
    step = planned(rank)
    assert len(step.decoding) == 1
    assert step.prompts == (Chunk(tokens=63),)


def test_without_chunks_a_prompt_waits_until_a_step_has_room_for_all_of_it() -> None:
    rank = scheduler(step_tokens=64, chunked=False)
    for first in (0, 1000):
        rank.add(sequence(40, wanted=1, first=first))
    assert [step.prompts for step in run(rank)] == [(Chunk(tokens=40),), (Chunk(tokens=40),)]


def test_no_more_sequences_run_than_there_are_slots() -> None:
    rank = scheduler(sequences=2, step_tokens=1000)
    for index in range(5):
        rank.add(sequence(10, first=100 * index))
    assert len(planned(rank).prompts) == 2
    assert len(rank.waiting) == 3


def test_a_request_that_finds_no_blocks_waits() -> None:
    rank = scheduler(blocks=4, step_tokens=1000)
    rank.add(sequence(3 * BLOCK_TOKENS, wanted=2))
    rank.add(sequence(3 * BLOCK_TOKENS, wanted=2, first=1000))
    assert len(planned(rank).prompts) == 1
    assert rank.used_share == 0.75


def test_the_sequence_admitted_last_gives_up_its_blocks_and_is_computed_again() -> None:
    rank = scheduler(blocks=4, step_tokens=1000)
    first, second = (sequence(2 * BLOCK_TOKENS - 1, wanted=10, first=n) for n in (0, 1000))
    rank.add(first)
    rank.add(second)
    steps = run(rank)
    assert rank.preemptions == 1
    assert first.ended
    assert second.ended
    again = [chunk for step in steps for owner, chunk in step.chunks if owner is second]
    assert len(again) == 2
    assert again[1].tokens > again[0].tokens
    assert rank.free_blocks == 4


def test_blocks_of_an_earlier_prompt_are_used_again() -> None:
    rank = scheduler(reuses_prefixes=True, step_tokens=1000)
    for _ in range(2):
        asked = sequence(40, wanted=1)
        rank.add(asked)
        run(rank)
    assert asked.reused == 2 * BLOCK_TOKENS


def test_a_prompt_that_is_wholly_known_still_computes_its_last_block() -> None:
    rank = scheduler(reuses_prefixes=True, step_tokens=1000)
    for _ in range(2):
        asked = sequence(2 * BLOCK_TOKENS, wanted=1)
        rank.add(asked)
        run(rank)
    assert asked.reused == BLOCK_TOKENS


def test_blocks_that_were_forgotten_are_computed_anew() -> None:
    rank = scheduler(reuses_prefixes=True, step_tokens=1000)
    for _ in range(2):
        asked = sequence(40, wanted=1)
        rank.add(asked)
        run(rank)
        rank.forget_prefixes()
    assert asked.reused == 0


def test_blocks_are_not_used_again_unless_that_is_asked_for() -> None:
    rank = scheduler(step_tokens=1000)
    for _ in range(2):
        asked = sequence(40, wanted=1)
        rank.add(asked)
        run(rank)
    assert asked.reused == 0


def test_an_aborted_request_frees_its_blocks_when_its_step_ends() -> None:
    rank = scheduler()
    asked = sequence(40)
    rank.add(asked)
    step = planned(rank)
    rank.abort(asked)
    assert rank.free_blocks < 100
    assert rank.finish(step) == []
    assert rank.free_blocks == 100
    assert rank.load == 0


def test_a_kept_cache_stays_until_it_is_released() -> None:
    rank = scheduler()
    asked = Sequence(prompt=tuple(range(40)), wanted=1, keeps_cache=True)
    rank.add(asked)
    run(rank)
    assert rank.free_blocks == 97
    rank.release(asked)
    assert rank.free_blocks == 100


def test_a_restored_cache_leaves_one_token_to_compute() -> None:
    rank = scheduler()
    asked = sequence(40, wanted=2)
    assert rank.reserve(asked, 41)
    asked.computed = asked.reused = 39
    rank.add(asked)
    steps = run(rank)
    assert [len(step.decoding) for step in steps] == [1, 1]
    assert all(step.prompts == () for step in steps)


@given(
    requests=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 30)), min_size=1, max_size=12),
    sequences=st.integers(1, 6),
    step_tokens=st.integers(6, 128),
    blocks=st.integers(15, 40),
)
def test_whatever_is_asked_every_request_ends_and_every_limit_holds(
    requests: list[tuple[int, int]], sequences: int, step_tokens: int, blocks: int
) -> None:
    rank = scheduler(sequences=sequences, step_tokens=step_tokens, blocks=blocks)
    asked = [sequence(tokens, wanted, 1000 * n) for n, (tokens, wanted) in enumerate(requests)]
    for one in asked:
        rank.add(one)
    produced = 0
    while (step := rank.schedule()) is not None:
        assert sum(chunk.tokens for chunk in step.prompts) + len(step.decoding) <= step_tokens
        assert len(rank.running) <= sequences
        assert rank.free_blocks >= 0
        assert rank.free_blocks + sum(one.blocks for one in asked) == blocks
        produced += len(rank.finish(step))
    assert produced == sum(wanted for _, wanted in requests)
    assert all(one.ended for one in asked)
    assert rank.free_blocks == blocks


@pytest.mark.parametrize(("tokens", "fits"), [(64, True), (65, False)])
def test_what_can_never_fit_is_known(tokens: int, fits: bool) -> None:
    assert scheduler(blocks=4).holds(tokens) is fits
